# SPDX-License-Identifier: Apache-2.0
"""Padding stays out of the statistics of models that have time in front, too."""

import pytest
import torch
from torch import nn

from loraven.batches import Judge
from loraven.calibrate import calibrate
from loraven.eligible import find_targets


class Model(nn.Module):
    """Reads ids or vectors, in one of two orders, flattened or not."""

    def __init__(self, time_first, flat, mix=False, zero=False):
        super().__init__()
        self.embed = nn.Embedding(50, 64)
        self.first, self.second = nn.Linear(64, 64), nn.Linear(64, 64)
        self.time_first, self.flat, self.mix, self.zero = time_first, flat, mix, zero

    def forward(self, input_ids, attention_mask=None):
        x = input_ids if input_ids.is_floating_point() else self.embed(input_ids)
        if self.zero:
            x = x * attention_mask[..., None]
        if self.mix:
            x = x + x.mean(1, keepdim=True)
        if self.time_first:
            x = x.transpose(0, 1)
        shape = x.shape
        if self.flat:
            x = x.reshape(-1, 64)
        x = self.second(self.first(x).relu()).view(shape)
        return x.transpose(0, 1) if self.time_first else x


def batches(kind, length=20, size=12):
    random = torch.Generator().manual_seed(0)
    found = []
    for _ in range(2):
        ids = torch.randint(1, 50, (size, length), generator=random)
        lengths = torch.randint(5, length, (size, 1), generator=random)
        mask = (torch.arange(length) < lengths).long()
        ids = ids * mask
        x = torch.randn(size, length, 64, generator=random) * mask[..., None]
        found.append({"input_ids": {"ids": ids, "floats": x}[kind]})
        found[-1]["attention_mask"] = mask
    return found


def converted(model, data, judge=Judge(metrics=False)):  # noqa: B008
    result = calibrate(model.eval(), data, find_targets(model)[0], judge)
    return set(result.moments), result


@pytest.mark.critical
@pytest.mark.parametrize("kind", ["ids", "floats"])
@pytest.mark.parametrize(("flat", "length"), [(True, 20), (True, 12), (False, 12)])
def test_another_order_than_the_masks_is_found(kind, flat, length):
    data = batches(kind, length)
    names, result = converted(Model(True, flat), data)
    assert not names
    assert "not in the order of the mask" in result.skipped["first"]
    assert result.skipped.keys() == {"first", "second"}
    # The same model with its batch in front is right.
    names, result = converted(Model(False, flat), data)
    assert names == {"first", "second"}
    valid = sum(int(batch["attention_mask"].sum()) for batch in data)
    assert result.moments["first"].tokens == valid


@pytest.mark.parametrize(("zero", "mix"), [(False, True), (True, False)])
def test_models_that_mix_or_drop_padding_are_not_refused(zero, mix):
    for kind in ("ids", "floats"):
        model = Model(False, True, zero=zero, mix=mix)
        assert converted(model, batches(kind))[0] == {"first", "second"}
    if mix:
        assert not converted(Model(True, True, mix=True), batches("ids"))[0]


def test_a_mask_of_ones_own_in_the_right_order_is_believed():
    judge = Judge(None, lambda batch: batch["attention_mask"].T > 0, metrics=False)
    for length in (12, 20):
        model = Model(True, True)
        assert converted(model, batches("ids", length), judge)[0]
    data = [tuple(batch.values()) for batch in batches("ids")]
    judge = Judge(None, lambda batch: batch[1] > 0, metrics=False)
    assert not converted(Model(True, True), data, judge)[0]


def test_looking_into_the_order_enters_no_statistics():
    data = batches("ids")
    model = Model(False, True)
    _, result = converted(model, data)
    x = torch.cat([model.embed(b["input_ids"])[b["attention_mask"] > 0] for b in data])
    mean = x.detach().double().mean(0)
    torch.testing.assert_close(result.moments["first"].mean, mean, rtol=0, atol=1e-6)
    assert result.rows["first"] == 2 * 12 * 20
    assert not any(m._forward_pre_hooks for m in model.modules())
