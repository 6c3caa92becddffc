# SPDX-License-Identifier: Apache-2.0
"""A device of known coefficients, whose counter and clock are made up."""

import inspect
import math
from datetime import UTC, datetime

import numpy as np
import pytest
import scipy.optimize
import torch

from loraven import (
    EnergyEstimator,
    EnergyUnavailableError,
    calibrate_energy,
    energy_fit,
    get_default_hardware_profile,
    meter,
)


class Device:
    """A counter that knows what each FLOP, byte and second costs."""

    source = "made up"
    shortest = 0.1

    def __init__(self, noise: float = 0.0) -> None:
        self.per_flop, self.per_byte, self.idle = 3e-11, 2e-10, 15.0
        self.speed, self.bandwidth = 4e10, 2e10
        self.now, self.energy, self.noise, self.calls = 0.0, 0.0, noise, 0
        self.generator = np.random.default_rng(0)

    def read(self) -> float:
        return self.energy

    def joules(self, before: float, after: float, seconds: float) -> float:
        return (after - before) * (1 + self.noise * self.generator.uniform(-1, 1))

    def close(self) -> None:
        pass

    def cost(self, shape: energy_fit.Shape, itemsize: int) -> tuple[float, float]:
        """Seconds and joules, from the definitions in the design."""
        inside, outside, rank, batch = shape
        weights = min(rank * (inside + outside), inside * outside)
        flops = 2 * batch * weights
        moved = itemsize * (weights + batch * (inside + outside + rank))
        seconds = max(flops / self.speed, moved / self.bandwidth)
        joules = self.per_flop * flops + self.per_byte * moved + self.idle * seconds
        return seconds, joules

    def runner(self, device, dtype, shape):
        seconds, joules = self.cost(shape, dtype.itemsize)

        def call() -> None:
            self.now += seconds
            self.energy += joules
            self.calls += 1

        return call


def install(monkeypatch, device: Device) -> Device:
    monkeypatch.setattr(meter, "clock", lambda: device.now)
    monkeypatch.setattr(meter, "open_counter", lambda _: device)
    monkeypatch.setattr(energy_fit, "_runner", device.runner)
    return device


def test_signature():
    parameters = inspect.signature(calibrate_energy).parameters
    assert list(parameters) == ["device", "dtype", "seconds"]
    assert parameters["dtype"].default is torch.float32
    assert parameters["seconds"].default == 2.0
    kinds = [p.kind for p in parameters.values()]
    assert kinds[1:] == [inspect.Parameter.KEYWORD_ONLY] * 2


@pytest.mark.critical
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_known_coefficients_are_recovered(monkeypatch, dtype):
    device = install(monkeypatch, Device())
    profile = calibrate_energy("cpu", dtype=dtype)
    assert profile["compute_energy_per_flop"] == pytest.approx(3e-8 * 0.8)
    assert profile["dram_energy_per_byte"] == pytest.approx(2e-7)
    assert profile["idle_power"] == pytest.approx(15.0)
    assert profile["memory_bandwidth"] == pytest.approx(2e10)
    cores, frequency = profile["gpu_cores"], profile["base_frequency"]
    assert 2 * cores * frequency * 0.8 == pytest.approx(4e10)
    assert get_default_hardware_profile().keys() < profile.keys()
    name = profile["source"].split(":")
    assert name[0] == "calibrated"
    assert name[2:] == [datetime.now(UTC).date().isoformat()]
    # What matters: joules and seconds of layers that were not measured.
    estimator = EnergyEstimator(profile)
    assert estimator.source == profile["source"]
    for shape in ((300, 700, 20, 5), (2048, 2048, 2048, 64), (64, 64, 8, 4096)):
        dims, rank, batch = shape[:2], *shape[2:]
        seconds, joules = device.cost(energy_fit.Shape(*shape), dtype.itemsize)
        assert estimator.estimate(dims, rank, batch) == pytest.approx(1000 * joules)
        found = estimator.estimate_all(dims, rank, batch)
        assert found["latency_ms"] == pytest.approx(1000 * seconds)


