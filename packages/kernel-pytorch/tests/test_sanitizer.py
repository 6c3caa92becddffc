# SPDX-License-Identifier: Apache-2.0
"""The C kernel under AddressSanitizer: random shapes, masks and hostile lists."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent

FUZZ = """
import sys
from pathlib import Path
import torch
from kernel_pytorch.attention import native
from kernel_pytorch.attention.block_index import BlockIndex
from kernel_pytorch.attention.block_sparse import block_sparse_attention, kernel_for
from kernel_pytorch.attention.masks import MaskSpec
from kernel_pytorch.attention.native_selection import fits
from kernel_pytorch.attention.selection import select_blocks

native.FOLDER = Path(sys.argv[1])
torch.set_num_threads(2)
torch.manual_seed(int(sys.argv[2]))
assert native.native_status().available, native.native_status().reason


def pick(*choices):
    return choices[int(torch.randint(len(choices), ()))]


def case():
    kv_heads, size = pick(1, 2), pick(16, 32, 48, 64, 128)
    heads, batch = kv_heads * pick(1, 2, 3), pick(1, 2)
    q_len, kv_len = (int(torch.randint(1, pick(20, 200), ())) for _ in range(2))
    dim, kind = pick(1, 3, 8, 17, 64, 80, 129, 256), pick(torch.float32, torch.bfloat16)
    q = torch.randn(batch, heads, q_len, dim).to(kind).requires_grad_()
    k, v = (torch.randn(batch, kv_heads, kv_len, dim).to(kind) for _ in range(2))
    k, v = k.requires_grad_(), v.requires_grad_()
    rows, columns = -(-q_len // size), -(-kv_len // size)
    kept = torch.rand(pick(1, batch), heads, rows, columns) < pick(0.0, 0.4, 1.0)
    index = BlockIndex.from_block_mask(kept, size, q_len, kv_len)
    ids = torch.randint(0, 3, (batch, max(q_len, kv_len))).sort(1).values
    mask = MaskSpec(
        causal=pick(True, False),
        window=pick(None, 1, 7, 90),
        key_padding=pick(None, torch.rand(batch, kv_len) < 0.7),
        documents=pick(None, ids),
    )
    assert kernel_for(q, index, mask).startswith("native")
    return (q, k, v), index, mask


def choose(q, k, index, mask):
    # Strided tensors and ones with NaN as well.
    q, k, size = q.detach().clone(), k.detach(), index.block_size
    assert fits(q, k, mask, size)
    if pick(True, False):
        q = q.transpose(1, 2).contiguous().transpose(1, 2)
    if pick(True, False, False):
        row = int(torch.randint(q.shape[2], ()))
        q[:, :, row] = pick(float("nan"), float("inf"))
    gate = torch.randn(*q.shape[:2], index.q_blocks, index.kv_blocks)
    select_blocks(
        q,
        k,
        mask,
        block_size=size,
        sparsity_ratio=pick(0.0, 0.5, 0.95),
        coverage=pick(None, 0.5, 1.0),
        block_logits=pick(None, gate),
        remainder=pick(True, False),
    ).index.validate()


for _ in range(int(sys.argv[3])):
    tensors, index, mask = case()
    choose(*tensors[:2], index, mask)
    rest = pick(True, False)
    out = block_sparse_attention(*tensors, index, mask, remainder=rest)
    torch.autograd.grad(out.sum(), tensors)

refused = 0
for _ in range(int(sys.argv[3])):
    tensors, index, mask = case()
    part = pick(index.counts, index.blocks)
    if not part.numel():
        continue
    place = int(torch.randint(part.numel(), ()))
    part.view(-1)[place] = pick(-1, 1, 7, 10**6, -(2**31), 2**31 - 1)
    try:
        out = block_sparse_attention(*tensors, index, mask)
        torch.autograd.grad(out.sum(), tensors)
    except ValueError:
        refused += 1
assert refused > 3, refused

if sys.argv[4:] == ["overrun in choosing"]:
    real = torch.Tensor.new_zeros
    torch.Tensor.new_zeros = lambda t, *s, **o: real(t, 1, 1, 1, s[-1], **o)
    torch.ops.kernel_pytorch.select_blocks(
        *torch.randn(2, 1, 1, 640, 16), None, None, None, 16, False, 0, 0.5, 0.0, False
    )
if sys.argv[4:] == ["overrun"]:
    q, k, v = torch.randn(3, 1, 1, 64, 16)
    kept = torch.ones(1, 1, 4, 4, dtype=torch.bool)
    index = BlockIndex.from_block_mask(kept, 16, 64, 64)
    torch.empty = lambda *a, **o: torch.ones(4)
    block_sparse_attention(q, k, v, index)
print("clean", refused)
"""


def library(compiler, name):
    ask = [*compiler, f"-print-file-name={name}"]
    return subprocess.run(ask, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """A library with the sanitizer, and the environment to load it."""
    pytest.importorskip("hatchling", reason="the build script needs hatchling")
    script = PACKAGE / "hatch_build.py"
    if not script.exists():
        pytest.skip("not in a source tree")
    spec = importlib.util.spec_from_file_location("hatch_build", script)
    hatch_build = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(hatch_build)
    compiler = hatch_build.find_compiler()
    if not compiler:
        pytest.skip("no C compiler")
    # Without libstdc++ beside it, libasan can't pass on torch's C++ exceptions.
    preload = [library(compiler, name) for name in ("libasan.so", "libstdc++.so.6")]
    if not all(map(os.path.isabs, preload)):
        pytest.skip(f"the compiler has no libasan: {preload}")
    folder = tmp_path_factory.mktemp("asan")
    flags = ("-O1", "-g1", "-fsanitize=address", "-fno-omit-frame-pointer")
    source = hatch_build.sources(PACKAGE)
    record = hatch_build.compile_library(source, folder, flags)
    assert record["reason"] == ""
    environment = {
        **os.environ,
        "LD_PRELOAD": " ".join(preload),
        "OMP_NUM_THREADS": "2",
    }
    environment["ASAN_OPTIONS"] = "detect_leaks=0"
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    return folder, environment


def fuzz(build, isa, *arguments):
    folder, environment = build
    command = [sys.executable, "-c", FUZZ, str(folder), *map(str, arguments)]
    environment = environment | {"KP_ISA": isa}
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("isa", ["generic", "avx2", "avx512"])
def test_no_access_outside_the_tensors(build, isa):
    run = fuzz(build, isa, 1, 40)
    if "which this machine has" in run.stderr:
        pytest.skip(f"this machine has no {isa}")
    assert run.returncode == 0, run.stdout + run.stderr[:3000]
    assert "clean" in run.stdout


@pytest.mark.slow
@pytest.mark.parametrize("where", ["overrun", "overrun in choosing"])
def test_the_sanitizer_sees_an_overrun(build, where):
    """Else the tests above would prove nothing."""
    run = fuzz(build, "", 2, 10, where)
    assert run.returncode != 0
    # What lies beyond the end may be memory that was given back.
    assert "AddressSanitizer: heap-" in run.stderr, run.stderr[-2000:]
