# SPDX-License-Identifier: Apache-2.0
"""A conversion that is refused, fails or is interrupted changes nothing."""

import pytest
import torch
from torch import nn

import loraven

DATA = [torch.randn(300, 64)]


class Watched:
    """A model in every detail that a conversion could change."""

    def __init__(self, model):
        self.model = model
        self.before = self.look()

    def look(self):
        modules = dict(self.model.named_modules())
        tensors = dict(self.model.named_parameters()) | dict(self.model.named_buffers())
        hooks = [
            (name, key, dict(value))
            for name, module in modules.items()
            for key, value in vars(module).items()
            if key.endswith("_hooks")
        ]
        return (
            {name: id(module) for name, module in modules.items()},
            {name: (id(t), t._version) for name, t in tensors.items()},
            {name: module.training for name, module in modules.items()},
            {name: list(vars(module)) for name, module in modules.items()},
            hooks,
        )

    def untouched(self):
        for before, after in zip(self.before, self.look(), strict=True):
            assert before == after
        return True


@pytest.fixture
def watched(mlp):
    model = mlp().train()
    model[1].eval()
    model[0].register_forward_hook(lambda module, args, y: None)
    return Watched(model)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"levels": ()}, ValueError, "0 levels"),
        ({"levels": [i / 10 for i in range(1, 9)]}, ValueError, "8 levels"),
        ({"levels": (0.0, 1.0)}, ValueError, r"in \(0, 1\]"),
        ({"levels": (0.5, 1.2)}, ValueError, r"in \(0, 1\]"),
        ({"levels": (float("nan"),)}, ValueError, r"in \(0, 1\]"),
        ({"levels": (0.5, 0.5)}, ValueError, "twice"),
        ({"levels": 0.5}, TypeError, "levels=0.5"),
        ({"levels": ("a",)}, TypeError, "levels="),
        ({"levels": "1"}, TypeError, "levels='1'"),
        ({"levels": [True]}, TypeError, r"levels=\[True\]"),
        ({"levels": {0.5: 1}}, TypeError, "levels={"),
        ({"levels": None}, TypeError, "levels=None"),
        ({"levels": (0.01, 1.0)}, ValueError, "level 0.01.*Give 0.[12]"),
        ({"cost": "mac"}, ValueError, "'mac'.*'latency'"),
        ({"cost": 3}, TypeError, "cost=3"),
        ({"cost": lambda *a: -1.0}, ValueError, "cost -1.0"),
        ({"cost": lambda *a: float("nan")}, ValueError, "cost nan"),
        ({"include": "0"}, TypeError, "include='0'.*a list"),
        ({"exclude": [1]}, TypeError, "exclude="),
        ({"include": ["nothing"]}, ValueError, "'0': not in include"),
        ({"min_features": 0}, ValueError, "min_features"),
        ({"min_features": 2.0}, TypeError, "min_features"),
        ({"min_features": 1000}, ValueError, "'0': too small: 96 x 64"),
        ({"output": "logits"}, TypeError, "output='logits'"),
        ({"output": lambda found: None}, TypeError, "give output="),
        ({"token_mask": 1}, TypeError, "token_mask=1"),
        ({"token_mask": lambda batch: [True]}, TypeError, "not a list"),
    ],
)
def test_wrong_arguments(watched, options, error, message):
    with pytest.raises(error, match=message):
        loraven.convert(watched.model, DATA, **options)
    assert watched.untouched()


@pytest.mark.parametrize(
    ("calibration", "error", "message"),
    [
        ([], ValueError, "it has no batch"),
        (DATA[0], TypeError, "not a Tensor"),
        ({"x": DATA[0]}, TypeError, "not a dict"),
        (None, TypeError, "not a NoneType"),
        (["text"], TypeError, "not a str"),
        ([torch.randn(300, 63)], RuntimeError, "63"),
        ([torch.full((300, 64), torch.nan)], ValueError, "input of layer '0'"),
        ([DATA[0], torch.full((1, 64), torch.inf)], ValueError, "input of layer '0'"),
    ],
)
def test_wrong_calibration(watched, calibration, error, message):
    with pytest.raises(error, match=message):
        loraven.convert(watched.model, calibration)
    assert watched.untouched()


