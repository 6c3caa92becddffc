# SPDX-License-Identifier: Apache-2.0
"""One block of attention with its log-sum-exp, forward and backward, on any device.

Everything above this file is a plan that calls these two functions. It is the only
file that touches torch's private attention ops. Decisions:

- ``lse`` leaves every backend as [B, H, Nq] in fp32 (fp64 for fp64), -inf in rows that
  see no key; the CPU op gives 0 there, so dead rows are found from the tile.
- Backward takes the FINAL out and lse of a row, of which this block may be a part:
  P = exp(S - lse), dS = P * (dP - sum(dO * O) + dlse) (Dao et al., FlashAttention,
  2022; Liu et al., Ring Attention, 2023).
- Grouped-query heads run as one call for each member of the groups, on strided views:
  K and V are never repeated in memory.
- ``strict`` computes what hidden keys holding NaN or infinity need: there 0 * NaN is
  not 0 in the fast kernels.
"""

from __future__ import annotations

import contextlib
import functools
import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from torchworks_core.errors import InvalidValue

_aten = torch.ops.aten
_HALF = (torch.float16, torch.bfloat16)
INF = float("inf")


class Block(NamedTuple):
    """How a block is masked.

    Attributes:
        scale: Factor of the scores.
        diagonal: Query i sees key j only if j <= i; both counted in the block.
        tile: None, bool (True = may attend) or float (added), broadcasting to
            [B, H, Nq, Nk].
        strict: Hidden keys may hold NaN or infinity.
    """

    scale: float
    diagonal: bool = False
    tile: Tensor | None = None
    strict: bool = False


def block_forward(
    q: Tensor, k: Tensor, v: Tensor, block: Block
) -> tuple[Tensor, Tensor]:
    """Attend from one block of queries to one block of keys.

    Args:
        q: [B, H, Nq, D].
        k: [B, Hkv, Nk, D]; H must be a multiple of Hkv.
        v: Like ``k``.
        block: The mask.

    Returns:
        out [B, H, Nq, D] in the dtype of ``q``, and lse [B, H, Nq].

    Example:
        >>> q, k = torch.zeros(1, 1, 2, 4), torch.zeros(1, 1, 2, 4)
        >>> block_forward(q, k, k + 1, Block(0.5, diagonal=True))[1].exp()
        tensor([[[1., 2.]]])
    """
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), q.new_full(q.shape[:3], -INF, dtype=lse_dtype(q))
    groups = q.shape[1] // k.shape[1]
    if groups == 1:
        return _forward(q, k, v, block)
    out, lse = torch.empty_like(q), q.new_empty(q.shape[:3], dtype=lse_dtype(q))
    for g in range(groups):
        part = block._replace(tile=_of_group(block.tile, g, groups))
        out[:, g::groups], lse[:, g::groups] = _forward(q[:, g::groups], k, v, part)
    return out, lse


