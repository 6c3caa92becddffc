# SPDX-License-Identifier: Apache-2.0
"""A routed model against the same model run group by group at fixed budgets."""

import copy
import io
import math

import pytest
import torch
from torch import nn

import loraven
from loraven import RoutedModel, at_budget, convert, fit_router, get_budget, set_budget
from loraven.difficulty import Ridge
from loraven.family import find_family
from loraven.features import look

LEVELS = (0.3, 0.6, 1.0)


class Uneven(nn.Module):
    """Hard inputs are those with much in the directions that calibration has not."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(64, 128), nn.Linear(128, 64)

    def forward(self, x, scale=1.0):
        return self.down(self.up(x).relu()) * scale


def uneven(count, seed):
    """(count, 64): 12 strong directions, and others with a strength of one's own."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 64, generator=random)
    hard = 10 ** (-2.5 * torch.rand(count, 1, generator=random))
    return torch.cat([x[:, :12], x[:, 12:] * hard], 1)


def feature(batch):
    """How strong the others are, as one number for each example."""
    return batch[:, 12:].norm(dim=1, keepdim=True).log()


def made_uneven():
    torch.manual_seed(0)
    model = Uneven().eval()
    convert(model, [uneven(500, 1)], levels=(0.4, 0.6, 0.8, 1.0), sensitivity=False)
    return model


def at_random(routed, *args, **batch):
    """Give a router numbers of chance that send examples of a batch to all levels."""
    layers = find_family(routed.model)[1].modules[:1]
    found = look(routed.model, layers, routed.features, args, batch)[0].detach()
    width, levels = found.shape[1], len(LEVELS)
    random = torch.Generator().manual_seed(0)
    coefficients = torch.randn(width, levels, generator=random)
    predicted = found @ coefficients
    third, half = predicted[:, 0].quantile(0.34), predicted[:, 1].quantile(0.5)
    intercept = torch.stack([-third, -half, torch.tensor(0.0)])
    mean = torch.zeros(width)
    routed.hold(Ridge(mean, mean + 1, coefficients, intercept, 1.0), 0.0, 0.0, 0)


@pytest.fixture
def routed(bert, sentences):
    """A BERT routed by numbers of chance, at its middle level, and a batch."""
    model = bert()
    convert(model, sentences(), levels=LEVELS, sensitivity=False)
    set_budget(model, 0.6)
    made, batch = RoutedModel(model), sentences(batches=1, size=32, seed=5)[0]
    at_random(made, **batch)
    return made, batch


def rows_at(levels, level):
    return [i for i, found in enumerate(levels) if found == level]


@pytest.mark.critical
def test_each_group_is_what_the_model_gives_at_that_budget_alone(routed):
    routed, batch = routed
    found = routed(**batch, output_hidden_states=True)
    assert isinstance(routed.last_levels, tuple)
    assert set(routed.last_levels) == set(LEVELS)
    assert found.hidden_states[0].shape == (32, 12, 64)
    assert type(found).__name__ == "BaseModelOutputWithPoolingAndCrossAttentions"
    for level in LEVELS:
        rows = rows_at(routed.last_levels, level)
        alone = at_budget(routed.model, level)
        part = {key: value[rows] for key, value in batch.items()}
        expected = alone(**part, output_hidden_states=True)
        assert torch.equal(found.last_hidden_state[rows], expected.last_hidden_state)
        assert torch.equal(found.pooler_output[rows], expected.pooler_output)
        for here, there in zip(
            found.hidden_states, expected.hidden_states, strict=True
        ):
            assert torch.equal(here[rows], there)
    assert get_budget(routed) == get_budget(routed.model) == 0.6


def test_levels_do_not_depend_on_the_rest_of_the_batch_or_on_padding(routed):
    routed, batch = routed
    routed(**batch)
    together = routed.last_levels
    for row in range(8):
        length = int(batch["attention_mask"][row].sum())
        routed(**{key: value[row : row + 1, :length] for key, value in batch.items()})
        assert routed.last_levels == together[row : row + 1]


def test_arguments_by_position_and_tuples_out(routed):
    routed, batch = routed
    expected = routed(**batch)
    levels = routed.last_levels
    ids, mask = batch["input_ids"], batch["attention_mask"]
    found = routed(ids, mask, return_dict=False)
    assert routed.last_levels == levels
    assert isinstance(found, tuple)
    assert torch.equal(found[0], expected[0])
    # Padding that the router knows nothing of counts as tokens.
    routed(ids)
    assert routed.last_levels != levels


def test_one_group_gets_the_arguments_themselves(routed):
    routed, batch = routed
    seen = []
    routed.model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    routed.offset.fill_(torch.inf)
    found = routed(**batch)
    assert routed.last_levels == (1.0,) * 32
    assert seen[-1]["input_ids"] is batch["input_ids"]
    dense = at_budget(routed.model, 1.0)
    assert torch.equal(found[0], dense(**batch)[0])
    routed.offset.fill_(-torch.inf)
    routed(**batch)
    assert routed.last_levels == (0.3,) * 32