def test_what_is_no_model_or_can_not_be_converted():
    with pytest.raises(TypeError, match="not a str"):
        loraven.convert("model", DATA)
    with pytest.raises(ValueError, match="it has no linear layer"):
        loraven.convert(nn.ReLU(), DATA)
    with pytest.raises(ValueError, match="'': it is the whole model"):
        loraven.convert(nn.Linear(64, 64), DATA)


def test_twice_is_refused_and_the_first_conversion_stays(mlp):
    model = mlp()
    loraven.convert(model, DATA)
    loraven.set_budget(model, 0.5)
    for target in (model, nn.Sequential(model)):
        with pytest.raises(
            ValueError, match=r"already converted. Call loraven\.revert"
        ):
            loraven.convert(target, DATA)
    assert loraven.get_budget(model) == 0.5
    loraven.convert(loraven.revert(model), DATA)


class Boom(Exception):
    """What no code under test raises by itself."""


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("call", range(8))
def test_a_model_that_fails_at_any_forward(watched, error, call):
    # One batch runs once for statistics and metrics, twice to see that it can be cut,
    # once for the damages, twice to be counted, and once with the new layers.
    calls = []

    def fail(module, args):
        calls.append(1)
        if len(calls) == call + 1:
            raise error("stop")

    handle = watched.model[2].register_forward_pre_hook(fail)
    watched.before = watched.look()
    if call > 6:
        loraven.convert(watched.model, DATA)
        assert len(calls) == 7
        return
    with pytest.raises(error, match="stop"):
        loraven.convert(watched.model, DATA)
    assert watched.untouched()
    handle.remove()
    loraven.convert(watched.model, DATA)


STEPS = ["find_targets", "calibrate", "output_pca", "pivot", "choices"]
STEPS += ["damages", "allocate", "count_macs", "NestedLinear", "install"]


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("late", [False, True])
def test_a_failure_at_any_step(watched, monkeypatch, step, error, late):
    # The names that the function itself sees, whatever module object is imported.
    home = loraven.convert.__globals__
    real = home[step]

    def fail(*args, **kwargs):
        if late and step != "install":
            real(*args, **kwargs)
        raise error("stop")

    with monkeypatch.context() as patch:
        patch.setitem(home, step, fail)
        with pytest.raises(error, match="stop"):
            loraven.convert(watched.model, DATA)
    assert watched.untouched()


@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupt_between_two_swaps_takes_them_back(watched, monkeypatch, after):
    home, swaps = loraven.set_budget.__globals__, []
    real = home["share_hooks"]

    def fail(*args):
        swaps.append(1)
        if len(swaps) == after:
            raise KeyboardInterrupt
        real(*args)

    monkeypatch.setitem(home, "share_hooks", fail)
    with pytest.raises(KeyboardInterrupt):
        loraven.convert(watched.model, DATA)
    assert len(swaps) == after
    assert watched.untouched()


def test_an_output_that_is_not_finite_is_refused(mlp):
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = mlp()

        def forward(self, x):
            return self.body(x).masked_fill(x > 1, -torch.inf)

    watched = Watched(Masked())
    with pytest.raises(ValueError, match="output: it holds NaN or infinity"):
        loraven.convert(watched.model, DATA)
    assert watched.untouched()
    loraven.convert(watched.model, DATA, sensitivity=False)


def test_weights_that_are_not_finite_name_their_layer(watched):
    with torch.no_grad():
        watched.model[4].weight[3, 5] = torch.nan
    watched.before = watched.look()
    with pytest.raises(ValueError, match="layer '4'"):
        loraven.convert(watched.model, DATA)
    assert watched.untouched()


def test_a_wrapped_model_is_to_be_converted_first(mlp):
    class Parallel(nn.parallel.DistributedDataParallel):
        def __init__(self, module):
            nn.Module.__init__(self)
            self.module = module

    with pytest.raises(ValueError, match="then wrap it"):
        loraven.convert(Parallel(mlp()), DATA)


def test_a_part_that_is_wrapped_for_several_processes_is_refused(mlp):
    wrapped = nn.parallel.DistributedDataParallel.__new__(
        nn.parallel.DistributedDataParallel
    )
    nn.Module.__init__(wrapped)
    wrapped.module = mlp()
    for model, what in ((wrapped, "Distr"), (nn.Sequential(wrapped), "part '0', a Di")):
        with pytest.raises(ValueError, match=f"{what}.*Convert the module first"):
            loraven.convert(model, DATA)
