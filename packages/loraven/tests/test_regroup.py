# SPDX-License-Identifier: Apache-2.0
from collections import OrderedDict, namedtuple
from dataclasses import dataclass
from types import MappingProxyType

import pytest
import torch
from transformers import BatchEncoding
from transformers.modeling_outputs import BaseModelOutputWithPooling

from loraven.regroup import count, merge, select

Pair = namedtuple("Pair", "left right")
ROWS = [torch.tensor([1, 4]), torch.tensor([0]), torch.tensor([2, 3])]


@dataclass
class Plain:
    y: torch.Tensor
    note: str = ""


def split(value):
    """A batch of five in three groups."""
    return [select(value, rows, 5) for rows in ROWS]


def test_the_first_tensor_tells_how_many_examples_there_are():
    x = torch.zeros(5, 2)
    assert count(x) == 5
    assert count(((3, torch.tensor(1.0), [x]), {"y": torch.zeros(7)})) == 5
    assert count(((), {"mask": None, "x": x})) == 5
    assert count(torch.zeros(0, 2)) == 0
    for nothing in ((), {"x": 3}, torch.tensor(1.0)):
        with pytest.raises(ValueError, match="no tensor with a row for each example"):
            count(nothing)


def test_rows_are_taken_from_what_has_them_and_nothing_else():
    x, y = torch.randn(5, 3), torch.arange(5)
    whole = torch.randn(3, 5)
    value = (x, {"y": y, "deep": [y, None]}, Pair(y, "text"), whole, torch.tensor(2))
    found = select(value, torch.tensor([3, 0]), 5)
    assert torch.equal(found[0], torch.stack([x[3], x[0]]))
    assert found[1]["y"].tolist() == found[1]["deep"][0].tolist() == [3, 0]
    assert found[1]["deep"][1] is None
    assert isinstance(found[2], Pair)
    assert found[2].left.tolist() == [3, 0]
    assert found[2].right == "text"
    assert found[3] is whole
    assert found[4] is value[4]
    # The batch itself stays.
    assert value[1]["y"] is y
    encoding = BatchEncoding({"ids": x})
    assert torch.equal(select(encoding, torch.tensor([2]), 5)["ids"], x[2:3])
    assert torch.equal(encoding["ids"], x)


@pytest.mark.critical
@pytest.mark.parametrize(
    "made",
    [
        lambda x, y: x,
        lambda x, y: (x, y),
        lambda x, y: [x, (y, None)],
        lambda x, y: Pair(x, y),
        lambda x, y: {"x": x, "n": 3, "name": "a"},
        lambda x, y: OrderedDict(x=x, y=[y]),
        lambda x, y: BaseModelOutputWithPooling(last_hidden_state=x, pooler_output=y),
        lambda x, y: BaseModelOutputWithPooling(last_hidden_state=x, attentions=(y, y)),
        lambda x, y: Plain(x, "same"),
    ],
)
def test_what_was_split_comes_back_in_order(made):
    x, y = torch.randn(5, 3, 2), torch.arange(5)
    whole = made(x, y)
    found = merge([made(x[rows], y[rows]) for rows in ROWS], ROWS)
    assert type(found) is type(whole)
    # Through repr: no equality of its own for tensors in all these types.
    assert repr(found) == repr(whole)
    if isinstance(whole, BaseModelOutputWithPooling):
        assert torch.equal(found.last_hidden_state, x)
        assert torch.equal(found[0], x)
        assert found.hidden_states is None


def test_parts_are_not_changed_and_gradients_pass():
    x = torch.randn(5, 3, requires_grad=True)
    parts = [{"x": part} for part in split(x)]
    found = merge(parts, ROWS)["x"]
    assert [len(part["x"]) for part in parts] == [2, 1, 2]
    weight = torch.randn(5, 3)
    (found * weight).sum().backward()
    assert torch.equal(x.grad, weight)


def test_what_is_by_no_example_has_to_be_equal_in_all_groups():
    bias = torch.randn(1, 4, 4)
    found = merge([(rows, bias.clone(), True) for rows in ROWS], ROWS)
    assert torch.equal(found[1], bias)
    assert found[2] is True


class Cache:
    """Something with a state, as a model may return."""


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda n: torch.zeros(n, n), r"output can't .*: its shapes .* are \(2, 2\)"),
        (lambda n: (torch.zeros(n), torch.tensor(n)), r"output\[1\] .* \(\), \(\)"),
        (lambda n: {"flat": torch.zeros(3 * n)}, r"output\['flat'\] .* for 2, 1, 2 ex"),
        (lambda n: [Cache()], r"output\[0\] .* a Cache has no row .*no cache"),
        (lambda n: {"n": n}, r"output\['n'\] .* a int has no row"),
        (lambda n: {n: 1}, "different keys"),
        (lambda n: [torch.zeros(n)] * n, "different lengths"),
        (lambda n: torch.zeros(n) if n == 1 else None, "different types .*NoneType, T"),
    ],
)
def test_what_cannot_be_put_together_is_refused_by_name(made, message):
    with pytest.raises(ValueError, match=message):
        merge([made(len(rows)) for rows in ROWS], ROWS)


def test_a_mapping_that_cannot_be_written_becomes_a_dict():
    found = select(MappingProxyType({"y": torch.arange(5)}), ROWS[0], 5)
    assert type(found) is dict
    assert found["y"].tolist() == [1, 4]
