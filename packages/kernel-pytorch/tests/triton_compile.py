# SPDX-License-Identifier: Apache-2.0
"""Compile the Triton kernels for a GPU that isn't there, and print what came of it.

``python triton_compile.py CAPABILITY DTYPE DIM BLOCK PARTS``, for example ``90 bfloat16
64 64 causal``, or ``all`` for every part of a mask and the remainder: one line of JSON
for each kernel. What the launcher passes on, types included, is what it passes on a
GPU; only the launch itself is left out.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends import nvidia
from triton.backends.compiler import GPUTarget

from kernel_pytorch.attention import triton_gradients, triton_kernels, triton_launch
from kernel_pytorch.attention.block_reference import Problem

KIB = {80: 163, 86: 99, 90: 227}


class Driver:
    """As much of a driver as the compiler asks for."""

    def __init__(self, capability):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=None):
        return 0


def compile_only(name, programs, tensors, rest, options):
    module = triton_gradients if name.endswith("grad") else triton_kernels
    kernel = getattr(module, f"{name}_kernel")
    done = kernel.warmup(*tensors, *rest, grid=(programs,), **options)
    found = {"kernel": name, "shared": done.metadata.shared, **resources(done)}
    ptx = done.asm["ptx"]
    found["wgmma"] = "wgmma.mma_async" in ptx
    found["asynchronous copies"] = "cp.async" in ptx
    print(json.dumps(found | options), flush=True)


def resources(compiled):
    """Registers and bytes on the stack of each thread, by the toolkit's own tool."""
    tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(tool), "--dump-resource-usage", file.name]
        run = subprocess.run(command, capture_output=True, text=True, check=True)
    found = dict(re.findall(r"(REG|STACK):(\d+)", run.stdout))
    return {"registers": int(found["REG"]), "stack": int(found["STACK"])}


def problem(dtype, dim, block, everything):
    """Two entries of 4 heads, 2 of them of keys; strides as after a projection."""
    length = 4 * block + 5
    q = torch.zeros(2, length, 4, dim, dtype=dtype).transpose(1, 2)
    k = torch.zeros(2, length, 2, dim, dtype=dtype).transpose(1, 2)
    counts = torch.zeros(1, 4, 5, dtype=torch.int32)
    padding = documents = extra = None
    if everything:
        padding = torch.ones(2, length, dtype=torch.bool)
        documents = torch.zeros(2, length, dtype=torch.int64)
        extra = torch.zeros(2, 2, 5, dim, dtype=dtype)
    lists = (counts, torch.zeros(1, 4, 5, 3, dtype=torch.int32))
    masks = (padding, documents, None, extra, extra, block, True)
    return Problem(q, k, k, *lists, *masks, 40 if everything else 0, dim**-0.5)


def main():
    capability, kind, dim, block, parts = sys.argv[1:]
    triton.runtime.driver.set_active(Driver(int(capability)))
    triton_launch._launch = compile_only
    triton_launch._shared_memory = lambda device: KIB[int(capability)] * 1024
    p = problem(getattr(torch, kind), int(dim), int(block), parts == "all")
    out, lse = triton_launch.forward(p)
    triton_launch.backward(p, out, lse, out, lse)


if __name__ == "__main__":
    main()
