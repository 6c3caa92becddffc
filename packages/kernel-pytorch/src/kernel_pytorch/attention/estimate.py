# SPDX-License-Identifier: Apache-2.0
"""What blocks of keys weigh for a block of queries, judged from a few of them.

This is the path in torch operations; `native_selection` does the same in C. Decisions:

- Of a block's queries one in `EVERY` is examined, at least two: half of these spread
  evenly, half the ones furthest from the block's mean. What all queries of a block
  share shows in any of them; what is one query's own shows in its distance.
- With the compressed remainder it is the means of as many groups instead: the
  blocks that are kept then matter for what all queries want of them.
- Each head's `FAR` keys furthest from the mean key are compared with every query:
  what all keys share changes no softmax, so a key that a single query wants strongly
  is far from the mean, or its query is.
- Rows and keys are laid out by position, because each head examines other queries.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from kernel_pytorch.attention.blocks import lse_dtype
from kernel_pytorch.attention.masks import INF, MaskSpec
from kernel_pytorch.attention.partial import lay_mask

EVERY = 11
FAR = 32


class Estimate(NamedTuple):
    """What is known of some blocks of queries, each [B, H, rows, Tk].

    Args:
        mass: Mean softmax weight over the examined queries that see a key; a row
            sums to 1, or to 0 where none does.
        lost: The part of it that the remainder wouldn't stand for; without the
            remainder all of it.
        halves: The sums of weights over one half of these queries, and over the other.
        peak: The largest weight that one query gives to the block, among the examined
            ones and, for the far keys, among all.
    """

    mass: Tensor
    lost: Tensor
    halves: tuple[Tensor, Tensor]
    peak: Tensor


class Keys(NamedTuple):
    """What all rows ask of the keys.

    Args:
        far: Int64 [B, Hkv, M], positions of the far keys, ascending.
        known: Bool like ``far``; False where there are fewer than M keys in view.
        means: [B, Hkv, Tk, D], or None without the remainder.
    """

    far: Tensor
    known: Tensor
    means: Tensor | None


def examine_keys(k: Tensor, mask: MaskSpec, size: int, remainder: bool) -> Keys:
    """Find each head's far keys, and the means of its blocks.

    Args:
        k: [B, Hkv, Nk, D], float32 or float64.
        mask: Its padding hides keys.
        size: Tokens in a block.
        remainder: Whether the means are needed.
    """
    kv_len = k.shape[2]
    shown = torch.ones(len(k), 1, kv_len, dtype=torch.bool, device=k.device)
    if mask.key_padding is not None:
        shown = mask.key_padding[:, None, :kv_len].expand(len(k), -1, -1)
    keys = k.masked_fill(~shown[..., None], 0.0)
    count = shown.sum(-1)[..., None, None].clamp_min(1)
    distance = (keys - keys.sum(2, keepdim=True) / count).square().sum(-1)
    distance = distance.nan_to_num(INF, INF).masked_fill(~shown, -1.0)
    order = distance.argsort(dim=-1, descending=True, stable=True)
    far = order[..., : min(FAR, kv_len)].sort(-1).values
    known = distance.gather(-1, far) >= 0
    if not remainder:
        return Keys(far, known, None)
    total = _by_block(keys.transpose(2, 3), size).sum(-1).transpose(2, 3)
    return Keys(far, known, total / _lengths(k, size)[:, None])


def examined(q: Tensor, remainder: bool) -> tuple[Tensor, Tensor]:
    """Choose the queries of each block that speak for it.

    Args:
        q: [..., L, D], the queries of a block.
        remainder: Whether they are means of groups.

    Returns:
        Queries [..., S, D], and the position in the block at which the mask is
        asked for each, int64 [..., S].

    Example:
        >>> examined(torch.randn(3, 64, 2), True)[1][0].tolist()
        [9, 20, 31, 41, 52, 63]
    """
    length = q.shape[-2]
    count = min(length, max(2, -(-length // EVERY)))
    if remainder:
        ends = _ends(length, count).to(q.device)
        place = torch.arange(length, device=q.device)
        group = torch.searchsorted(ends, place, right=False)
        member = torch.nn.functional.one_hot(group, count).T.to(q.dtype)
        member /= member.sum(-1, keepdim=True)
        return member @ q, ends.expand(*q.shape[:-2], -1)
    spread = _ends(length, count - count // 2).to(q.device)
    distance = (q - q.mean(-2, keepdim=True)).square().sum(-1).nan_to_num(INF, INF)
    distance[..., spread] = -1.0
    order = distance.argsort(dim=-1, descending=True, stable=True)
    spread = spread.expand(*q.shape[:-2], -1)
    rows = torch.cat([spread, order[..., : count // 2].sort(-1).values], -1)
    return q.gather(-2, rows[..., None].expand(*rows.shape, q.shape[-1])), rows


def estimate(
    q: Tensor,
    k: Tensor,
    mask: MaskSpec,
    size: int,
    rows: tuple[int, int],
    keys: Keys,
    full: Tensor | None = None,
) -> Estimate:
    """Compare the examined queries of some blocks with all keys.

    Args:
        q: [B, H, Nq, D].
        k: [B, Hkv, Nk, D].
        mask: As for the attention itself.
        size: Tokens in a block.
        rows: First block of queries and end; all of them must be equally long.
        keys: From `examine_keys`.
        full: For the remainder: bool [B|1, H|1, rows, Tk], the blocks that enter it
            when they are dropped.
    """
    (batch, heads, q_len, dim), kv_len = q.shape, k.shape[2]
    (first, end), kind = rows, lse_dtype(q)
    q0, q1 = first * size, min(end * size, q_len)
    mass = q.new_zeros(batch, heads, end - first, -(-kv_len // size), dtype=kind)
    lost, one, other, peak = (mass.clone() for _ in range(4))
    found = Estimate(mass, lost, (one, other), peak)
    start, stop = lay_mask(mask, q, k).keys_of(q0, q1)
    start = start // size * size
    if start >= stop:
        return found
    blocks = q[:, :, q0:q1].to(kind).unflatten(2, (end - first, -1))
    blocks = blocks * max(dim, 1) ** -0.5
    picked, at = examined(blocks, full is not None)
    starts = torch.arange(q0, q1, size, device=q.device)[:, None]
    at, picked = (at + starts).flatten(2), picked.flatten(2, 3)
    columns = torch.arange(start, stop, device=q.device).expand(1, 1, -1)
    logits = _hidden(_times(picked, k[:, :, start:stop]), mask, at, columns)
    lse = logits.logsumexp(-1, keepdim=True)
    lse = lse.masked_fill(lse == -INF, INF)
    weights = _by_block((logits - lse).exp_(), size).sum(-1)
    lost = weights
    now = slice(start // size, start // size + weights.shape[-1])
    if full is not None and keys.means is not None:
        mean = (_times(picked, keys.means[:, :, now]) - lse).exp()
        mean = (mean * _lengths(k, size)[now]).unflatten(2, (end - first, -1))
        mean = mean.masked_fill(~full[:, :, :, None, now], 0.0).flatten(2, 3)
        lost = (weights - mean).clamp_min_(0.0)
    weights, lost, lse = (
        t.unflatten(2, (end - first, -1)) for t in (weights, lost, lse)
    )
    alive = (lse != INF).sum(3).clamp_min(1)
    found.mass[..., now] = weights.sum(3) / alive
    found.lost[..., now] = lost.sum(3) / alive
    found.peak[..., now] = weights.amax(3)
    for number, half in enumerate(found.halves):
        half[..., now] = weights[:, :, :, number::2].sum(3)
    _far_peaks(found.peak, blocks, k, mask, keys, lse.amin(3), q0, size)
    return found


def _far_peaks(
    peak: Tensor,
    blocks: Tensor,
    k: Tensor,
    mask: MaskSpec,
    keys: Keys,
    least: Tensor,
    q0: int,
    size: int,
) -> None:
    """Raise ``peak`` to what any query gives to a far key.

    The sum of a query's softmax is only known to be at least its largest weight here,
    and about that of the examined queries of its block, of which the smallest counts.
    """
    far, known = keys.far, keys.known
    queries, heads = blocks.flatten(2, 3), blocks.shape[1]
    picked = k.gather(2, far[..., None].expand(*far.shape, k.shape[-1]))
    logits = _times(queries, picked)
    repeat = heads // k.shape[1]
    far, known = (t.repeat_interleave(repeat, 1) for t in (far, known))
    rows = torch.arange(q0, q0 + queries.shape[2], device=k.device)
    logits = _hidden(logits, mask, rows.expand(*queries.shape[:2], -1), far)
    logits = logits.masked_fill(~known[:, :, None], -INF)
    top = logits.amax(-1, keepdim=True).unflatten(2, blocks.shape[2:4])
    # Where no examined query sees a key, the query's own far keys are all there is.
    least = least.masked_fill(least == INF, -INF)
    top = torch.maximum(top, least[:, :, :, None])
    share = logits.unflatten(2, blocks.shape[2:4]) - top.masked_fill(top == -INF, 0.0)
    share = share.amax(3).exp()
    place = (far // size)[:, :, None].expand_as(share)
    peak.scatter_reduce_(3, place, share, "amax")


def _hidden(logits: Tensor, mask: MaskSpec, rows: Tensor, columns: Tensor) -> Tensor:
    """Logits [B, H, R, M] under the mask.

    Args:
        logits: Changed in place where that is enough.
        mask: Any mask.
        rows: Positions, int64 [B, H, R].
        columns: Positions, int64 [B|1, H|1, M].
    """
    q_at, k_at = rows[..., None], columns[..., None, :]
    batch = torch.arange(len(rows), device=rows.device)[:, None, None, None]
    if mask.causal:
        logits.masked_fill_(k_at > q_at, -INF)
    if mask.window is not None:
        logits.masked_fill_((q_at - k_at).abs() >= mask.window, -INF)
    if mask.key_padding is not None:
        padding = mask.key_padding.to(rows.device).expand(len(rows), -1)
        logits.masked_fill_(~padding[batch, k_at], -INF)
    if mask.documents is not None:
        ids = mask.documents.to(rows.device).expand(len(rows), -1)
        logits.masked_fill_(ids[batch, q_at] != ids[batch, k_at], -INF)
    if mask.bias is None:
        return logits
    bias = mask.bias.to(rows.device)
    bias = bias.reshape((1,) * (4 - bias.ndim) + bias.shape)
    head = torch.arange(rows.shape[1], device=rows.device)[:, None, None]
    places = (batch, head, q_at, k_at)
    places = [p if n > 1 else p * 0 for p, n in zip(places, bias.shape, strict=True)]
    bias = bias[tuple(places)]
    if bias.dtype == torch.bool:
        return logits.masked_fill_(~bias, -INF)
    return (logits + bias).masked_fill_(bias == -INF, -INF)


def _times(q: Tensor, k: Tensor) -> Tensor:
    """Q [B, H, R, D] times k [B, Hkv, M, D], [B, H, R, M]."""
    batch, heads, rows, dim = q.shape
    grouped = q.reshape(batch, k.shape[1], -1, dim) @ k.transpose(2, 3)
    return grouped.reshape(batch, heads, rows, k.shape[2])


def _ends(length: int, count: int) -> Tensor:
    """Last positions of ``count`` groups of a block, as equal as can be."""
    return (torch.arange(count) + 1) * length // count - 1


def _lengths(k: Tensor, size: int) -> Tensor:
    """Keys in each block, [Tk], like k."""
    start = torch.arange(0, k.shape[2], size, device=k.device)
    return (k.shape[2] - start).clamp(max=size).to(k.dtype)


def _by_block(t: Tensor, size: int) -> Tensor:
    """Split the last dimension in blocks, the last one filled up with 0."""
    short = -t.shape[-1] % size
    t = torch.nn.functional.pad(t, (0, short)) if short else t
    return t.unflatten(-1, (-1, size))
