# SPDX-License-Identifier: Apache-2.0
"""A learned gate: which blocks of keys matter, told from pooled queries and keys.

Decisions:

- The gate's logits are added to the logarithm of the content's estimate of the mass,
  and they are 0 until it is trained; so it learns what the estimate misses.
- It is trained towards the block mass of dense attention, through that same sum, with
  everything else left alone: the projections don't change, so what they give for a
  batch, and its target, are computed once.
- Each head has maps of its own where the number of heads is given.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from kernel_pytorch.attention.blocks import INF, check_qkv, lse_dtype
from kernel_pytorch.attention.estimate import estimate, examine_keys
from kernel_pytorch.attention.masks import EMPTY, MaskSpec
from kernel_pytorch.attention.partial import lay_mask
from kernel_pytorch.attention.selection import admissible_blocks
from torchworks_core.errors import InvalidValue

_CHUNK = 2**22


class BlockGate(nn.Module):
    """Logits of blocks, from the mean and the maximum of each block's tokens.

    Args:
        head_dim: D.
        num_heads: H, for maps of each head's own; None: all heads share them.
        width: Both sides are mapped to this many dimensions.
        block_size: Tokens in a block; as in the index that it is used for.
        device: Of the parameters.
        dtype: Of the parameters.

    Attributes:
        trained: Bool scalar buffer, set by `distill_gate`.

    Raises:
        InvalidValue: a number is less than 1.

    Example:
        >>> gate = BlockGate(8, num_heads=2, block_size=16)
        >>> logits = gate(torch.randn(1, 2, 64, 8), torch.randn(1, 1, 40, 8))
        >>> logits.shape, bool(logits.any()), bool(gate.trained)
        (torch.Size([1, 2, 4, 3]), False, False)
    """

    trained: Tensor

    def __init__(
        self,
        head_dim: int,
        num_heads: int | None = None,
        width: int = 32,
        *,
        block_size: int = 64,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        numbers = {"head_dim": head_dim, "width": width, "block_size": block_size}
        numbers |= {} if num_heads is None else {"num_heads": num_heads}
        for name, value in numbers.items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise InvalidValue(f"{name}={value!r}", "it must be an int >= 1")
        self.head_dim, self.num_heads = head_dim, num_heads
        self.width, self.block_size = width, block_size
        shape = (num_heads or 1, 2 * head_dim, width)
        place: dict[str, Any] = {"device": device, "dtype": dtype}
        self.q_weight = nn.Parameter(torch.empty(shape, **place))
        self.q_bias = nn.Parameter(torch.empty(shape[0], 1, width, **place))
        self.k_weight = nn.Parameter(torch.empty(shape, **place))
        self.register_buffer("trained", torch.tensor(False, device=device))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start anew: logits are 0, and the gate is untrained."""
        nn.init.zeros_(self.q_weight)
        nn.init.zeros_(self.q_bias)
        bound = (2 * self.head_dim) ** -0.5
        nn.init.uniform_(self.k_weight, -bound, bound)
        self.trained.fill_(False)

    def forward(self, q: Tensor, k: Tensor) -> Tensor:
        """Return logits [B, H, Tq, Tk], float32 (float64 for float64 parameters).

        Args:
            q: [B, H, Nq, D].
            k: [B, Hkv, Nk, D]; H must be a multiple of Hkv.

        Raises:
            InvalidValue: shapes don't fit each other or the gate.
        """
        check_qkv(q, k, k)
        if q.shape[3] != self.head_dim or self.num_heads not in (None, q.shape[1]):
            why = f"the gate is for {self.num_heads or 'any'} heads of {self.head_dim}"
            raise InvalidValue(f"q {tuple(q.shape)}", why)
        return self.score(pooled(q, self.block_size), pooled(k, self.block_size))

    def score(self, q: Tensor, k: Tensor) -> Tensor:
        """As `forward`, from pooled q [B, H, Tq, 2D] and k [B, Hkv, Tk, 2D]."""
        kind = lse_dtype(self.q_weight)
        with torch.autocast(q.device.type, enabled=False):
            k = k.repeat_interleave(q.shape[1] // max(1, k.shape[1]), 1)
            q = q.to(kind) @ self.q_weight.to(kind) + self.q_bias.to(kind)
            k = k.to(kind) @ self.k_weight.to(kind)
            return (q @ k.transpose(2, 3)) * self.width**-0.5

    def extra_repr(self) -> str:
        """What ``repr`` shows."""
        heads = "" if self.num_heads is None else f"num_heads={self.num_heads}, "
        return f"{self.head_dim}, {heads}{self.width}, block_size={self.block_size}"


def pooled(x: Tensor, block_size: int) -> Tensor:
    """Mean and maximum over each block of tokens; what isn't finite counts as 0.

    Args:
        x: [B, H, N, D].
        block_size: Tokens in a block; the last may be shorter.

    Returns:
        [B, H, T, 2 * D], float32 (float64 for float64).

    Example:
        >>> pooled(torch.tensor([1.0, 5.0, 2.0]).view(1, 1, 3, 1), 2).flatten(2)
        tensor([[[3., 5., 2., 2.]]])
    """
    length = x.shape[2]
    x = x.to(lse_dtype(x)).nan_to_num(0.0, 0.0, 0.0)
    short = -length % block_size
    total = pad(x, (0, 0, 0, short)).unflatten(2, (-1, block_size)).sum(3)
    start = torch.arange(0, length, block_size, device=x.device)
    mean = total / (length - start).clamp(max=block_size)[:, None]
    top = pad(x, (0, 0, 0, short), value=-INF).unflatten(2, (-1, block_size))
    return torch.cat([mean, top.amax(3)], -1)


@torch.no_grad()
def true_block_mass(q: Tensor, k: Tensor, mask: MaskSpec, block_size: int) -> Tensor:
    """Share of each block of keys in the softmax of dense attention.

    Args:
        q: [B, H, Nq, D].
        k: [B, Hkv, Nk, D].
        mask: As for the attention.
        block_size: Tokens in a block.

    Returns:
        [B, H, Tq, Tk], float32 (float64 for float64), the mean over the queries of a
        block that see a key; a row sums to 1, or to 0 if none does. Queries are taken
        in chunks, so that memory doesn't grow with Nq * Nk.

    Example:
        >>> q = torch.zeros(1, 1, 4, 2)
        >>> true_block_mass(q, q, MaskSpec(causal=True), 2)[0, 0]
        tensor([[1.0000, 0.0000],
                [0.5833, 0.4167]])
    """
    (batch, heads, q_len, dim), (_, groups, kv_len, _) = q.shape, k.shape
    sizes = -(-q_len // block_size), -(-kv_len // block_size)
    kind, laid = lse_dtype(q), lay_mask(mask, q, k)
    mass = torch.zeros(batch, heads, *sizes, dtype=kind, device=q.device)
    k, scale = k.to(kind).transpose(2, 3), max(dim, 1) ** -0.5
    rows = max(1, _CHUNK // max(1, batch * heads * kv_len))
    for q0 in range(0, q_len, rows):
        q1 = min(q0 + rows, q_len)
        first, end = laid.keys_of(q0, q1)
        tile = laid.tile(q0, q1, first, end)
        if tile is EMPTY:
            continue
        picked = (q[:, :, q0:q1].to(kind) * scale).reshape(batch, groups, -1, dim)
        logits = (picked @ k[..., first:end]).to(kind)
        logits = logits.view(batch, heads, q1 - q0, -1)
        if isinstance(tile, Tensor):
            seen = tile if tile.dtype == torch.bool else tile != -INF
            logits = logits if tile is seen else logits + tile
            logits = logits.masked_fill(~seen, -INF)
        top = logits.amax(-1, keepdim=True)
        weights = (logits - top.masked_fill(top == -INF, 0.0)).exp()
        weights /= weights.sum(-1, keepdim=True).clamp_min(torch.finfo(kind).tiny)
        weights = pad(weights, (first % block_size, -end % block_size))
        by_block = weights.unflatten(-1, (-1, block_size)).sum(-1)
        at, of = first // block_size, torch.arange(q0, q1, device=q.device)
        part = mass[..., at : at + by_block.shape[-1]]
        part.index_add_(2, of // block_size, by_block)
    total = mass.sum(-1, keepdim=True)
    return mass / total.masked_fill(total == 0, 1.0)


def distill_gate(
    layer: nn.Module,
    batches: Iterable[Tensor | tuple[Tensor, Tensor | None]],
    *,
    steps: int = 200,
    lr: float = 1e-3,
) -> list[float]:
    """Train a sparse layer's gate towards the block mass of dense attention.

    Only ``layer.gate`` changes. Afterwards the train or eval mode of each module and
    each ``requires_grad`` are as before, also if this raises.

    Args:
        layer: A `DynamicSparseAttention` with the pattern LEARNED.
        batches: The layer's inputs: hidden states [B, N, d_model], or pairs of these
            and an attention mask. The first ``steps`` of them are used, over and over;
            what is kept of each is [B, H, T, T] and [B, H, T, 2D] for T blocks.
        steps: Steps of the optimizer (Adam), one batch each.
        lr: Its learning rate.

    Returns:
        For each step, the mean over rows of KL(true mass || estimated mass), before it.

    Raises:
        InvalidValue: the layer has no gate, there is no batch or an unusable one, or
            ``steps`` or ``lr`` is out of range.

    Example:
        >>> from kernel_pytorch.attention import create_sparse_attention
        >>> layer = create_sparse_attention(16, 2, pattern="learned", block_size=16)
        >>> found = distill_gate(layer, [torch.randn(1, 64, 16)], steps=3)
        >>> len(found), bool(layer.gate.trained)
        (3, True)
    """
    gate: BlockGate | None = getattr(layer, "gate", None)
    if gate is None:
        why = "only a layer with the pattern LEARNED has one"
        raise InvalidValue(f"the gate of {type(layer).__name__}", why)
    if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
        raise InvalidValue(f"steps={steps!r}", "it must be an int >= 1")
    if not 0 < lr < INF:
        raise InvalidValue(f"lr={lr!r}", "it must be a number > 0")
    losses = []
    with torch.inference_mode(False), _only(gate, layer):
        lessons = [_lesson(layer, gate, b) for b in itertools.islice(batches, steps)]
        if not lessons:
            raise InvalidValue("batches", "there is none", "Give at least one")
        optimizer = torch.optim.Adam(gate.parameters(), lr=lr)
        with torch.enable_grad():
            for step in range(steps):
                loss = _divergence(gate, lessons[step % len(lessons)])
                grads = torch.autograd.grad(loss, list(gate.parameters()))
                for parameter, grad in zip(gate.parameters(), grads, strict=True):
                    parameter.grad = grad
                optimizer.step()
                losses.append(loss.detach())
        gate.trained.fill_(True)
    return torch.stack(losses).tolist()


class _Lesson(NamedTuple):
    """What a batch says.

    Args:
        q: [B, H, Tq, 2D], pooled.
        k: [B, Hkv, Tk, 2D], pooled.
        content: [B, H, Tq, Tk], the logarithm of the estimated mass; -inf where the
            mask hides the block.
        target: [B, H, Tq, Tk], the true mass.
    """

    q: Tensor
    k: Tensor
    content: Tensor
    target: Tensor


@torch.no_grad()
def _lesson(
    layer: Any, gate: BlockGate, batch: Tensor | tuple[Tensor, Tensor | None]
) -> _Lesson:
    x, given = (batch, None) if isinstance(batch, Tensor) else batch
    size = gate.block_size
    layer.check_input(x, x.shape[1] if x.ndim == 3 else 0)
    q, k, _ = layer.project(x)
    mask = layer.mask_of(given, *x.shape[:2])
    # Autocast is for the layer; shares of less than a percent need more than bfloat16.
    with torch.autocast(q.device.type, enabled=False):
        target, content = true_block_mass(q, k, mask, size), _content(q, k, mask, size)
    # As the selection clamps it.
    content = content.clamp_min(torch.finfo(content.dtype).tiny).log()
    content = content.masked_fill(~admissible_blocks(q, k, mask, size), -INF)
    return _Lesson(pooled(q, size), pooled(k, size), content, target)


def _content(q: Tensor, k: Tensor, mask: MaskSpec, size: int) -> Tensor:
    """The content's estimate of the mass, [B, H, Tq, Tk]."""
    whole, rest = divmod(q.shape[2], size)
    k = k.to(lse_dtype(k))
    keys = examine_keys(k, mask, size, False)
    rows = [(row, row + 1) for row in range(whole + (rest > 0))] or [(0, 0)]
    found = [estimate(q, k, mask, size, row, keys, None).mass for row in rows]
    return torch.cat(found, 2)


def _divergence(gate: BlockGate, lesson: _Lesson) -> Tensor:
    """Mean over the rows that see a key of KL(target || content + gate)."""
    logits = lesson.content + gate.score(lesson.q, lesson.k)
    hidden = lesson.content == -INF
    dead = hidden.all(-1, keepdim=True)
    guess = logits.masked_fill(dead, 0.0).log_softmax(-1).masked_fill(hidden, 0.0)
    by_row = (torch.xlogy(lesson.target, lesson.target) - lesson.target * guess).sum(-1)
    alive = lesson.target.sum(-1) > 0
    return (by_row * alive).sum() / alive.sum().clamp_min(1)


@contextmanager
def _only(gate: BlockGate, layer: nn.Module) -> Iterator[None]:
    """Let only the gate train, and put all modes and flags back."""
    modes = {module: module.training for module in layer.modules()}
    flags = {parameter: parameter.requires_grad for parameter in layer.parameters()}
    grads = {parameter: parameter.grad for parameter in gate.parameters()}
    try:
        layer.eval()
        layer.requires_grad_(False)
        gate.requires_grad_(True)
        yield
    finally:
        for module, mode in modes.items():
            module.training = mode
        for parameter, flag in flags.items():
            parameter.requires_grad_(flag)
        for parameter, grad in grads.items():
            parameter.grad = grad
