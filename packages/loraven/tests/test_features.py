# SPDX-License-Identifier: Apache-2.0
import math

import pytest
import torch
from torch import nn

from loraven import convert
from loraven.collect import collect, cosine
from loraven.family import find_family
from loraven.features import arguments, first_input, look, mask_of, pooled

LEVELS = (0.3, 0.6, 1.0)


def embedded(model, batch):
    """What goes into BERT's first converted layer, by the model's own parts."""
    with torch.no_grad():
        return model.embeddings(input_ids=batch["input_ids"])


def by_hand(x, lengths):
    """Features example by example, in numpy, without any padding."""
    rows = []
    for tokens, length in zip(x.numpy(), lengths, strict=True):
        kept = tokens[:length].astype("float64")
        rows.append([*kept.mean(0), *kept.std(0), math.log(length)])
    return torch.tensor(rows)


@pytest.fixture
def converted(bert, sentences):
    """A converted BERT and batches that it was not converted with."""
    model = bert()
    convert(model, sentences(), levels=LEVELS, sensitivity=False)
    return model, sentences(batches=3, seed=5)


@pytest.mark.critical
def test_features_are_those_of_the_first_layers_input_without_padding(converted):
    model, batches = converted
    layers = find_family(model)[1].modules
    for batch in batches:
        found, layer, elementwise = look(model, layers, None, (), batch)
        lengths = batch["attention_mask"].sum(1).tolist()
        expected = by_hand(embedded(model, batch), lengths)
        assert torch.allclose(found.double(), expected, atol=1e-5)
        assert layer is model.encoder.layer[0].attention.self.query
        assert elementwise == 2 * 16 * 12 * 64 + 16 * 129
        # Alone or in a batch, padded or not: the same figures.
        short = lengths[3]
        one = {key: value[3:4, :short] for key, value in batch.items()}
        assert torch.allclose(
            look(model, layers, None, (), one)[0], found[3:4], atol=1e-5
        )


def test_the_model_stops_there_and_its_hooks_are_left_alone(converted):
    model, (batch, *_) = converted
    layers = find_family(model)[1].modules
    ran = []
    handles = [
        module.register_forward_hook(lambda m, *_: ran.append(m))
        for module in model.modules()
    ]
    x, layer = first_input(model, layers, (), batch)
    assert layer is layers[0]
    assert torch.equal(x, embedded(model, batch))
    assert set(ran) <= set(model.embeddings.modules())
    for handle in handles:
        handle.remove()
    assert not any(module._forward_pre_hooks for module in model.modules())


class Swallowing(nn.Module):
    """Catches every Exception, and runs its second layer first."""

    def __init__(self, skip=False):
        super().__init__()
        self.one, self.two, self.skip = nn.Linear(64, 64), nn.Linear(64, 64), skip

    def forward(self, x):
        if self.skip:
            return x
        try:
            return self.one(self.two(x))
        except Exception:
            return x


def test_the_first_layer_is_the_one_that_runs_first():
    model = Swallowing()
    convert(model, [torch.randn(200, 64)], levels=LEVELS, sensitivity=False)
    layers = find_family(model)[1].modules
    x = torch.randn(5, 64)
    assert first_input(model, layers, (x,), {})[1] is model.two
    found = collect(model, [x], None, None, None)
    assert layers[found.site] is model.two
    model.skip = True
    with pytest.raises(RuntimeError, match="a converted layer did not run"):
        first_input(model, layers, (x,), {})
    with pytest.raises(RuntimeError, match="ran first when the router was made"):
        first_input(model, layers[1:], (x,), {})


def test_vectors_for_each_example_have_no_spread_and_length_one():
    x = torch.randn(4, 6, dtype=torch.float64)
    found = pooled(x, None, 4)
    assert found.dtype == torch.float64
    assert torch.equal(found, torch.cat([x, torch.zeros(4, 7)], 1))
    mask = torch.tensor([[True, False]] * 4)
    assert torch.equal(pooled(x, mask, 4), found)


@pytest.mark.parametrize("shape", [(3, 20, 6), (3, 4, 5, 6), (60, 6), (12, 5, 6)])
def test_rows_of_an_example_stand_together_in_any_number_of_dimensions(shape):
    x = torch.randn(3, 20, 6)
    expected = by_hand(x, [20, 20, 20])
    found = pooled(x.reshape(shape), None, 3)
    assert torch.allclose(found.double(), expected, atol=1e-6)
    mask = torch.arange(20) < torch.tensor([[20], [7], [1]])
    found = pooled(x.reshape(shape), mask, 3)
    assert torch.allclose(found.double(), by_hand(x, [20, 7, 1]), atol=1e-6)


