# SPDX-License-Identifier: Apache-2.0
"""Timings against a clock whose hands the test moves."""

import contextlib
import gc
import json
import os
import socket
import time

import pytest
import torch

from torchworks_core import bench
from torchworks_core.errors import InvalidValue


class FakeClock:
    def __init__(self):
        self.now = 0.0
        self.log = []

    def __call__(self):
        return self.now

    def takes(self, name, seconds):
        durations = iter(seconds) if hasattr(seconds, "__iter__") else None

        def call():
            self.log.append(name)
            self.now += next(durations) if durations else seconds

        return call


@pytest.mark.critical
def test_known_ratio():
    clock = FakeClock()
    found = bench.compare(clock.takes("a", 0.25), clock.takes("b", 0.5), clock=clock)
    assert found.a_median == pytest.approx(0.25)
    assert found.b_median == pytest.approx(0.5)
    assert found.ratio == found.low == found.high == pytest.approx(0.5)


def test_drift_cancels_in_paired_ratios():
    clock = FakeClock()
    slower = [1.1**n for n in range(15)]
    a = clock.takes("a", [2 * s for s in slower])
    b = clock.takes("b", slower)
    found = bench.compare(a, b, warmup=0, clock=clock)
    assert found.ratio == pytest.approx(2)
    assert (found.low, found.high) == pytest.approx((2, 2))


def test_sides_take_turns_at_going_first():
    clock = FakeClock()
    bench.compare(
        clock.takes("a", 1), clock.takes("b", 1), repeats=3, warmup=1, clock=clock
    )
    assert "".join(clock.log) in ("abbaabba", "baabbaab")


def test_interval_is_between_the_right_order_statistics():
    clock = FakeClock()
    ratios = [9, 1, 8, 2, 7, 3, 6, 4, 5, 10, 15, 11, 14, 12, 13]
    found = bench.compare(
        clock.takes("a", ratios), clock.takes("b", 1), warmup=0, clock=clock
    )
    # n = 15: P(B < 4) = 0.0176 for B ~ Bin(15, 1/2), so ranks 4 and 12.
    assert (found.low, found.ratio, found.high) == pytest.approx((4, 8, 12))
    assert found.coverage == pytest.approx(1 - 2 * 576 / 2**15)


@pytest.mark.parametrize("count", range(1, 60))
def test_coverage_holds_and_is_not_wasted(count):
    rank, coverage = bench._ranks(count)
    assert 0 <= rank < (count + 1) / 2
    assert coverage >= 0.95 or (count < 6 and rank == 0)
    assert 0 <= coverage <= 1


def test_measure_divides_by_calls_and_drops_the_warmup():
    clock = FakeClock()
    times = [100, 100, 1, 2, 3, 4, 5, 6, 7, 8]
    found = bench.measure(
        clock.takes("a", times), repeats=4, warmup=1, calls=2, clock=clock
    )
    assert found.times == (1.5, 3.5, 5.5, 7.5)
    assert found.median == 4.5
    assert found.low <= found.median <= found.high


@pytest.mark.parametrize(
    "options", [{"repeats": 0}, {"calls": 0}, {"warmup": -1}, {"clock": "sun"}]
)
def test_bad_options(options):
    with pytest.raises(InvalidValue):
        bench.measure(lambda: None, **options)


def test_no_time_seen():
    with pytest.raises(InvalidValue, match="calls"):
        bench.compare(lambda: None, lambda: None, clock=lambda: 0.0)


def test_garbage_collection_comes_back_after_an_error():
    def fail():
        assert not gc.isenabled()
        raise KeyError

    with pytest.raises(KeyError):
        bench.measure(fail)
    assert gc.isenabled()


def test_real_clock_sees_a_coarse_ratio():
    found = bench.compare(
        lambda: time.sleep(0.008), lambda: time.sleep(0.002), repeats=7, warmup=1
    )
    assert 1.5 < found.ratio < 8


def test_process_clock_does_not_count_sleep():
    found = bench.measure(
        lambda: time.sleep(0.02), repeats=3, warmup=0, clock="process"
    )
    assert found.median < 0.01


@pytest.mark.gpu
def test_cuda_events():
    x = torch.ones(2048, 2048, device="cuda")
    found = bench.measure(lambda: x @ x, device="cuda")
    assert 0 < found.median < 1


def test_cuda_events_are_used_without_a_gpu(monkeypatch):
    class Event:
        def __init__(self, enable_timing):
            assert enable_timing

        def record(self):
            calls.append("record")

        def synchronize(self):
            calls.append("synchronize")

        def elapsed_time(self, other):
            return 250.0

    calls = []
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "device", contextlib.nullcontext)
    found = bench.measure(
        lambda: calls.append("run"), repeats=1, warmup=0, calls=2, device="cuda:0"
    )
    assert found.median == 0.125
    assert calls == ["record", "run", "run", "record", "synchronize"]


def test_machine_tells_no_host_name_and_no_path():
    text = json.dumps(bench.machine())
    assert bench.machine()["torch"] == torch.__version__
    assert bench.machine()["cores"] >= 1
    assert socket.gethostname() not in text or len(socket.gethostname()) < 4
    assert os.path.expanduser("~") not in text
    assert os.getcwd() not in text
