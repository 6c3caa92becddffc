# SPDX-License-Identifier: Apache-2.0
"""Ring attention over four gloo processes, against one device in float64."""

import json
import sys
import threading
from pathlib import Path
from weakref import WeakSet

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from hypothesis import given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).parent))

import ring_cases
from reference import dense_attention, mask_parts

from kernel_pytorch.attention import agreement
from kernel_pytorch.attention.masks import MaskSpec
from kernel_pytorch.attention.ring import ring_attention, ring_stats
from kernel_pytorch.attention.shards import ShardPlan

WORLDS = ("1", "2", "3", "4")
# Errors relative to the largest value. Inputs are the same numbers in the reference, so
# that bf16 leaves rounding of probabilities, and of results: half an eps each.
TOLERANCES = {"bf16": 2 * torch.finfo(torch.bfloat16).eps, "fp64": 1e-12}


def run_ranks(folder, work, exits):
    """Run ``work`` in one process for each rank; the report of each."""
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=work, args=(rank, str(folder)))
        for rank in range(ring_cases.RANKS)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
        if process.is_alive():
            process.kill()
    assert [p.exitcode for p in processes] == exits
    return [
        json.loads((folder / f"rank{rank}.json").read_text())
        for rank in range(ring_cases.RANKS)
    ]


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    """Run all ranks once; a report for each, with rank 2's from before its death."""
    folder = tmp_path_factory.mktemp("ring")
    ring_cases.prepare(folder)
    return run_ranks(folder, ring_cases.worker, [0, 0, 7, 0])


@pytest.mark.critical
@pytest.mark.parametrize("world", WORLDS)
def test_out_and_gradients(reports, world):
    errors = {
        (rank, name): error
        for rank, report in enumerate(reports)
        for name, error in report["errors"].items()
        if name.startswith(f"P{world}-")
    }
    assert len(errors) == int(world) * len(ring_cases.cases())
    wrong = {
        key: error
        for key, error in errors.items()
        if not error <= TOLERANCES.get(key[1].rsplit("-", 1)[1], 1e-5)
    }
    assert not wrong


