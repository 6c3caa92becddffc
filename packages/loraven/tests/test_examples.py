# SPDX-License-Identifier: Apache-2.0
"""Batches are cut into examples only where the model agrees."""

import pytest
import torch
from torch import nn

import loraven
from loraven.batches import Examples, size


class Table(nn.Module):
    """Every example reads a table that is as long as there are examples."""

    def __init__(self, soft):
        super().__init__()
        self.one, self.two, self.soft = nn.Linear(64, 64), nn.Linear(64, 64), soft

    def forward(self, x, table):
        if self.soft:
            return self.two((self.one(x) @ table.T).softmax(-1) @ table)
        return self.two(self.one(x) @ table)


@pytest.mark.parametrize("soft", [False, True])
def test_a_table_as_long_as_the_batch_is_not_cut(soft):
    torch.manual_seed(0)
    model = Table(soft).eval()
    data = [(torch.randn(64, 64), torch.randn(64, 64)) for _ in range(5)]
    summary = loraven.convert(model, data)
    assert len(summary.layers) == 2
    examples = Examples(96)
    with torch.no_grad():
        for batch in data:
            examples.check(model, batch)
            examples.add(batch)
    assert {len(part) for pair in examples.batches for part in pair} == {64}
    assert len(examples.batches) == 1


def test_positions_as_long_as_the_batch_are_not_cut():
    class Positions(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens, self.places = nn.Embedding(64, 64), nn.Embedding(32, 64)
            self.one = nn.Linear(64, 64)

        def forward(self, ids, places):
            return self.one(self.tokens(ids) + self.places(places))

    data = [{"ids": torch.randint(64, (24, 24)), "places": torch.arange(24)}] * 6
    assert size(data[0]) == 24
    assert len(loraven.convert(Positions().eval(), data).layers) == 1


def test_examples_that_stand_by_themselves_are_cut(mlp):
    model, examples = mlp(), Examples(96)
    with torch.no_grad():
        for _ in range(8):
            batch = torch.randn(64, 64)
            examples.check(model, batch)
            examples.add(batch)
    assert max(map(size, examples.batches)) < 64
    assert sum(map(size, examples.batches)) <= 96


def test_statistics_do_not_see_the_check(mlp):
    x = torch.randn(300, 64)
    assert loraven.convert(mlp(), [x]).tokens == 300
