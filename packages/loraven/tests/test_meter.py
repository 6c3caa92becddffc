# SPDX-License-Identifier: Apache-2.0
"""Counters through a fake NVML and a fake powercap folder: values and refusals."""

import inspect
import math
import os
import subprocess
import sys
import time
import types
from pathlib import Path
from typing import Any

import pytest
import torch

import loraven
from loraven import EnergyReading, EnergyUnavailableError, measure_energy, meter

RANGE = 262143328850


class Clock:
    """Seconds that pass only when a test says so."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(meter, "clock", found)
    return found


class Nvml(types.ModuleType):
    """As much of pynvml as is used, with one GPU."""

    class NVMLError(Exception):
        pass

    class NVMLError_NotSupported(NVMLError):
        pass

    def __init__(self) -> None:
        super().__init__("pynvml")
        self.opened = 0
        self.energy: Any = 5000
        self.mig: Any = None
        self.pids = [os.getpid()]
        self.refuse_init = False

    def nvmlInit(self) -> None:
        if self.refuse_init:
            raise self.NVMLError("NVML Shared Library Not Found")
        self.opened += 1

    def nvmlShutdown(self) -> None:
        self.opened -= 1

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> str:
        assert uuid == "GPU-1234"
        return "handle"

    def nvmlDeviceGetName(self, handle: str) -> bytes:
        return b"NVIDIA Fake"

    def nvmlDeviceGetMigMode(self, handle: str) -> list[int]:
        if self.mig is None:
            raise self.NVMLError_NotSupported("Not Supported")
        return self.mig

    def nvmlDeviceGetComputeRunningProcesses(self, handle: str) -> list[Any]:
        return [types.SimpleNamespace(pid=pid) for pid in self.pids]

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: str) -> int:
        if isinstance(self.energy, Exception):
            raise self.energy
        return self.energy


@pytest.fixture
def waits(monkeypatch) -> list[torch.device]:
    found: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "synchronize", found.append)
    return found


@pytest.fixture
def nvml(monkeypatch, clock, waits) -> Nvml:
    found = Nvml()
    monkeypatch.setitem(sys.modules, "pynvml", found)
    properties = types.SimpleNamespace(uuid="1234")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    return found


def measured(clock: Clock, source: Any, energy: Any, seconds: float) -> EnergyReading:
    with measure_energy("cuda") as reading:
        assert math.isnan(reading.joules)
        assert not reading.valid
        clock.now += seconds
        source.energy = energy
    return reading


def refused(reading: EnergyReading, reason: str) -> None:
    assert not reading.valid
    assert math.isnan(reading.joules)
    assert reason in reading.reason


def test_signature():
    found = inspect.signature(measure_energy).parameters.values()
    assert [(p.name, p.default) for p in found] == [("device", None)]
    names = ["joules", "seconds", "valid", "reason", "source"]
    assert list(inspect.signature(EnergyReading).parameters) == names


def test_nvml_reads_the_difference(nvml, clock, waits):
    reading = measured(clock, nvml, 5000 + 1_400_000, 2.0)
    expected = EnergyReading(1400.0, 2.0, True, "", "nvml:NVIDIA Fake")
    assert reading == expected
    assert nvml.opened == 0
    assert waits == [torch.device("cuda")] * 2


def test_nvml_short_window(nvml, clock):
    reading = measured(clock, nvml, 6000, 1.99)
    refused(reading, "shorter than 2 s")
    assert reading.seconds == pytest.approx(1.99)
    assert reading.source == "nvml:NVIDIA Fake"


@pytest.mark.parametrize(
    ("energy", "reason"), [(4999, "fell from 5000 to 4999"), (5000, "stood still")]
)
def test_nvml_wrapped_reset_or_dead_counter(nvml, clock, energy, reason):
    refused(measured(clock, nvml, energy, 3.0), reason)


def test_nvml_other_processes(nvml, clock, monkeypatch):
    nvml.pids = [os.getpid(), 1]
    refused(measured(clock, nvml, 9000, 3.0), "1 other process")
    nvml.pids = [1]
    refused(measured(clock, nvml, 19000, 3.0), "1 other process")
    # In a container our number is another one outside.
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    assert measured(clock, nvml, 29000, 3.0).joules == 10.0
    nvml.pids = [1, 2]
    refused(measured(clock, nvml, 39000, 3.0), "2 other process")
    nvml.pids = []
    assert measured(clock, nvml, 49000, 3.0).valid


def test_nvml_a_process_that_comes_during_the_window(nvml, clock):
    with measure_energy("cuda") as reading:
        clock.now += 5
        nvml.energy += 100
        nvml.pids.append(77)
    refused(reading, "1 other process")


def test_nvml_mig(nvml, clock):
    nvml.mig = [1, 1]
    refused(measured(clock, nvml, 9000, 3.0), "MIG")
    assert nvml.opened == 0
    nvml.mig = [0, 1]
    assert measured(clock, nvml, 12000, 3.0).valid


def test_nvml_without_driver_counter_or_package(nvml, clock, monkeypatch):
    nvml.refuse_init = True
    reading = measured(clock, nvml, 9000, 3.0)
    refused(reading, "Shared Library Not Found")
    assert (reading.source, reading.seconds) == ("none", 3.0)
    nvml.refuse_init = False
    nvml.energy = nvml.NVMLError_NotSupported("Not Supported")
    refused(measured(clock, nvml, 9000, 3.0), "Not Supported")
    assert nvml.opened == 0
    lost = nvml.NVMLError("GPU is lost")
    refused(measured(clock, nvml, lost, 3.0), "GPU is lost")
    assert nvml.opened == 0
    monkeypatch.setitem(sys.modules, "pynvml", None)
    refused(measured(clock, nvml, 9000, 3.0), "loraven[energy]")


def test_no_cuda_device(nvml, clock, monkeypatch):
    def missing(device: torch.device) -> None:
        raise RuntimeError("no CUDA GPUs are available\nmore")

    monkeypatch.setattr(torch.cuda, "get_device_properties", missing)
    reading = measured(clock, nvml, 9000, 3.0)
    refused(reading, "no CUDA GPUs are available")
    assert "more" not in reading.reason
    assert nvml.opened == 0


class Powercap:
    """A folder as Linux shows it, with two packages and the memory of one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.zone("intel-rapl:0", "package-0", 1000, RANGE)
        self.zone("intel-rapl:0:0", "core", 7, RANGE)
        self.zone("intel-rapl:0:1", "dram", 2000, 65712999613)
        self.zone("intel-rapl:1", "package-1", 3000, RANGE)
        self.zone("intel-rapl:2", "psys", 11, RANGE)
        self.zone("intel-rapl-mmio:0", "package-0", 1000, RANGE)
        self.zone("dtpm", "package-9", 1000, RANGE)

    def zone(self, zone: str, name: str, energy: int, size: int) -> None:
        path = self.folder / zone
        path.mkdir()
        (path / "name").write_text(f"{name}\n")
        (path / "max_energy_range_uj").write_text(f"{size}\n")
        self.set(zone, energy)

    def set(self, zone: str, energy: int | str) -> None:
        (self.folder / zone / "energy_uj").write_text(f"{energy}\n")


