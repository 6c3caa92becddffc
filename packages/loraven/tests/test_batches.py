# SPDX-License-Identifier: Apache-2.0
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from loraven.batches import (
    Examples,
    check_iterable,
    evaluating,
    main_output,
    run,
    select,
    size,
    valid,
)


def test_batches_are_passed_by_their_kind():
    def model(*args, **kwargs):
        return args, kwargs

    x = torch.ones(2)
    assert run(model, x) == ((x,), {})
    assert run(model, (x, 3)) == ((x, 3), {})
    assert run(model, [x, 3]) == ((x, 3), {})
    assert run(model, {"ids": x}) == ((), {"ids": x})
    with pytest.raises(TypeError, match="not a str"):
        run(model, "text")


@pytest.mark.parametrize("one", [torch.ones(2, 2), {"ids": 1}, "text", 3])
def test_one_batch_is_no_stream_of_batches(one):
    with pytest.raises(TypeError, match=r"calibration is an iterable of batches"):
        check_iterable(one, "calibration")
    check_iterable([one], "calibration")


def test_flags_come_back_one_by_one_even_after_an_error():
    model = nn.Sequential(nn.Dropout(), nn.Sequential(nn.Dropout(), nn.ReLU()))
    model.train()
    model[1][0].eval()
    before = [module.training for module in model.modules()]

    def interrupted():
        with evaluating(model):
            assert not any(module.training for module in model.modules())
            assert not torch.is_grad_enabled()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert [module.training for module in model.modules()] == before
    assert torch.is_grad_enabled()


def test_the_output_that_is_judged():
    x, y = torch.zeros(1), torch.ones(1)
    assert main_output(x) is x
    assert main_output(SimpleNamespace(last_hidden_state=x, logits=y)) is y
    assert main_output(SimpleNamespace(last_hidden_state=x, logits=None)) is x
    assert main_output((None, y, x)) is y
    assert main_output({"loss": 0.5, "out": x}) is x
    assert main_output((x, y), lambda found: found[1]) is y
    with pytest.raises(TypeError, match="give output="):
        main_output({"loss": 0.5})
    with pytest.raises(TypeError, match="a str"):
        main_output(x, lambda found: "text")


def test_masks():
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    found = valid({"attention_mask": mask})
    assert found.dtype == torch.bool
    assert torch.equal(found, mask.bool())
    assert valid({"attention_mask": torch.ones(2, 3)}) is None
    assert valid({"ids": mask}) is None
    assert valid(torch.ones(2)) is None
    assert torch.equal(valid(mask, lambda batch: batch == 1), mask.bool())
    with pytest.raises(ValueError, match="other than 0 and 1"):
        valid({"attention_mask": torch.tensor([[0.0, -1e9]])})
    with pytest.raises(ValueError, match=r"\(1, 1, 2, 2\), not \(B, T\)"):
        valid({"attention_mask": torch.ones(1, 1, 2, 2)})
    with pytest.raises(TypeError, match="not a list"):
        valid(mask, lambda batch: [True])


def test_only_what_the_mask_is_matched_to_is_selected():
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]]).bool()
    x = torch.arange(6.0).reshape(2, 3, 1)
    assert select(x, mask).flatten().tolist() == [0, 1]
    assert select(x.reshape(6, 1), mask).flatten().tolist() == [0, 1]
    pooled = x[:, 0]
    assert select(pooled, mask).flatten().tolist() == [0]
    assert select(pooled[:, None], mask).flatten().tolist() == [0]
    assert select(x, None).shape == (6, 1)
    # Time first, one position less, or more dimensions: nothing says which is which.
    for other in (x.transpose(0, 1), x[:, 1:], x[:, None]):
        assert select(other, mask) is None


def test_examples_are_few_and_from_everywhere():
    examples = Examples(96)
    for i in range(40):
        examples.add({"x": torch.full((32, 2), i), "y": torch.zeros(32), "z": "text"})
    sizes = [size(batch) for batch in examples.batches]
    assert 48 <= sum(sizes) <= 96
    origin = [int(batch["x"][0, 0]) for batch in examples.batches]
    assert origin[0] == 0
    assert origin[-1] >= 32
    one = Examples(96)
    one.add(torch.zeros(1000, 3))
    assert one.batches[0].shape == (96, 3)
    # Sizes that disagree can't be cut.
    odd = Examples(4)
    odd.add((torch.zeros(8, 3), torch.zeros(2)))
    assert odd.batches[0][0].shape == (8, 3)