def test_an_empty_batch_runs_and_has_no_levels(mlp):
    model = mlp()
    convert(model, [torch.randn(400, 64)], levels=(0.4, 0.6, 1.0), sensitivity=False)
    routed = RoutedModel(model)
    at_random(routed, torch.randn(40, 64))
    routed(torch.randn(4, 64))
    assert len(routed.last_levels) == 4
    assert routed(torch.randn(0, 64)).shape == (0, 64)
    assert routed.last_levels == ()


@pytest.mark.critical
def test_levels_come_back_when_a_group_fails(routed):
    routed, batch = routed
    model, ran = routed.model, []

    def fail(module, args, output):
        ran.append(get_budget(model))
        if len(ran) == 2:
            raise KeyboardInterrupt

    handle = model.register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        routed(**batch)
    handle.remove()
    assert ran == [0.3, 0.6]
    assert get_budget(model) == 0.6
    assert routed.last_levels == ()


def test_what_has_no_row_for_each_example_goes_to_every_group():
    model = made_uneven()
    routed = fit_router(model, [uneven(400, 2)], features=None)
    x, scale = uneven(64, 3), torch.linspace(0, 1, 64)[:, None]
    model_at = {level: at_budget(model, level) for level in (0.4, 0.6, 0.8, 1.0)}
    for given in (2.0, torch.tensor(3.0), scale):
        found = routed(x, scale=given)
        for row, level in enumerate(routed.last_levels):
            one = given[row : row + 1] if given is scale else given
            expected = model_at[level](x[row : row + 1], scale=one)
            assert torch.allclose(found[row : row + 1], expected, atol=1e-5)


class Summed(Uneven):
    """Returns a loss beside its output."""

    def forward(self, x):
        y = super().forward(x)
        return {"y": y, "loss": y.sum()}


def test_an_output_that_is_by_no_example_is_refused_and_levels_come_back():
    torch.manual_seed(0)
    model = Summed().eval()
    convert(model, [uneven(500, 1)], levels=(0.4, 0.6, 1.0), output=lambda y: y["y"])
    routed = fit_router(model, [uneven(400, 2)], output=lambda y: y["y"])
    with pytest.raises(ValueError, match=r"output\['loss'\] can't be put together"):
        routed(uneven(64, 3))
    assert get_budget(model) == 1.0
    assert torch.equal(routed(torch.zeros(1, 64))["y"], model(torch.zeros(1, 64))["y"])


@pytest.mark.critical
@pytest.mark.parametrize("alpha", [0.05, 0.2])
def test_a_fitted_router_holds_its_share_of_misses_and_saves(alpha):
    model = made_uneven()
    routed = fit_router(
        model, [uneven(600, 2), uneven(600, 3)], alpha=alpha, features=feature
    )
    assert get_budget(model) == 1.0
    x = uneven(2000, 4)
    dense, found = model(x), routed(x)
    scores = torch.cosine_similarity(dense, found)
    missed = (scores < 0.95).double().mean().item()
    error = math.sqrt(alpha * (1 - alpha) * (1 / 2000 + 1 / 514))
    assert missed <= alpha + 3 * error
    levels = torch.tensor(routed.last_levels)
    assert len(levels.unique()) == 4
    # Levels rise with what makes an example hard.
    order = feature(x)[:, 0].argsort()
    assert levels[order[-500:]].mean() > levels[order[:500]].mean() + 0.15


def test_gradients_reach_inputs_and_weights(routed):
    routed, batch = routed
    layer = routed.model.encoder.layer[0].output.LayerNorm
    routed(**batch).last_hidden_state.square().sum().backward()
    got = layer.weight.grad.clone()
    layer.weight.grad = None
    levels = routed.last_levels
    for level in LEVELS:
        rows = rows_at(levels, level)
        part = {key: value[rows] for key, value in batch.items()}
        found = at_budget(routed.model, level)(**part).last_hidden_state
        found.square().sum().backward()
    assert torch.allclose(got, layer.weight.grad, rtol=1e-4, atol=1e-4)


def test_the_router_looks_in_evaluation_mode_and_the_model_stays_in_training():
    torch.manual_seed(0)
    model = nn.Sequential(nn.BatchNorm1d(64), nn.Dropout(0.5), nn.Linear(64, 64))
    model.eval()
    convert(model, [torch.randn(400, 64)], levels=(0.5, 0.8, 1.0), sensitivity=False)
    routed = RoutedModel(model)
    x = torch.randn(40, 64)
    at_random(routed, x)
    expected = routed.route(x)
    assert len(set(expected)) == 3
    routed.train()
    assert routed.route(x) == routed.route(x) == expected
    assert model[0].training
    assert model[0].num_batches_tracked == 0