@pytest.mark.critical
@pytest.mark.parametrize("world", WORLDS)
def test_work_is_balanced_and_bytes_are_what_must_travel(reports, world):
    n, p = 480, int(world)
    found = [r["stats"][world] for r in reports if world in r["stats"]]
    assert len(found) == p
    one_hop = 2 * 2 * (n // p) * 16 * 4  # K and V, two heads, fp32
    for stats in found:
        for passed in stats["causal"]:
            assert passed["pairs"] <= 1.01 * n * n / 2 / p
        for passed in stats["full"]:
            assert passed["pairs"] <= 1.01 * n * n / p
        assert stats["causal"][0]["bytes_sent"] == (p - 1) * one_hop
        gradients_home = p * one_hop if p > 1 else 0
        there_and_back = (p - 1) * one_hop + gradients_home
        assert stats["causal"][1]["bytes_sent"] == there_and_back
    if p == 4:
        share = max(s["causal contiguous"][0]["pairs"] for s in found)
        assert share > 1.5 * n * n / 2 / p


@pytest.mark.critical
def test_hops_that_no_rank_needs_are_cut(reports):
    n, p = 480, 4
    hop = 2 * 2 * (n // p) * 16 * 4
    for report in reports:
        stats = report["stats"]["4"]
        assert stats["window"][0]["steps"] == 2
        assert stats["window"][0]["bytes_sent"] == hop
        assert stats["window zigzag"][0]["steps"] == 3
        assert stats["documents"][0]["steps"] == 1
        assert stats["documents"][0]["bytes_sent"] == 0
        assert stats["documents"][1]["bytes_sent"] == 0
        assert stats["documents"][0]["pairs"] <= (n // p) ** 2


@pytest.mark.critical
@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("causal", "disagree on causal: rank 0 has False, rank 1 has True"),
        ("window", "disagree on window: rank 0 has 6, rank 1 has 5"),
        ("layout", "disagree on layout: rank 0 has zigzag, rank 1 has contiguous"),
        ("bad layout", "rank 1: InvalidValue: layout='spiral'"),
        ("scale", "disagree on scale: rank 0 has 0.25, rank 1 has 0.5"),
        ("check", "disagree on check: rank 0 has None, rank 1 has always"),
        ("bad check", "rank 0: InvalidValue: check='allways'"),
        ("dtype", "disagree on dtype: rank 0 has float32, rank 1 has float64"),
        ("rank of q", "rank 1: InvalidValue: q (2, 4, 8)"),
        ("batch", "disagree on batch: rank 0 has 1, rank 1 has 2"),
        ("not a tensor", "rank 1: AttributeError"),
        ("total_length", "disagree on total_length: rank 0 has 16, rank 1 has 15"),
        ("gradient", "disagree on needs_gradient: rank 0 has False, rank 1 has True"),
        ("padding", "disagree on key_padding: rank 0 has None, rank 1 has torch.bool"),
        ("short padding", "rank 1: InvalidValue: key_padding of shape (1, 3)"),
        ("documents", "documents: rank 0 has torch.int32, rank 1 has torch.int64"),
        ("too large", "InvalidValue: rank 1: "),
        ("bias with grad", "NotImplementedError: mask.bias"),
    ],
)
def test_ranks_that_disagree_raise_the_same_error(reports, name, told):
    messages = {report["disagreements"][name] for report in reports}
    assert len(messages) == 1
    message = messages.pop()
    assert told in message
    assert message.startswith(("InvalidValue", "NotImplementedError"))


@pytest.mark.critical
@pytest.mark.parametrize("world", WORLDS)
def test_a_layer_over_ranks_has_one_devices_gradients(reports, world):
    errors = [r["layer"][world] for r in reports if world in r["layer"]]
    assert len(errors) == int(world)
    assert max(errors) <= 1e-5


@pytest.fixture(scope="module")
def long_reports(tmp_path_factory):
    """Run all ranks with 4096 tokens, then stop one of them; a report for each."""
    folder = tmp_path_factory.mktemp("long")
    ring_cases.prepare_long(folder)
    return run_ranks(folder, ring_cases.long_worker, [0, 0, 0, 0])


@pytest.mark.slow
@pytest.mark.parametrize("world", WORLDS)
def test_long_sequences(long_reports, world):
    errors = [report[world] for report in long_reports if world in report]
    assert len(errors) == int(world)
    assert {tuple(error) for error in errors} == {ring_cases.LONGEST_KINDS}
    assert max(max(error.values()) for error in errors) <= 1e-5


@pytest.mark.slow
def test_a_stopped_rank_makes_the_others_raise_in_time(long_reports):
    found = [report["stall"] for report in long_reports]
    waiting = [found[rank] for rank in (0, 1, 3)]
    for told, seconds in waiting:
        assert told.startswith("RuntimeError")
        assert seconds < ring_cases.STALL + 20
    assert any("timed out" in told.lower() for told, _ in waiting)
    assert max(seconds for _, seconds in waiting) >= ring_cases.STALL - 1


@pytest.mark.critical
def test_a_layer_refuses_on_all_ranks_alike(reports):
    for told in zip(*(report["refusals"] for report in reports), strict=True):
        assert len(set(told)) == 1
    lengths, size, mask = reports[0]["refusals"]
    assert "disagree on tokens: rank 0 has 9, rank 1 has 10" in lengths
    assert "context_parallel_size=5: the process group has 4 ranks" in size
    assert "rank 1: InvalidValue: attention_mask (1, 8)" in mask


@pytest.mark.critical
def test_a_dead_rank_makes_the_others_raise(reports):
    for rank in (0, 1, 3):
        told, seconds = reports[rank]["death"]
        assert told != "nothing raised"
        assert seconds < ring_cases.TIMEOUT + 10
    assert "death" not in reports[2]


@pytest.mark.fast
@settings(max_examples=60, deadline=None)
@given(
    world=st.integers(1, 6),
    total=st.integers(1, 60),
    layout=st.sampled_from(["zigzag", "contiguous"]),
    causal=st.booleans(),
    window=st.none() | st.integers(1, 30),
)
def test_cut_steps_are_those_that_nobody_needs(world, total, layout, causal, window):
    def owner(position):
        """Zigzag: of 2 P pieces, rank r has the r-th from either end."""
        if layout == "contiguous":
            return position // -(-total // world)
        piece = position // -(-total // (2 * world))
        return min(piece, 2 * world - 1 - piece)

    plan = ShardPlan(causal, window, world, total, layout, 1.0)
    needed = {0}
    for i in range(total):
        for j in range(total):
            near = window is None or abs(i - j) < window
            if near and (not causal or i >= j):
                needed.add((owner(i) - owner(j)) % world)
    assert set(plan.steps()) == needed
    everything = [i for r in range(world) for _, part in plan.parts(r) for i in part]
    assert sorted(everything) == list(range(total))


@pytest.mark.fast
@pytest.mark.parametrize("kind", list(mask_parts(1, 1, 8)))
def test_no_group_is_one_device(kind):
    mask = MaskSpec(**mask_parts(2, 2, 30)[kind])
    q, k, v = (torch.randn(2, 2, 30, 8) for _ in range(3))
    out = ring_attention(q, k, v, mask, group=None)
    wanted, _ = dense_attention(q, k, v, mask)
    torch.testing.assert_close(out.double(), wanted, rtol=1e-5, atol=1e-5)
    assert (ring_stats().steps, ring_stats().bytes_sent) == (1, 0)


@pytest.mark.fast
def test_stats_are_those_of_the_thread_that_ran_forward():
    q = torch.randn(1, 1, 16, 8, requires_grad=True)
    out = ring_attention(q, q, q, group=None)
    other = torch.randn(1, 1, 4, 8, requires_grad=True)
    lengths = []

    def work():
        found = ring_attention(other, other, other, group=None)
        lengths.append(ring_stats().total_length)
        out.sum().backward()
        lengths.append(ring_stats().total_length)
        found.sum().backward()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert lengths == [4, 4]
    assert (ring_stats().total_length, ring_stats().pairs) == (16, 16 * 16)


@pytest.mark.fast
def test_a_new_group_of_an_old_name_is_asked_again(monkeypatch):
    asked, agreed, names = [], WeakSet(), set()
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    monkeypatch.setattr(agreement, "agree", lambda *_: asked.append(1))
    monkeypatch.setattr(agreement.dist, "get_backend", lambda _: "nccl")
    for expected in (1, 2):
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        try:
            names.add(dist.group.WORLD.group_name)
            for _ in range(2):
                agreement.agree_once(dist.group.WORLD, 2, (), dict, agreed)
                assert len(asked) == expected
            if expected == 2:
                agreement.agree_once(dist.group.WORLD, 2, (), dict, agreed, True)
        finally:
            dist.destroy_process_group()
    assert (len(names), len(asked)) == (1, 3)


@pytest.mark.fast
def test_one_device_errors():
    q = torch.randn(1, 2, 5, 8)
    with pytest.raises(ValueError, match="even length"):
        ring_attention(q, q, q, group=None)
    with pytest.raises(ValueError, match="layout='spiral'"):
        ring_attention(q, q, q, group=None, layout="spiral")
    with pytest.raises(ValueError, match="check='allways'"):
        ring_attention(q, q, q, group=None, check="allways")
    with pytest.raises(ValueError, match="make shards of 4"):
        ring_attention(q, q, q, group=None, total_length=4)