@pytest.fixture
def powercap(monkeypatch, tmp_path, clock) -> Powercap:
    monkeypatch.setattr(meter, "POWERCAP", tmp_path)
    return Powercap(tmp_path)


def test_rapl_adds_packages_and_memory(powercap, clock):
    with measure_energy("cpu") as reading:
        clock.now += 0.5
        for zone, energy in (("0", 5_001_000), ("0:0", 99), ("0:1", 1_002_000)):
            powercap.set(f"intel-rapl:{zone}", energy)
        powercap.set("intel-rapl:1", 503_000)
        powercap.set("intel-rapl:2", 10**9)
    source = "rapl:package-0+dram+package-1"
    assert reading == EnergyReading(6.5, 0.5, True, "", source)


def test_rapl_wraps_each_by_its_own_range(powercap, clock):
    powercap.set("intel-rapl:0", RANGE - 400)
    powercap.set("intel-rapl:0:1", 65712999613 - 50)
    with measure_energy("cpu") as reading:
        clock.now += 1
        powercap.set("intel-rapl:0", 999_600)
        powercap.set("intel-rapl:0:1", 450)
    assert reading.joules == pytest.approx(1.0005)
    assert reading.valid


@pytest.mark.parametrize(
    ("seconds", "energy", "reason"),
    [
        (0.09, 2000, "shorter than 0.1 s"),
        (1.0, 1000, "stood still"),
        (132.0, 2000, "whole range"),
        (1.0, RANGE + 1, "left its range"),
        (1.0, "", "can't be read"),
    ],
)
def test_rapl_refuses(powercap, clock, seconds, energy, reason):
    with measure_energy("cpu") as reading:
        clock.now += seconds
        powercap.set("intel-rapl:0", energy)
    refused(reading, reason)


