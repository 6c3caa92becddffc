# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""PyTorch's OpInfo database on the device; `opinfo_sweep.py` says how.

``python packages/mycelya-torch/tests/test_opinfo.py --report [MODE ...]`` prints the
counts of some modes, or of all.
"""

import argparse
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))

import opinfo_sweep
from opinfo_differences import DIFFERENCES

CHUNKS = 4
SIXTY = """
    abs add addmm argmax as_strided bernoulli bmm cat clamp clone cumsum
    div.no_rounding_mode dot einsum eq exp expand fft.fft flip gather index_add
    index_put index_select linalg.cholesky linalg.qr linalg.solve log_softmax
    logsumexp masked_fill masked_select matmul max.reduction_with_dim mean mm mul
    nn.functional.batch_norm nn.functional.conv2d nn.functional.cross_entropy
    nn.functional.dropout nn.functional.embedding nn.functional.gelu
    nn.functional.group_norm nn.functional.interpolate.bilinear
    nn.functional.layer_norm nn.functional.linear nn.functional.max_pool2d
    nn.functional.mse_loss nn.functional.relu
    nn.functional.scaled_dot_product_attention nonzero normal permute scatter_add
    softmax sort split sum topk unique where
"""


class Broken:
    """Stands for an entry whose function gives other numbers on the device."""

    full_name, decorators = "broken", ()

    def __init__(self, change):
        self.change = change

    def supported_dtypes(self, device):
        return {torch.float32}

    def sample_inputs(self, device, dtype, requires_grad):
        from torch.testing._internal.opinfo.core import SampleInput

        yield SampleInput(torch.ones(3, dtype=dtype))

    def __call__(self, tensor):
        return self.change(tensor) if tensor.is_mycelya else tensor + 1


def start():
    from mycelya_torch import RemoteMachine

    return RemoteMachine("local")


@pytest.fixture(scope="module")
def sweep():
    made = opinfo_sweep.Sweep(start)
    yield made
    made.stop()


def problems(sweep, ops, mode, table=None):
    """Run entries; return what the table of differences doesn't say."""
    listed = DIFFERENCES.get(table or mode.name, {})
    found = []
    for op in ops:
        result = sweep.run(op, mode)
        if result.outcome == "crash":
            found.append(f"{result.name} kills the worker: {result.reason}")
        elif result.outcome == "differs" and result.name not in listed:
            found.append(f"{result.name}: {result.reason}")
        elif result.outcome != "differs" and result.name in listed:
            found.append(f"{result.name} is as on the CPU now: take it off the table")
    return found


def test_the_table_has_reasons():
    assert set(DIFFERENCES) <= {*opinfo_sweep.MODES, "cuda", "foreach", "mock"}
    for table in DIFFERENCES.values():
        assert all(len(reason) > 20 for reason in table.values())
    known = {op.full_name for op in opinfo_sweep.entries()}
    assert len(set(SIXTY.split()) & known) == len(SIXTY.split()) == 60


@pytest.mark.critical
@pytest.mark.parametrize(
    "change",
    [
        lambda x: x + 2,
        lambda x: (x + 1).double(),
        lambda x: (x + 1)[:2],
        lambda x: torch.zeros(3) / x.tolist()[7],
        lambda x: (x + 1).conj().mul(-1).neg_().logical_not(),
    ],
)
def test_the_sweep_sees_a_difference(sweep, change):
    mode = opinfo_sweep.MODES["float32"]
    assert problems(sweep, [Broken(lambda x: x + 1)], mode) == []
    assert len(problems(sweep, [Broken(change)], mode)) == 1


def test_the_sweep_survives_a_dead_worker(sweep):
    def kill(tensor):
        import os
        import signal

        os.kill(sweep.machine.worker_pid, signal.SIGKILL)
        return tensor + 1

    former, mode = sweep.machine, opinfo_sweep.MODES["float32"]
    sweep.machine.synchronize()
    assert "kills the worker" in problems(sweep, [Broken(kill)], mode)[0]
    assert sweep.machine is not former
    assert problems(sweep, [Broken(lambda x: x + 1)], mode) == []