@pytest.mark.parametrize("way", ["deepcopy", "torch.save", "state_dict"])
def test_copies_and_state_dicts_route_the_same(routed, way):
    routed, batch = routed
    expected = routed(**batch)[0]
    if way == "deepcopy":
        twin = copy.deepcopy(routed)
    else:
        file = io.BytesIO()
        torch.save(routed if way == "torch.save" else routed.state_dict(), file)
        file.seek(0)
        twin = torch.load(file, weights_only=way == "state_dict")
    if way == "state_dict":
        names = {"mean", "scale", "coefficients", "intercept", "offset", "limit"}
        assert {key for key in twin if not key.startswith("model.")} == names | {"site"}
        fresh = RoutedModel(copy.deepcopy(routed.model))
        with pytest.raises(RuntimeError, match="the router: it was not fitted"):
            fresh(**batch)
        fresh.load_state_dict(twin)
        twin = fresh
    found = twin(**batch)[0]
    assert torch.equal(found, expected)
    assert twin.last_levels == routed.last_levels


def test_another_dtype_is_for_the_model_and_not_for_the_router(routed):
    routed, batch = routed
    numbers = [routed.coefficients.clone(), routed.mean.clone()]
    routed.to(torch.bfloat16)
    assert torch.equal(routed.coefficients, numbers[0])
    assert routed.offset.dtype == torch.float64
    assert routed(**batch)[0].dtype == torch.bfloat16
    assert routed.to("meta").coefficients.is_meta


def test_other_levels_or_layers_are_noticed(routed, bert, sentences):
    routed, batch = routed
    other = bert()
    convert(other, sentences(), levels=(0.4, 1.0), sensitivity=False)
    twin = RoutedModel(other)
    own = {k: v for k, v in routed.state_dict().items() if not k.startswith("model.")}
    twin.load_state_dict(own, strict=False)
    with pytest.raises(RuntimeError, match="fitted on 3 levels, the model has 2"):
        twin(**batch)
    with_function = RoutedModel(routed.model, features=lambda b: torch.zeros(32, 129))
    with_function.load_state_dict(own, strict=False)
    with pytest.raises(RuntimeError, match="it was fitted without features="):
        with_function(**batch)
    with_function.mean = torch.zeros(128)
    with_function.site.fill_(-1)
    with pytest.raises(ValueError, match="129 features: the router was fitted on 128"):
        with_function(**batch)


def test_too_few_examples_are_refused_with_the_number_needed():
    model = made_uneven()
    with pytest.raises(ValueError, match=r"44 examples: too few .* at least 45,"):
        fit_router(model, [uneven(44, 2)], features=feature)
    assert isinstance(fit_router(model, [uneven(45, 2)]), RoutedModel)
    with pytest.raises(ValueError, match=r"too few for alpha=0\.01.* at least 231,"):
        fit_router(model, [uneven(230, 2)], alpha=0.01)
    # For a large alpha it is learning that needs ten.
    with pytest.raises(ValueError, match=r"17 examples: .* at least 18,"):
        fit_router(model, [uneven(17, 2)], alpha=0.5)
    assert isinstance(fit_router(model, [uneven(18, 2)], alpha=0.5), RoutedModel)


def test_a_target_that_no_level_reaches_is_refused():
    torch.manual_seed(0)
    model = Uneven().eval()
    convert(model, [uneven(500, 1)], levels=(0.4, 0.6), sensitivity=False)
    message = r"reaches it in \d+ of 171 examples only.*level 1\.0"
    with pytest.raises(ValueError, match=message):
        fit_router(model, [uneven(400, 2)], target=0.9999)


def test_wrong_arguments_are_refused_before_any_work():
    model = made_uneven()

    def never(batch):
        raise AssertionError

    data = [uneven(400, 2)]
    for wrong in ({"target": 1.0}, {"target": 2}, {"alpha": 0}, {"alpha": 1.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            fit_router(model, data, features=never, **wrong)
    for wrong in ({"target": "x"}, {"alpha": None}, {"score": 1}, {"seed": 0.5}):
        with pytest.raises(TypeError, match=next(iter(wrong))):
            fit_router(model, data, features=never, **wrong)
    with pytest.raises(TypeError, match="data is an iterable of batches"):
        fit_router(model, data[0])
    with pytest.raises(RuntimeError, match="was not converted"):
        fit_router(Uneven(), data)
    with pytest.raises(RuntimeError, match="was not converted"):
        RoutedModel(Uneven())
    with pytest.raises(TypeError, match="features"):
        RoutedModel(model, features=3)


def test_the_seed_and_nothing_else_makes_the_split():
    model, data = made_uneven(), [uneven(400, 2)]
    one, two, other = (fit_router(model, data, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(one.coefficients, two.coefficients)
    assert torch.equal(one.offset, two.offset)
    assert not torch.equal(one.coefficients, other.coefficients)
    assert "features=129, levels=4" in repr(one)
    assert loraven.fit_router is fit_router