def test_noise_of_the_counter_is_averaged(monkeypatch):
    device = install(monkeypatch, Device(noise=0.03))
    estimator = EnergyEstimator(calibrate_energy("cpu"))
    for shape in ((300, 700, 20, 5), (2048, 2048, 2048, 64), (700, 900, 90, 512)):
        joules = device.cost(energy_fit.Shape(*shape), 4)[1]
        found = estimator.estimate(shape[:2], shape[2], shape[3])
        assert found == pytest.approx(1000 * joules, rel=0.1)


def test_a_bad_fit_is_said(monkeypatch):
    install(monkeypatch, Device(noise=0.9))
    with pytest.warns(UserWarning, match="misses the measured energies"):
        calibrate_energy("cpu")


def test_each_window_is_long_enough(monkeypatch):
    device = install(monkeypatch, Device())
    calibrate_energy("cpu", seconds=3.0)
    shapes = energy_fit._shapes(torch.device("cpu"))
    assert len(set(shapes)) >= 12
    assert device.now >= 12 * 3.75
    assert device.calls > 12


def test_no_counter_no_profile(monkeypatch, tmp_path):
    monkeypatch.setattr(meter, "POWERCAP", tmp_path)
    with pytest.raises(EnergyUnavailableError, match="no CPU package"):
        calibrate_energy("cpu")
    with pytest.raises(EnergyUnavailableError, match="only CUDA and CPU"):
        calibrate_energy("meta")


def test_an_invalid_window_is_an_error(monkeypatch):
    device = install(monkeypatch, Device())

    def refuse(before: float, after: float, seconds: float) -> float:
        raise EnergyUnavailableError("NVML", "2 other processes")

    monkeypatch.setattr(device, "joules", refuse)
    with pytest.raises(EnergyUnavailableError, match="2 other processes"):
        calibrate_energy("cpu")


def test_bad_arguments(monkeypatch):
    device = install(monkeypatch, Device())
    with pytest.raises(ValueError, match=r"needs 0\.1 s"):
        calibrate_energy("cpu", seconds=0.05)
    with pytest.raises(ValueError, match="floating"):
        calibrate_energy("cpu", dtype=torch.int8)
    with pytest.raises(TypeError, match="dtype"):
        calibrate_energy("cpu", dtype="float32")
    with pytest.raises(ValueError, match="seconds"):
        calibrate_energy("cpu", seconds=math.nan)
    with pytest.raises(ValueError, match="device"):
        calibrate_energy("toaster")
    assert device.calls == 0


def test_the_real_runner_does_the_work_it_is_charged_for():
    from torch.utils.flop_counter import FlopCounterMode

    for shape in ((64, 48, 6, 5), (64, 48, 48, 5)):
        call = energy_fit._runner(
            torch.device("cpu"), torch.float32, energy_fit.Shape(*shape)
        )
        with FlopCounterMode(display=False) as counted:
            assert call().shape == (5, 48)
        estimator = EnergyEstimator(get_default_hardware_profile())
        flops = estimator.estimate_all(shape[:2], shape[2], shape[3])["flops"]
        assert counted.get_total_flops() == flops


@pytest.mark.parametrize("columns", [1, 2, 3, 4])
def test_nonnegative_least_squares_is_scipys(columns):
    generator = np.random.default_rng(columns)
    for _ in range(60):
        matrix = generator.normal(size=(columns + 5, columns))
        matrix *= 10.0 ** generator.integers(-9, 9, size=columns)
        target = generator.normal(size=columns + 5)
        found = energy_fit.nonnegative_least_squares(matrix, target)
        # scipy gets columns of length 1: its tolerance is absolute.
        scale = np.linalg.norm(matrix, axis=0)
        expected, _ = scipy.optimize.nnls(matrix / scale, target)
        np.testing.assert_allclose(found * scale, expected, atol=1e-10)


def test_nonnegative_least_squares_of_degenerate_matrices():
    zero = np.zeros((4, 2))
    assert not energy_fit.nonnegative_least_squares(zero, np.ones(4)).any()
    twin = np.array([[1.0, 1.0], [2.0, 2.0]])
    found = energy_fit.nonnegative_least_squares(twin, np.array([2.0, 4.0]))
    np.testing.assert_allclose(twin @ found, [2.0, 4.0])