@pytest.mark.critical
@pytest.mark.parametrize("chunk", range(2))
def test_critical_entries(sweep, chunk):
    by_name = {op.full_name: op for op in opinfo_sweep.entries()}
    ops = [by_name[name] for name in SIXTY.split()[chunk::2] if name in by_name]
    assert problems(sweep, ops, opinfo_sweep.MODES["float32"]) == []


@pytest.mark.fast
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_forward(sweep, chunk):
    ops = opinfo_sweep.entries()[chunk::CHUNKS]
    assert problems(sweep, ops, opinfo_sweep.MODES["float32"]) == []


@pytest.mark.slow
@pytest.mark.parametrize("chunk", range(2))
@pytest.mark.parametrize("name", [m for m in opinfo_sweep.MODES if m != "float32"])
def test_other_modes(sweep, name, chunk):
    ops = opinfo_sweep.entries()[chunk::2]
    assert problems(sweep, ops, opinfo_sweep.MODES[name]) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", ["float32", "int64", "complex64", "warm", "in-place"])
def test_lists_of_tensors(sweep, name):
    ops = opinfo_sweep.foreach_entries()
    assert len(ops) > 40
    assert problems(sweep, ops, opinfo_sweep.MODES[name], "foreach") == []


@pytest.mark.slow
def test_forward_on_mock():
    """A mock machine shares this process's generator where an operation takes none.

    So native_dropout draws at some later time, from a generator that this thread
    seeds and restores meanwhile: what uses it is left out.
    """
    from mycelya_torch import RemoteMachine

    sweep = opinfo_sweep.Sweep(lambda: RemoteMachine("mock"))
    dropout = ("dropout", "scaled_dot_product_attention", "multi_head_attention")
    try:
        ops = [
            op
            for op in opinfo_sweep.entries()
            if not any(name in op.full_name for name in dropout)
        ]
        assert problems(sweep, ops, opinfo_sweep.MODES["float32"], "mock") == []
    finally:
        sweep.stop()


@pytest.mark.gpu
@pytest.mark.parametrize("chunk", range(CHUNKS))
def test_forward_on_cuda(chunk):
    """A CUDA worker against CUDA in this process."""
    sweep = opinfo_sweep.Sweep(start, "cuda")
    try:
        ops = opinfo_sweep.entries()[chunk::CHUNKS]
        assert problems(sweep, ops, opinfo_sweep.MODES["float32"], "cuda") == []
    finally:
        sweep.stop()


def report(names):
    """Print a table: how many entries of each mode came out how."""
    ops = opinfo_sweep.entries()
    sweep = opinfo_sweep.Sweep(start)
    columns = opinfo_sweep.OUTCOMES[1:]
    print(" | ".join(["mode", "samples", *columns, "seconds"]))
    texts = []
    for name in names:
        begin, counts, count = time.perf_counter(), Counter(), 0
        for op in ops:
            result = sweep.run(op, opinfo_sweep.MODES[name])
            counts[result.outcome] += 1
            count += result.samples
            if result.outcome in ("close", "differs", "crash"):
                listed = result.name in DIFFERENCES.get(name, {})
                note = f"{result.outcome}{' (listed)' if listed else ''}"
                texts.append(f"{name}, {result.name}: {note}: {result.reason}")
            if result.strides:
                texts.append(f"{name}, {result.name}: strides {result.strides}")
        seconds = f"{time.perf_counter() - begin:.0f}"
        row = [name, str(count), *(str(counts[key]) for key in columns), seconds]
        print(" | ".join(row), flush=True)
    print("", *texts, sep="\n")
    sweep.stop()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Count the entries, by mode.")
    parser.add_argument("--report", nargs="*", choices=list(opinfo_sweep.MODES))
    torch.set_num_threads(1)
    report(parser.parse_args().report or list(opinfo_sweep.MODES))