def block_backward(
    d_out: Tensor,
    d_lse: Tensor | None,
    saved: tuple[Tensor, Tensor, Tensor, Tensor, Tensor],
    block: Block,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of one block.

    Args:
        d_out: Gradient of out, [B, H, Nq, D].
        d_lse: Gradient of lse, [B, H, Nq], or None.
        saved: q, k, v as in `block_forward`, and the final out and lse of the rows.
        block: The mask.

    Returns:
        dq, dk, dv in the shapes of q, k, v; in their dtype or in fp32.
    """
    q, k, v, out, lse = saved
    if not q.numel() or not k.numel():
        return torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
    # A row without keys has S = -inf everywhere: any finite lse makes its P exactly 0.
    lse = lse.masked_fill(lse == -INF, 0.0)
    groups = q.shape[1] // k.shape[1]
    if groups == 1:
        return _backward(d_out, d_lse, (q, k, v, out, lse), block)
    dq = torch.empty_like(q)
    dk, dv = (torch.zeros_like(t, dtype=lse.dtype) for t in (k, v))
    for g in range(groups):
        part = block._replace(tile=_of_group(block.tile, g, groups))
        q_g, out_g, lse_g, do_g = (t[:, g::groups] for t in (q, out, lse, d_out))
        dl_g = None if d_lse is None else d_lse[:, g::groups]
        dq[:, g::groups], a, b = _backward(do_g, dl_g, (q_g, k, v, out_g, lse_g), part)
        dk += a
        dv += b
    return dq, dk, dv


def backend_of(q: Tensor, k: Tensor, block: Block) -> str:
    """Name the kernel for this block.

    Returns:
        ``"cpu-flash"``, ``"sdpa-flash"``, ``"sdpa-efficient"`` or ``"reference"``.

    Example:
        >>> q = torch.zeros(1, 1, 2, 4, dtype=torch.float64)
        >>> backend_of(q, q, Block(1.0))
        'reference'
    """
    # The fused kernels put -inf on scores before they are scaled.
    if block.strict or q.dtype == torch.float64 or block.scale <= 0:
        return "reference"
    if q.device.type == "cpu":
        return "cpu-flash" if _cpu_flash_works() else "reference"
    if q.device.type != "cuda" or torch.version.hip:
        return "reference"
    unit = 8 if q.dtype in _HALF else 4
    if q.shape[-1] % unit:
        return "reference"
    if q.dtype in _HALF and block.tile is None and q.shape[-1] <= 256:
        return "sdpa-flash" if _ampere(q.device) else "sdpa-efficient"
    return "sdpa-efficient"


def lse_dtype(q: Tensor) -> torch.dtype:
    """Return fp64 for fp64 and fp32 for everything else."""
    return torch.float64 if q.dtype == torch.float64 else torch.float32


def checked_scale(scale: float | None, dim: int) -> float:
    """Return the factor of the scores, 1 / sqrt(dim) for None.

    Raises:
        InvalidValue: it isn't finite.
    """
    if scale is None:
        return max(dim, 1) ** -0.5
    if not math.isfinite(scale):
        raise InvalidValue(f"scale={scale!r}", "it must be a finite number")
    return float(scale)


def autocast_enabled(kind: str) -> bool:
    """Whether autocast is on for a type of device; False where there is none."""
    known = torch.amp.autocast_mode.is_autocast_available(kind)
    return known and torch.is_autocast_enabled(kind)


def without_autocast(kind: str) -> contextlib.AbstractContextManager[object]:
    """Switch autocast off for a type of device, if there is any for it."""
    if not autocast_enabled(kind):
        return contextlib.nullcontext()
    return torch.autocast(kind, enabled=False)


def in_autocast_dtype(*tensors: Tensor) -> list[Tensor]:
    """Cast as autocast does for torch's own attention."""
    device = tensors[0].device.type
    if not autocast_enabled(device):
        return list(tensors)
    kind = torch.get_autocast_dtype(device)
    narrow = (torch.float32, torch.float16, torch.bfloat16)
    return [t.to(kind) if t.dtype in narrow else t for t in tensors]


def check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    """Raise InvalidValue, quoting all shapes, unless q, k and v fit together."""
    shapes = f"q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)}"
    if not q.ndim == k.ndim == v.ndim == 4:
        raise InvalidValue(shapes, "each must be [batch, heads, tokens, head_dim]")
    if k.shape != v.shape or q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3]:
        why = "k and v must be alike, and share batch and head_dim with q"
        raise InvalidValue(shapes, why)
    if not k.shape[1] or q.shape[1] % k.shape[1]:
        raise InvalidValue(shapes, "heads of q must be a multiple of those of k and v")
    if len({q.device, k.device, v.device}) > 1:
        raise InvalidValue(shapes, f"devices {q.device}, {k.device}, {v.device}")
    if len({q.dtype, k.dtype, v.dtype}) > 1 or not q.dtype.is_floating_point:
        kinds = f"dtypes {q.dtype}, {k.dtype}, {v.dtype}"
        raise InvalidValue(shapes, f"{kinds}; they must be one floating-point type")


