# SPDX-License-Identifier: Apache-2.0
"""BlockIndex against loops over its definition."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from kernel_pytorch.attention.block_index import BlockIndex


def index_of(counts, blocks, q_len=32, kv_len=32):
    counts, blocks = (torch.tensor(t, dtype=torch.int32) for t in (counts, blocks))
    return BlockIndex(counts[None, None], blocks[None, None], 16, q_len, kv_len)


@pytest.mark.critical
@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 70),
    st.integers(0, 70),
    st.integers(1, 20),
    st.floats(0, 1),
    st.data(),
)
def test_lists_and_masks_agree(q_len, kv_len, size, keep, data):
    torch.manual_seed(data.draw(st.integers(0, 999)))
    rows, columns = -(-q_len // size), -(-kv_len // size)
    kept = torch.rand(2, 2, rows, columns) < keep
    index = BlockIndex.from_block_mask(kept, size, q_len, kv_len)
    index.validate()
    assert torch.equal(index.block_mask(), kept)
    for b in range(2):
        for t in range(rows):
            wanted = kept[b, 1, t].nonzero().flatten().tolist()
            found = index.blocks[b, 1, t, : index.counts[b, 1, t]].tolist()
            assert found == wanted
    dense = index.dense_mask()
    assert dense.shape == (2, 2, q_len, kv_len)
    for i, j in [(0, 0), (q_len - 1, kv_len - 1), (q_len // 2, kv_len // 3)]:
        if q_len and kv_len:
            assert torch.equal(dense[:, :, i, j], kept[:, :, i // size, j // size])
    turned = index.transposed()
    turned.validate()
    assert torch.equal(turned.block_mask(), kept.transpose(2, 3))
    assert (turned.q_len, turned.kv_len) == (kv_len, q_len)
    if kept.numel():
        assert index.density == pytest.approx(kept.float().mean().item())


@pytest.mark.critical
@pytest.mark.parametrize(
    ("counts", "blocks", "message"),
    [
        ([2, 3], [[0, 1], [0, 1]], r"counts at \(head 0, row 1\), value 3"),
        ([-1, 3], [[0, 1], [0, 1]], r"counts at \(head 0, row 0\), value -1"),
        ([2, 2], [[0, 1], [0, 2]], r"blocks at \(head 0, row 1\), value 2"),
        ([2, 2], [[-5, 1], [0, 1]], r"blocks at \(head 0, row 0\), value -5"),
        ([2, 2], [[0, 1], [1, 0]], r"blocks at \(head 0, row 1\), value 0"),
        ([2, 2], [[1, 1], [0, 1]], r"blocks at \(head 0, row 0\), value 1"),
    ],
)
def test_bad_values_are_named(counts, blocks, message):
    with pytest.raises(ValueError, match=message):
        index_of(counts, blocks).validate()


@pytest.mark.fast
def test_what_lies_beyond_a_count_is_free():
    index = index_of([1, 0], [[1, 99], [-7, -7]])
    index.validate()
    assert index.block_mask().tolist() == [[[[False, True], [False, False]]]]
    assert index.density == 0.25


@pytest.mark.fast
def test_the_batch_entry_is_named():
    kept = torch.ones(2, 1, 2, 2, dtype=torch.bool)
    index = BlockIndex.from_block_mask(kept, 16, 32, 32)
    index.blocks[1, 0, 1, 1] = 0
    with pytest.raises(ValueError, match=r"row 1\), value 0 of batch entry 1"):
        index.validate()


@pytest.mark.fast
def test_shapes_and_dtypes_are_checked():
    with pytest.raises(ValueError, match=r"counts \(1, 1, 1\)"):
        index_of([1], [[0]])
    counts = torch.zeros(1, 1, 2, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"torch\.int64"):
        BlockIndex(counts, torch.zeros(1, 1, 2, 1).int(), 16, 32, 32)
    with pytest.raises(ValueError, match="block_size=0"):
        BlockIndex(*(torch.zeros(1, 1, 2, n).int() for n in (1, 1)), 0, 32, 32)
    with pytest.raises(ValueError, match="kv_len 64"):
        BlockIndex.from_block_mask(torch.ones(1, 1, 2, 2).bool(), 16, 32, 64)
    with pytest.raises(ValueError, match="must be bool"):
        BlockIndex.from_block_mask(torch.ones(1, 1, 2, 2), 16, 32, 32)


@pytest.mark.slow
def test_to_flex():
    from torch.nn.attention.flex_attention import BlockMask

    torch.manual_seed(0)
    kept = torch.rand(1, 2, 3, 4) < 0.5
    flex = BlockIndex.from_block_mask(kept, 128, 3 * 128, 4 * 128).to_flex()
    assert isinstance(flex, BlockMask)
    assert torch.equal(flex.to_dense().bool(), kept)
    assert flex.shape == (1, 2, 384, 512)
