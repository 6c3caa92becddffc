# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels: interpreted, compiled for GPUs that aren't here, and on CUDA."""

import importlib.util
import json
import math
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
import triton_cases

from kernel_pytorch.attention import (
    BlockIndex,
    MaskSpec,
    SparsePattern,
    block_sparse,
    block_sparse_attention,
    build_block_index,
    triton_launch,
)

HERE = Path(__file__).parent
needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="triton is not installed"
)


def run_script(tmp_path, *arguments):
    # A cache of one's own: nothing compiled before may stand in for what is tested.
    folders = {
        "TRITON_CACHE_DIR": str(tmp_path),
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, **folders},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    return done.stdout


@pytest.mark.fast
@needs_triton
@pytest.mark.parametrize(("which", "least"), [("fixed", 22), ("random", 10)])
def test_interpreted(tmp_path, which, least):
    """Against dense attention in float64; see triton_cases."""
    found = run_script(tmp_path, HERE / "triton_cases.py", which)
    if found.startswith("unusable:"):
        pytest.skip(found)
    assert found.count("passed: ") >= least, found


def check_compiled(tmp_path, capability, dtype, dim, block, parts):
    script, sizes = HERE / "triton_compile.py", (capability, dtype, dim, block, parts)
    found = run_script(tmp_path, "-W", "error", script, *sizes)
    kernels = [json.loads(line) for line in found.splitlines()]
    names = ["split", "forward", "split", "query_grad", "key_grad"]
    names += ["extra_grad"] if parts == "all" else []
    assert [k["kernel"] for k in kernels] == names
    kib = {80: 163, 86: 99, 90: 227}[capability]
    for kernel in kernels:
        assert kernel["shared"] <= kib * 1024, kernel
        # Tiles that don't fit the registers take 6 to 18 KiB; the loops over MIXED
        # blocks are allowed some.
        assert kernel["stack"] <= 2048, kernel
        if kernel["kernel"] == "split":
            continue
        half = dtype != "float32"
        assert kernel["asynchronous copies"] or kernel["num_stages"] == 1, kernel
        assert kernel["wgmma"] == (half and capability == 90 and block >= 64), kernel


@pytest.mark.fast
@needs_triton
def test_compiles_for_hopper(tmp_path):
    check_compiled(tmp_path, 90, "bfloat16", 64, 64, "all")


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize(
    ("capability", "dtype", "dim", "block", "parts"),
    [
        (90, "float16", 64, 128, "causal"),
        (90, "bfloat16", 128, 64, "causal"),
        (90, "bfloat16", 128, 128, "causal"),
        (90, "bfloat16", 256, 64, "causal"),
        (90, "float32", 64, 64, "causal"),
        (90, "float32", 256, 64, "causal"),
        (80, "bfloat16", 64, 64, "all"),
        (80, "float16", 256, 64, "causal"),
        (86, "bfloat16", 128, 64, "causal"),
        (86, "float16", 256, 64, "causal"),
    ],
)
def test_compiles_for_gpus(tmp_path, capability, dtype, dim, block, parts):
    check_compiled(tmp_path, capability, dtype, dim, block, parts)


@pytest.mark.fast
def test_import_and_cpu_tensors_leave_triton_alone(tmp_path):
    code = """
import sys, torch
before = "triton" in sys.modules
import kernel_pytorch.attention as a
q = torch.zeros(1, 1, 32, 8, requires_grad=True)
index = a.BlockIndex.from_block_mask(torch.ones(1, 1, 2, 2) > 0, 16, 32, 32)
a.block_sparse_attention(q, q, q, index).sum().backward()
print(before, "triton" in sys.modules)
"""
    before, after = run_script(tmp_path, "-c", code).split()
    assert before == after


@pytest.mark.fast
def test_one_warning_says_why_triton_does_not_run(monkeypatch):
    """As on a CUDA machine without triton; the numbers come from the reference."""
    monkeypatch.setattr(block_sparse, "_fits_triton", triton_launch.fits)
    monkeypatch.setattr(block_sparse, "_warned_of_triton", False)
    monkeypatch.setattr(block_sparse, "_fits", lambda *_: False)
    monkeypatch.setattr(triton_launch, "unavailable", lambda _: "no such module")
    q = torch.randn(1, 1, 32, 8)
    index = BlockIndex.from_block_mask(torch.ones(1, 1, 2, 2) > 0, 16, 32, 32)
    assert block_sparse.kernel_for(q, index) == "reference"
    with pytest.warns(RuntimeWarning, match="without its Triton kernels: no such"):
        out = block_sparse_attention(q, q, q, index)
    dense = torch.nn.functional.scaled_dot_product_attention(q, q, q)
    assert (out - dense).abs().max() < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        block_sparse_attention(q, q, q, index)