def _forward(q: Tensor, k: Tensor, v: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    name = backend_of(q, k, block)
    if name == "reference":
        return _reference_forward(q, k, v, block)
    q, k, v = (_last_dense(t) for t in (q, k, v))
    scale = block.scale
    tile = _additive(block.tile, q.dtype)
    if name == "cpu-flash":
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, 0.0, block.diagonal, attn_mask=tile, scale=scale
        )
    elif name == "sdpa-flash":
        found = _aten._scaled_dot_product_flash_attention(
            q, k, v, 0.0, block.diagonal, False, scale=scale
        )
        out, lse = found[:2]
    else:
        out, lse = _efficient_forward(q, k, v, tile, block)
    if tile is None:
        return out, lse
    dead = _dead_rows(tile, block.diagonal, q.shape[2], k.shape[2])
    return out.masked_fill_(dead[..., None], 0.0), lse.masked_fill(dead, -INF)


def _backward(
    d_out: Tensor, d_lse: Tensor | None, saved: tuple[Tensor, ...], block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse = saved
    name = backend_of(q, k, block)
    # The fused kernels have no place for dlse, and the CUDA flash one wants its
    # own bookkeeping of the random state: it is passed empty, as dropout is 0.
    if name == "reference" or d_lse is not None:
        return _reference_backward(d_out, d_lse, saved, block)
    q, k, v, out, d_out = (_last_dense(t) for t in (q, k, v, out.to(q.dtype), d_out))
    tile = _additive(block.tile, q.dtype)
    if name == "cpu-flash":
        return _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(d_out, q, k, v, out, lse, 0.0, block.diagonal),
            attn_mask=tile,
            scale=block.scale,
        )
    if name == "sdpa-flash":
        state = torch.zeros(2, dtype=torch.uint64, device=q.device)
        unused = torch.zeros((), dtype=torch.uint64, device=q.device)
        return _aten._scaled_dot_product_flash_attention_backward(
            *(d_out, q, k, v, out, lse.contiguous(), None, None),
            *(q.shape[2], k.shape[2], 0.0, block.diagonal, state, unused),
            scale=block.scale,
        )
    return _efficient_backward(d_out, (q, k, v, out, lse), tile, block)


def _reference_scores(q: Tensor, k: Tensor, block: Block) -> tuple[Tensor, Tensor]:
    """Return scores, -inf where hidden, and what is hidden (bool, broadcasting)."""
    scores = (q.to(lse_dtype(q)) * block.scale) @ k.to(lse_dtype(q)).mT
    hidden = torch.zeros((), dtype=torch.bool, device=q.device)
    if block.tile is not None:
        if block.tile.dtype == torch.bool:
            hidden = ~block.tile
        else:
            scores, hidden = scores + block.tile, block.tile == -INF
    if block.diagonal:
        above = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device)
        hidden = hidden | above.triu_(1)
    return scores.masked_fill_(hidden, -INF), hidden


def _reference_forward(
    q: Tensor, k: Tensor, v: Tensor, block: Block
) -> tuple[Tensor, Tensor]:
    scores, hidden = _reference_scores(q, k, block)
    lse = scores.logsumexp(-1)
    p = (scores - lse.masked_fill(lse == -INF, 0.0)[..., None]).exp_()
    value = v.to(p.dtype)
    if not block.strict:
        return (p @ value).to(q.dtype), lse
    broken = ~value.isfinite()
    p.masked_fill_(hidden, 0.0)
    out = p @ value.masked_fill(broken, 0.0)
    reached = (p != 0).to(p.dtype) @ broken.to(p.dtype) > 0
    return out.masked_fill_(reached, float("nan")).to(q.dtype), lse


