# SPDX-License-Identifier: Apache-2.0
"""Dense attention in float64 with an explicit mask: the independent reference.

It shares no code with the package: masks are written out by their definition.
"""

import torch
from torch.nn.functional import linear


def dense_mask(mask, batch, heads, q_len, k_len, q_positions=None, k_positions=None):
    """Return (seen, bias): bool [B, H, Nq, Nk] and float64 to be added."""
    i = torch.arange(q_len) if q_positions is None else q_positions
    j = torch.arange(k_len) if k_positions is None else k_positions
    seen = torch.ones(batch, heads, len(i), len(j), dtype=torch.bool)
    bias = torch.zeros(batch, heads, len(i), len(j), dtype=torch.float64)
    if mask is None:
        return seen, bias
    distance = i[:, None] - j[None, :]
    if mask.causal:
        seen &= distance >= 0
    if mask.window is not None:
        seen &= distance.abs() < mask.window
    if mask.key_padding is not None:
        seen &= mask.key_padding[:, j][:, None, None, :]
    if mask.documents is not None:
        ids = mask.documents
        seen &= (ids[:, i][:, :, None] == ids[:, j][:, None, :])[:, None]
    if mask.bias is not None:
        whole = mask.bias.expand(batch, heads, *_last(mask.bias, i, j))
        whole = whole if whole.shape[2] == len(i) else whole[:, :, i]
        whole = whole if whole.shape[3] == len(j) else whole[..., j]
        if whole.dtype == torch.bool:
            seen &= whole
        else:
            bias = bias + whole.double()
            seen &= whole != float("-inf")
            bias = bias.masked_fill(~seen, 0.0)
    return seen, bias


def _last(bias, i, j):
    rows = bias.shape[-2] if bias.ndim > 1 and bias.shape[-2] > 1 else len(i)
    columns = bias.shape[-1] if bias.ndim > 0 and bias.shape[-1] > 1 else len(j)
    return rows, columns


def dense_attention(q, k, v, mask=None, scale=None, q_positions=None, k_positions=None):
    """Return (out, lse) in float64, with autograd; rows without keys: 0 and -inf."""
    batch, heads, q_len, dim = q.shape
    q, k, v = q.double(), k.double(), v.double()
    repeat = heads // k.shape[1]
    k, v = k.repeat_interleave(repeat, 1), v.repeat_interleave(repeat, 1)
    seen, bias = dense_mask(
        mask, batch, heads, q_len, k.shape[2], q_positions, k_positions
    )
    scores = torch.einsum("bhid,bhjd->bhij", q, k)
    scores = scores * (dim**-0.5 if scale is None else scale) + bias
    alive = seen.any(-1, keepdim=True)
    # Dead rows get finite scores first, so that autograd sees no -inf - -inf.
    scores = scores.masked_fill(~seen & alive, float("-inf")).masked_fill(~alive, 0.0)
    lse = torch.logsumexp(scores, -1)
    weights = torch.exp(scores - lse[..., None]) * alive
    return weights @ v, lse.masked_fill(~alive[..., 0], float("-inf"))


def layer_reference(layer, x, mask, key=None, value=None):
    """A layer's (output, lse) in float64, by its parameters."""
    p = {name: value.double() for name, value in layer.named_parameters()}
    key = x if key is None else key
    value = key if value is None else value
    inputs = {
        "q": (x, layer.num_heads),
        "k": (key, layer.num_kv_heads),
        "v": (value, layer.num_kv_heads),
    }
    q, k, v = (
        linear(t.double(), p[f"{n}_proj.weight"], p.get(f"{n}_proj.bias"))
        .unflatten(-1, (count, -1))
        .transpose(1, 2)
        for n, (t, count) in inputs.items()
    )
    out, lse = dense_attention(q, k, v, mask)
    out = out.transpose(1, 2).flatten(2)
    return linear(out, p["out_proj.weight"], p.get("out_proj.bias")), lse


def gradients(function, tensors, d_out, d_lse=None):
    """Run ``function(*tensors) -> (out, lse)`` and return out, lse and gradients."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    out, lse = function(*leaves)
    total = (out * d_out.to(out.dtype)).sum()
    if d_lse is not None:
        alive = lse != float("-inf")
        total = total + (lse.masked_fill(~alive, 0.0) * d_lse.to(lse.dtype)).sum()
    grads = torch.autograd.grad(total, leaves)
    return out.detach(), lse.detach(), grads


def mask_parts(batch, heads, q_len, k_len=None, seed=0):
    """Return keyword arguments of MaskSpec, by name, one for each kind of mask."""
    k_len = q_len if k_len is None else k_len
    rng = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.rand(*shape, generator=rng)

    padding = random(batch, k_len) > 0.3
    padding[0, k_len // 2 :] = False
    longest = max(q_len, k_len)
    documents = (random(batch, longest) < 4 / longest).long().cumsum(1)
    rows, columns = slice(0, q_len), slice(0, k_len)
    float_bias = torch.randn(1, heads, q_len, k_len, generator=rng)
    float_bias[random(1, heads, q_len, k_len) < 0.2] = float("-inf")
    parts = {
        "none": {},
        "causal": {"causal": True},
        "window": {"window": max(1, q_len // 5)},
        "causal_window": {"causal": True, "window": max(1, q_len // 3)},
        "window_1": {"causal": True, "window": 1},
        "padding": {"key_padding": padding},
        "all_padding": {"key_padding": torch.zeros(batch, k_len, dtype=torch.bool)},
        "causal_padding": {"causal": True, "key_padding": padding},
        "documents": {"documents": documents},
        "causal_documents": {"causal": True, "documents": documents},
        "shuffled_documents": {
            "documents": torch.randperm(longest, generator=rng).expand(batch, -1) % 3
        },
        "bool_bias": {"bias": random(batch, 1, q_len, k_len) > 0.5},
        "float_bias": {"bias": float_bias},
        "row_bias": {"bias": torch.randn(1, heads, 1, k_len, generator=rng)},
        "everything": {
            "causal": True,
            "window": max(1, q_len // 2),
            "key_padding": padding,
            "documents": documents,
            "bias": float_bias[:, :, rows, columns],
        },
    }
    return parts