@pytest.mark.fast
def test_what_the_kernels_take():
    def fits(shape, dtype=torch.float16, kv_len=100, block=64, bias=False):
        return triton_launch.fits(
            torch.empty(shape, dtype=dtype, device="meta"), kv_len, block, bias
        )

    assert fits((2, 4, 100, 64))
    assert fits((1, 8, 2**20, 256), torch.float32, 2**20, 16)
    assert not fits((2, 4, 100, 257))
    assert not fits((2, 4, 100, 64), torch.float64)
    assert not fits((2, 4, 100, 64), block=24)
    assert not fits((2, 4, 100, 64), block=272)
    assert not fits((2, 4, 100, 64), bias=True)
    assert not fits((1, 1, 2**30, 64))
    assert not fits((2**12, 2**12, 2**10, 64))


@pytest.fixture
def cuda():
    with torch.device("cuda"):
        yield


@pytest.mark.gpu
@pytest.mark.parametrize("name", triton_cases.CASES)
def test_cuda_cases(cuda, name):
    triton_cases.CASES[name]()


@pytest.mark.gpu
@pytest.mark.parametrize("number", range(40))
def test_cuda_random(cuda, number):
    triton_cases.random_case(number)


KINDS = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("name", triton_cases.masks(1, 1))
def test_cuda_masks(cuda, dtype, name):
    for remainder in (False, True):
        sizes, mask = (4, 2, 300, 333, 64), triton_cases.masks(300, 333)[name]
        triton_cases.check(dtype, sizes, (64, 0.6, 1), mask, 2, remainder=remainder)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("dim", [24, 64, 96, 128, 256])
@pytest.mark.parametrize("block", [16, 64, 128, 256])
def test_cuda_tiles(cuda, dtype, dim, block):
    mask = MaskSpec(causal=True)
    sizes = (2, 1, 2 * block + 7, 3 * block - 5, dim)
    triton_cases.check(dtype, sizes, (block, 0.8, 1), mask, remainder=True)


def long_inputs(dtype, length=4096, dim=64):
    q = torch.randn(2, 4, length, dim).to(dtype)
    k, v = (torch.randn(2, 2, length, dim).to(dtype) for _ in range(2))
    return [t.requires_grad_() for t in (q, k, v)]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", KINDS)
@pytest.mark.parametrize("pattern", SparsePattern)
def test_cuda_patterns(cuda, dtype, pattern):
    """Every pattern at 4096 tokens, causal; float64 with the index's own mask."""
    tensors, mask = long_inputs(dtype), MaskSpec(causal=True)
    q, k, _ = tensors
    index = build_block_index(q.detach(), k.detach(), pattern, mask=mask)
    assert block_sparse.kernel_for(q, index, mask) == "triton"
    out = block_sparse_attention(*tensors, index, mask)
    wide = [t.detach().double().requires_grad_() for t in tensors]
    seen = index.dense_mask() & torch.ones(4096, 4096).tril().bool()
    repeated = [wide[0], *(t.repeat_interleave(2, 1) for t in wide[1:])]
    scores = repeated[0] @ repeated[1].transpose(2, 3) / 8
    weights = scores.masked_fill(~seen, -math.inf).softmax(-1)
    wanted = weights.nan_to_num(0.0) @ repeated[2]
    slope = torch.randn_like(out)
    found = [out, *torch.autograd.grad((out * slope).sum(), tensors)]
    right = [wanted, *torch.autograd.grad((wanted * slope).sum(), wide)]
    rtol = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    for a, b in zip(found, right, strict=True):
        triton_cases.shared.close(a, b, rtol)


@pytest.mark.gpu
def test_cuda_same_bits_twice(cuda):
    tensors = long_inputs(torch.bfloat16)
    index = build_block_index(*tensors[:2], SparsePattern.RANDOM)
    runs = []
    for _ in range(2):
        out = block_sparse_attention(*tensors, index)
        runs.append([out, *torch.autograd.grad(out.float().square().sum(), tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.gpu
def test_cuda_graph(cuda):
    """Captured, because nothing waits for the device then; replayed on new values."""
    q, k, v = (t.detach() for t in long_inputs(torch.float16))
    index = build_block_index(q, k, SparsePattern.LOCAL_GLOBAL)
    block_sparse_attention(q, k, v, index)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = block_sparse_attention(q, k, v, index)
    q.normal_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(out, block_sparse_attention(q, k, v, index))


@pytest.mark.gpu
def test_cuda_beyond_32_bits(cuda):
    """The last head of tensors with more than 2^31 elements."""
    if torch.cuda.mem_get_info()[0] < 40 * 2**30:
        pytest.skip("less than 40 GiB of free GPU memory")
    heads, length, dim = 17, 2**19 + 64, 256
    q, k, v = (
        torch.randn(1, heads, length, dim, dtype=torch.bfloat16) for _ in range(3)
    )
    tiles = -(-length // 64)
    lists = torch.arange(tiles, dtype=torch.int32).expand(1, heads, tiles)[..., None]
    counts = torch.ones(1, heads, tiles, dtype=torch.int32)
    index = BlockIndex(counts, lists.contiguous(), 64, length, length)
    with torch.no_grad():
        out = block_sparse_attention(q, k, v, index)
    tail = [t[:, -1:, -64:].double() for t in (q, k, v)]
    wanted = torch.nn.functional.scaled_dot_product_attention(*tail)
    triton_cases.shared.close(out[:, -1:, -64:], wanted, 2e-2)
