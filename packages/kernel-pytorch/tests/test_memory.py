# SPDX-License-Identifier: Apache-2.0
"""Memory grows with the length, and no tensor has the size of the scores.

A dispatch mode sees every tensor that torch makes, and when it dies. What kernels hold
inside is measured by the benchmark.
"""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from kernel_pytorch.attention import (
    DynamicSparseAttention,
    MaskSpec,
    RingAttentionLayer,
    SparsePattern,
    attention,
)
from kernel_pytorch.attention.serial import serial_ring


class Live(TorchDispatchMode):
    """Bytes alive at once, and elements of the largest tensor, while it is active."""

    def __init__(self):
        super().__init__()
        self.alive, self.bytes, self.peak, self.largest = {}, 0, 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = {t.untyped_storage()._cdata for t in tensors((args, kwargs))}
        out = func(*args, **(kwargs or {}))
        for t in tensors(out):
            key = t.untyped_storage()._cdata
            if key in given and key not in self.alive:
                continue  # a view of what was there before
            self.note(t, key)
        return out

    def note(self, t, key):
        if key not in self.alive:
            size = t.untyped_storage().nbytes()
            self.alive[key] = [0, size]
            self.bytes += size
            self.peak = max(self.peak, self.bytes)
            self.largest = max(self.largest, size // t.element_size())
        self.alive[key][0] += 1
        weakref.finalize(t, self.drop, key)

    def drop(self, key):
        entry = self.alive[key]
        entry[0] -= 1
        if not entry[0]:
            self.bytes -= entry[1]
            del self.alive[key]


def tensors(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


@pytest.mark.critical
def test_the_mode_counts():
    with Live() as live:
        x = torch.ones(1000)
        y = x * 2
        view = y[:10]
        del x, y
        assert live.bytes == 4000
        del view
        assert live.bytes == 0
        torch.ones(500)
    assert (live.peak, live.largest) == (8000, 1000)


def masks(n):
    keep = torch.ones(1, n, dtype=torch.bool)
    keep[:, : n // 8] = False
    documents = (torch.arange(n) // (n // 3))[None]
    return MaskSpec(True, 600, keep, documents)


def plans(name, n):
    """Forward and backward of a plan over n tokens."""
    width = 32
    x = torch.randn(1, n, width, requires_grad=True)
    if name == "layer":
        layer = RingAttentionLayer(width, 2, device="cpu", causal=True, window=600)
        return lambda: layer(x, masks(n).key_padding).sum().backward()
    if name.startswith("sparse"):
        pattern = SparsePattern(name.removeprefix("sparse "))
        # As many blocks in each row at any length: else the result is quadratic.
        options = {"sparsity_ratio": 1 - 820 / n, "causal": True, "block_size": 64}
        layer = DynamicSparseAttention(width, 2, pattern=pattern, **options)
        return lambda: layer(x, masks(n).key_padding).sum().backward()
    q, k, v = (torch.randn(1, 2, n, 16, requires_grad=True) for _ in range(3))
    if name == "streaming":
        return lambda: attention(q, k, v, masks(n)).sum().backward()
    devices = ["cpu"] * 4
    return lambda: serial_ring(q, k, v, masks(n), devices=devices)[0].sum().backward()


NAMES = ["layer", "streaming", "ring", *(f"sparse {p.value}" for p in SparsePattern)]


@pytest.mark.critical
@pytest.mark.parametrize("name", NAMES)
def test_memory_is_linear(name):
    peaks = []
    for n in (4096, 8192):
        work = plans(name, n)
        with Live() as live:
            work()
        peaks.append(live.peak)
        assert live.largest < n * n // 4
    assert peaks[1] <= 2.1 * peaks[0]


@pytest.mark.critical
@pytest.mark.parametrize(("window", "n"), [(None, 14336), (256, 32768)])
def test_a_layer_holds_keys_values_and_its_result(window, n):
    width = 512
    layer = RingAttentionLayer(width, 8, device="cpu", window=window)
    x = torch.randn(1, n, width)
    with torch.no_grad(), Live() as live:
        layer(x)
    assert live.peak <= 3.2 * x.nbytes