@pytest.mark.parametrize("shape", [(20, 3, 6), (6,), (7, 6), (2, 6)])
def test_a_layout_that_cannot_be_told_is_refused(shape):
    with pytest.raises(ValueError, match=r"does not match 3 examples\. Pass features="):
        pooled(torch.randn(shape), None, 3)
    mask = torch.ones(3, 20, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"does not match mask \(3, 20\)"):
        pooled(torch.randn(3, 19, 6), mask, 3)


def test_an_example_of_padding_alone_has_figures():
    mask = torch.tensor([[True, True], [False, False]])
    found = pooled(torch.ones(2, 2, 1), mask, 2)
    assert found.tolist() == [[1.0, 0.0, pytest.approx(math.log(2))], [0.0] * 3]


def test_half_precision_is_pooled_in_float32():
    x = (100 + torch.randn(2, 300, 4)).bfloat16()
    found = pooled(x, None, 2)
    assert found.dtype == torch.float32
    assert torch.allclose(found.double(), by_hand(x.float(), [300, 300]), rtol=1e-4)


def test_the_mask_is_found_by_name_and_by_position(converted):
    model, (batch, *_) = converted
    mask = batch["attention_mask"].bool()
    ids = batch["input_ids"]
    assert torch.equal(mask_of(model, (), batch), mask)
    assert torch.equal(mask_of(model, (ids, batch["attention_mask"]), {}), mask)
    assert mask_of(model, (ids,), {}) is None
    assert mask_of(nn.Identity(), (ids, ids), {}) is None


def test_a_users_function_gets_the_batch_as_the_model_does(converted):
    model, (batch, *_) = converted
    seen = []

    def features(batch):
        seen.append(batch)
        return torch.ones(16, 2)

    x = torch.zeros(16, 3)
    for args, kwargs in (((x,), {}), ((x, 3), {}), ((), batch), ((x,), {"n": 1})):
        found, layer, _ = look(model, (), features, args, kwargs)
        assert torch.equal(found, torch.ones(16, 2))
        assert layer is None
    assert seen[0] is x
    assert seen[1:] == [(x, 3), batch, {0: x, "n": 1}]
    assert arguments([x, 3]) == ((x, 3), {})
    with pytest.raises(TypeError, match="a batch is a Tensor"):
        arguments("text")


@pytest.mark.parametrize("shape", [(16,), (15, 2), (16, 0), (16, 2, 1)])
def test_features_of_another_shape_are_refused(converted, shape):
    model, (batch, *_) = converted
    with pytest.raises(ValueError, match=r"features: their shape .*\(16, F\)"):
        look(model, (), lambda _: torch.ones(shape), (), batch)
    with pytest.raises(TypeError, match="returned a list, not a Tensor"):
        look(model, (), lambda _: [1.0], (), batch)
    with pytest.raises(TypeError, match="returned complex numbers"):
        look(model, (), lambda _: torch.ones(16, 2) * 1j, (), batch)


@pytest.mark.critical
def test_cosine_is_that_of_means_over_valid_positions():
    a, b = torch.randn(3, 5, 4), torch.randn(3, 5, 4)
    lengths = [5, 2, 1]
    mask = torch.arange(5) < torch.tensor(lengths)[:, None]
    for given, sizes in ((mask, lengths), (None, [5, 5, 5])):
        found = cosine(a, b, given)
        for i, n in enumerate(sizes):
            left, right = a[i, :n].mean(0).double(), b[i, :n].mean(0).double()
            expected = torch.dot(left, right) / left.norm() / right.norm()
            assert found[i] == pytest.approx(expected.item(), abs=1e-6)
    # Anything else is one vector for each example.
    flat = torch.cosine_similarity(a.flatten(1), b.flatten(1)).double()
    assert torch.allclose(cosine(a[..., None], b[..., None]), flat, atol=1e-6)
    assert torch.allclose(cosine(a.flatten(1), b.flatten(1), mask), flat, atol=1e-6)


def test_equal_outputs_score_one_even_where_they_are_zero():
    a = torch.randn(1000, 7)
    a[3] = 0
    assert (cosine(a, a.clone()) == 1).all()
    other = a.clone()
    other[3, 0] = 1
    assert cosine(a, other)[3] == 0
    assert cosine(a, 2 * a).max() <= 1


def test_outputs_that_a_cosine_says_nothing_about_are_refused():
    x = torch.randn(4, 3, 2)
    for bad in (x[:, 0, 0], x[:, 0, :1], torch.tensor(1.0)):
        with pytest.raises(ValueError, match=r"its cosine 1 or -1\. Pass score="):
            cosine(bad, bad)
    with pytest.raises(ValueError, match=r"dense output is \(4, 3, 2\), a level's"):
        cosine(x, x[:3])
    with pytest.raises(ValueError, match=r"does not match the mask \(4, 5\)"):
        cosine(x, x, torch.ones(4, 5, dtype=torch.bool))