def _reference_backward(
    d_out: Tensor, d_lse: Tensor | None, saved: tuple[Tensor, ...], block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse = saved
    scores, hidden = _reference_scores(q, k, block)
    p = scores.sub_(lse[..., None]).exp_().masked_fill_(hidden, 0.0)
    kind = p.dtype
    key, value, d_out = k.to(kind), v.to(kind), d_out.to(kind)
    if block.strict:
        key, value = (t.masked_fill(~t.isfinite(), 0.0) for t in (key, value))
    shift = (d_out * out.to(kind)).sum(-1)
    if d_lse is not None:
        shift = shift - d_lse
    d_scores = (d_out @ value.mT).sub_(shift[..., None]).mul_(p)
    d_scores = d_scores.masked_fill_(hidden, 0.0).mul_(block.scale)
    return d_scores @ key, d_scores.mT @ q.to(kind), p.mT @ d_out


def _efficient_forward(
    q: Tensor, k: Tensor, v: Tensor, tile: Tensor | None, block: Block
) -> tuple[Tensor, Tensor]:
    found = _aten._efficient_attention_forward(
        *(t.transpose(1, 2) for t in (q, k, v)),
        *(_aligned(tile, q, k), None, None, None, None, 0.0, int(block.diagonal)),
        compute_log_sumexp=True,
        scale=block.scale,
    )
    return found[0].transpose(1, 2), found[1][:, :, : q.shape[2]]


def _efficient_backward(
    d_out: Tensor, saved: tuple[Tensor, ...], tile: Tensor | None, block: Block
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v, out, lse = saved
    # This kernel reads lse in rows of 32.
    lse = pad(lse, (0, -lse.shape[2] % 32), value=INF).contiguous()
    d_out, q_, k_, v_, out = (t.transpose(1, 2) for t in (d_out, q, k, v, out))
    state = torch.zeros((), dtype=torch.int64, device=q.device)
    found = _aten._efficient_attention_backward(
        *(d_out, q_, k_, v_, _aligned(tile, q, k), out, None, None),
        *(q.shape[2], k.shape[2], lse, 0.0, state, state),
        *(int(block.diagonal), False),
        scale=block.scale,
    )
    dq, dk, dv = (t.transpose(1, 2) for t in found[:3])
    return dq, dk, dv


def _aligned(tile: Tensor | None, q: Tensor, k: Tensor) -> Tensor | None:
    """Give the bias full shape, with rows that begin at multiples of 16."""
    if tile is None:
        return None
    length = k.shape[2]
    full = tile.expand(*q.shape[:3], length)
    return pad(full, (0, -length % 16))[..., :length]


def _additive(tile: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if tile is None or tile.dtype != torch.bool:
        return None if tile is None else tile.to(dtype)
    return torch.zeros_like(tile, dtype=dtype).masked_fill_(~tile, -INF)


def _dead_rows(tile: Tensor, diagonal: bool, rows: int, keys: int) -> Tensor:
    """Rows that see no key: bool, broadcasting to [B, H, rows]."""
    seen = tile != -INF
    if not diagonal:
        return ~seen.any(-1)
    # Row i sees keys 0..i: it is dead until the first key that the tile leaves.
    if tile.shape[2] == 1:
        first = seen.expand(*seen.shape[:3], keys).int().cumsum(-1)
        return (first == 0)[:, :, 0, :rows]
    lower = torch.ones(rows, keys, dtype=torch.bool, device=tile.device).tril_()
    return ~(seen & lower).any(-1)


def _of_group(tile: Tensor | None, member: int, groups: int) -> Tensor | None:
    return tile if tile is None or tile.shape[1] == 1 else tile[:, member::groups]


def _last_dense(t: Tensor) -> Tensor:
    return t if t.stride(-1) == 1 else t.contiguous()


@functools.cache
def _cpu_flash_works() -> bool:
    """Try the private op on 2 x 2 numbers, forward and backward."""
    x = torch.zeros(1, 1, 2, 2)
    try:
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            x, x, x, 0.0, True, attn_mask=None, scale=1.0
        )
        _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            x, x, x, x, out, lse, 0.0, True, attn_mask=None, scale=1.0
        )
    except (AttributeError, RuntimeError, TypeError):
        return False
    return tuple(lse.shape) == (1, 1, 2)


@functools.cache
def _ampere(device: torch.device) -> bool:
    return torch.cuda.get_device_capability(device) >= (8, 0)
