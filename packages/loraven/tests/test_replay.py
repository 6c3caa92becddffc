# SPDX-License-Identifier: Apache-2.0
"""The short way gives the same bits as the long one, or is not taken."""

import pytest
import torch
from torch import nn

from loraven.batches import evaluating, main_output
from loraven.eligible import find_targets
from loraven.replay import Replay


def doubled(module, args, found):
    """A change in one layer."""
    return 2 * found


def compare(model, batches, layers):
    """Change each layer in turn, with a replay and without; blocks known for each."""
    known = []
    with evaluating(model):
        replay = Replay(model, batches, layers)
        for layer in layers:
            handle = layer.register_forward_hook(doubled)
            found = replay.run(layer)
            for batch, short in zip(batches, found, strict=True):
                plain = model(**batch) if isinstance(batch, dict) else model(*batch)
                assert torch.equal(short, main_output(plain))
            handle.remove()
            known.append(len(replay.before(layer)))
    assert not any("forward" in vars(module) for module in model.modules())
    assert not any(module._forward_hooks for module in model.modules())
    return known


@pytest.mark.parametrize("kind", ["bert", "gpt2"])
def test_transformers_skip_the_blocks_before(kind, bert, gpt2, sentences):
    if kind == "bert":
        model, data = bert(num_hidden_layers=3), sentences(2)
    else:
        model, data = gpt2(), [(torch.randint(0, 256, (4, 9)),)] * 2
    targets, _ = find_targets(model)
    known = compare(model, data, [target.module for target in targets])
    each = 6 if kind == "bert" else 4
    blocks = 3 if kind == "bert" else 2
    expected = [block for block in range(blocks) for _ in range(each)]
    assert known[: len(expected)] == expected
    # The pooler comes after all.
    assert known[len(expected) :] == ([3] if kind == "bert" else [])


def test_known_blocks_really_do_not_run(mlp):
    model = mlp()
    with evaluating(model):
        replay = Replay(model, [torch.randn(3, 64)], [model[0], model[4]])
        assert len(replay.before(model[4])) == 4
        assert replay.before(model[0]) == []
        model[2].weight.zero_()
        # Item 2 is known, so that its new weight is not seen.
        assert torch.equal(replay.run(model[4])[0], replay.reference[0])
        assert not torch.equal(replay.run(model[0])[0], replay.reference[0])


class Odd(nn.Module):
    """Three blocks, put together in a way that a replay might get wrong."""

    def __init__(self, way):
        super().__init__()
        self.way = way
        self.blocks = nn.ModuleList(nn.Linear(64, 64) for _ in range(3))

    def forward(self, x):
        for number, block in enumerate(self.blocks):
            x = block(x)
            if self.way == "in place":
                x += 1
            if self.way == "twice" and number == 0:
                x = block(x)
            if self.way == "counts":
                self.calls = getattr(self, "calls", 0) + 1
                x = x * self.calls
        return x


@pytest.mark.parametrize("way", ["in place", "twice"])
def test_odd_models_take_the_long_way_where_they_must(way):
    model, data = Odd(way), [(torch.randn(5, 64),)]
    known = compare(model, data, list(model.blocks))
    assert known == ([0, 0, 0] if way == "in place" else [0, 0, 1])


def test_a_model_that_changes_by_itself_is_not_replayed():
    model = Odd("counts")
    with evaluating(model):
        replay = Replay(model, [torch.randn(5, 64)], list(model.blocks))
    assert replay.before(model.blocks[2]) == []


def test_a_model_that_fails_without_its_blocks_is_run_whole():
    class Needy(Odd):
        def forward(self, x):
            self.ran = 0
            for block in self.blocks:
                x = block(x)
            if self.ran != 3:
                raise RuntimeError("a block did not run")
            return x

    class Counting(nn.Linear):
        def forward(self, x):
            holder[0].ran += 1
            return super().forward(x)

    model = Needy("")
    holder = [model]
    model.blocks = nn.ModuleList(Counting(64, 64) for _ in range(3))
    assert compare(model, [(torch.randn(5, 64),)], list(model.blocks)) == [0, 0, 0]


def test_blocks_that_return_more_than_tensors_are_run():
    class Talking(nn.Linear):
        def forward(self, x):
            return super().forward(x), {"state": 1}

    class Chain(Odd):
        def forward(self, x):
            for block in self.blocks:
                x = block(x)[0]
            return x

    model = Chain("")
    model.blocks = nn.ModuleList(Talking(64, 64) for _ in range(3))
    with evaluating(model):
        replay = Replay(model, [torch.randn(5, 64)], list(model.blocks))
    assert replay.before(model.blocks[2]) == []


def test_an_interrupt_leaves_no_replaced_forward(mlp):
    model = mlp()

    def stop(module, args):
        raise KeyboardInterrupt

    with evaluating(model):
        replay = Replay(model, [torch.randn(3, 64)], [model[4]])
        handle = model[4].register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            replay.run(model[4])
        handle.remove()
    assert not any("forward" in vars(module) for module in model.modules())
