# SPDX-License-Identifier: Apache-2.0
"""MaskSpec against masks written out element by element."""

import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

from reference import dense_mask, mask_parts

from kernel_pytorch.attention.masks import EMPTY, FULL, MaskSpec

KINDS = list(mask_parts(1, 1, 8))


def as_bool(tile, shape):
    if tile is EMPTY or tile is FULL:
        return torch.full(shape, tile is FULL)
    seen = tile if tile.dtype == torch.bool else tile != float("-inf")
    return seen.expand(shape)


@pytest.mark.critical
@pytest.mark.parametrize("kind", KINDS)
def test_tiles_make_up_the_mask(kind):
    batch, heads, n, m = 2, 2, 23, 31
    mask = MaskSpec(**mask_parts(batch, heads, n, m)[kind])
    seen, bias = dense_mask(mask, batch, heads, n, m)
    for q0, q1 in ((0, 7), (7, 8), (8, 23), (0, 23)):
        for k0, k1 in ((0, 5), (5, 16), (16, 31), (0, 31)):
            tile = mask.tile(q0, q1, k0, k1)
            shape = (batch, heads, q1 - q0, k1 - k0)
            wanted = seen[:, :, q0:q1, k0:k1]
            assert torch.equal(as_bool(tile, shape), wanted)
            if tile is EMPTY or tile is FULL:
                continue
            if tile.dtype != torch.bool:
                added = bias[:, :, q0:q1, k0:k1][wanted]
                assert torch.equal(tile.expand(shape)[wanted].double(), added)


@pytest.mark.fast
@pytest.mark.parametrize("kind", KINDS)
def test_position_vectors_pick_rows_and_columns(kind):
    batch, heads, n = 2, 2, 24
    mask = MaskSpec(**mask_parts(batch, heads, n)[kind])
    rows = torch.tensor([0, 1, 2, 9, 21, 22, 23])
    columns = torch.tensor([3, 4, 5, 18, 19, 20])
    seen, _ = dense_mask(mask, batch, heads, n, n, rows, columns)
    tile = mask.tile(1, 7, 0, 5, q_positions=rows, k_positions=columns)
    assert torch.equal(as_bool(tile, (batch, heads, 6, 5)), seen[:, :, 1:, :5])


@pytest.mark.fast
@settings(max_examples=150, deadline=None)
@given(
    causal=st.booleans(),
    window=st.none() | st.integers(1, 40),
    rows=st.tuples(st.integers(0, 40), st.integers(1, 12)),
    columns=st.tuples(st.integers(0, 40), st.integers(1, 12)),
)
def test_empty_and_full_are_exact_for_positions(causal, window, rows, columns):
    mask = MaskSpec(causal=causal, window=window)
    q0, q1, k0, k1 = rows[0], sum(rows), columns[0], sum(columns)
    seen, _ = dense_mask(mask, 1, 1, q1, k1)
    wanted = seen[:, :, q0:q1, k0:k1]
    tile = mask.tile(q0, q1, k0, k1)
    assert torch.equal(as_bool(tile, wanted.shape), wanted)
    assert (tile is EMPTY) == (not wanted.any())
    assert (tile is FULL) == bool(wanted.all())
    first, end = mask.lay(range(q0, q1), range(k0, k1)).keys_of(0, q1 - q0)
    visible = wanted.any(2)[0, 0].nonzero()
    if len(visible):
        assert first <= visible[0] <= visible[-1] < end


@pytest.mark.fast
def test_a_tile_of_a_long_mask_stays_small():
    n = 1 << 20
    keep = torch.ones(1, n, dtype=torch.bool)
    keep[0, -10:] = False
    mask = MaskSpec(causal=True, window=1000, key_padding=keep)
    assert mask.tile(n - 100, n, n - 50, n).shape == (1, 1, 100, 50)
    assert mask.tile(n - 100, n, n - 500, n - 400) is FULL
    assert MaskSpec(key_padding=keep).tile(0, n, n - 20, n).shape == (1, 1, 1, 20)


@pytest.mark.fast
@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"window": 0}, "window=0"),
        ({"window": True}, "window=True"),
        ({"window": 2.0}, "window=2.0"),
        ({"window": 2**62 + 1}, r"at most 2\*\*62"),
        ({"causal": 1}, "causal=1"),
        ({"key_padding": [True]}, "must be a tensor"),
        ({"key_padding": torch.ones(2, 3)}, "bool \\[B, Nk\\]"),
        ({"key_padding": torch.ones(3, dtype=torch.bool)}, "bool \\[B, Nk\\]"),
        ({"documents": torch.ones(2, 3)}, "integer \\[B, N\\]"),
        ({"bias": torch.ones(1, 1, 1, 2, 2)}, "broadcasting"),
        ({"bias": torch.ones(2, 2, dtype=torch.int64)}, "bool or float"),
    ],
)
def test_wrong_parts_are_refused(parts, message):
    with pytest.raises(ValueError, match=message):
        MaskSpec(**parts)


@pytest.mark.fast
@pytest.mark.parametrize("kind", ["padding", "documents", "float_bias"])
def test_positions_beyond_the_tensors_are_refused(kind):
    mask = MaskSpec(**mask_parts(1, 1, 8)[kind])
    with pytest.raises(ValueError, match=r"positions 4\.\.8 are asked for"):
        mask.tile(0, 8, 4, 9)


@pytest.mark.fast
def test_frozen():
    with pytest.raises(AttributeError):
        MaskSpec().causal = True