def test_rapl_unreadable_or_missing(powercap, clock, tmp_path, monkeypatch):
    original = Path.read_text

    def guarded(self: Path, *args: Any) -> str:
        if self.name == "energy_uj":
            raise PermissionError(13, "Permission denied")
        return original(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "read_text", guarded)
        with measure_energy("cpu") as reading:
            clock.now += 1
    refused(reading, "Permission denied")
    monkeypatch.setattr(meter, "POWERCAP", tmp_path / "nowhere")
    with measure_energy("cpu") as reading:
        clock.now += 1
    refused(reading, "no CPU package")
    assert reading.seconds == 1


def test_errors_of_the_block_pass_on(powercap, nvml, clock):
    readings = []

    def fail(device: str) -> None:
        with measure_energy(device) as reading:
            readings.append(reading)
            clock.now += 3
            raise KeyError("mine")

    for device in ("cpu", "cuda"):
        with pytest.raises(KeyError, match="mine"):
            fail(device)
        refused(readings[-1], "KeyError")
        assert readings[-1].seconds == 3
    assert nvml.opened == 0


def test_the_default_device(powercap, nvml, clock, monkeypatch):
    for available, source in ((False, "rapl"), (True, "nvml")):
        monkeypatch.setattr(torch.cuda, "is_available", lambda value=available: value)
        with measure_energy() as reading:
            clock.now += 3
        assert reading.source.startswith(source)


@pytest.mark.gpu
@pytest.mark.slow
def test_a_real_gpu():
    x = torch.randn(4096, 4096, device="cuda")
    with measure_energy("cuda") as reading:
        end = time.perf_counter() + 2.5
        while time.perf_counter() < end:
            x @ x
            torch.cuda.synchronize()
    if not reading.valid:
        pytest.skip(reading.reason)
    assert 20 < reading.joules / reading.seconds < 2000


def test_bad_devices():
    with pytest.raises(ValueError, match="device='toaster'"), measure_energy("toaster"):
        pass
    with pytest.raises(TypeError, match="device"), measure_energy(3):  # type: ignore
        pass
    with measure_energy("meta") as reading:
        pass
    refused(reading, "only CUDA and CPU")
    assert issubclass(EnergyUnavailableError, RuntimeError)


def test_importing_brings_no_optional_package():
    code = """
import sys
sys.modules["pynvml"] = None
import torch
before = set(sys.modules)
import loraven
print(*sorted({name.split(".")[0] for name in set(sys.modules) - before}))
"""
    folder = str(Path(loraven.__file__).parents[1])
    paths = [folder, *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    heavy = {"matplotlib", "pynvml", "rich", "scipy", "tqdm", "transformers", "typer"}
    assert not heavy & set(done.stdout.split())
    assert "loraven" in done.stdout.split()
