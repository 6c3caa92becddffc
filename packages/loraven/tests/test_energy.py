# SPDX-License-Identifier: Apache-2.0
"""The energy model against figures worked out by hand."""

import inspect

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loraven import EnergyEstimator, PerfEstimator, get_default_hardware_profile
from torchworks_core.errors import InvalidValue

NINE = get_default_hardware_profile()  # its values: test_specification.py


@pytest.fixture
def estimator() -> EnergyEstimator:
    return EnergyEstimator(get_default_hardware_profile())


def test_signatures_are_the_specified_ones():
    def parameters(function):
        found = inspect.signature(function).parameters.values()
        return [(p.name, p.default) for p in found if p.name != "self"]

    empty = inspect.Parameter.empty
    assert parameters(PerfEstimator) == [("hardware_profile", empty)]
    assert parameters(EnergyEstimator) == [
        ("hardware_profile", empty),
        ("flops_per_mac", 2.0),
        ("energy_per_flop", 1e-6),
        ("energy_per_memory_access", 1e-7),
    ]
    first = [("layer_dims", empty), ("rank", empty)]
    assert parameters(PerfEstimator.estimate) == first
    rest = [("batch_size", 1), ("utilization", 0.8), ("temperature", 65.0)]
    assert parameters(EnergyEstimator.estimate) == first + rest
    assert parameters(EnergyEstimator.estimate_all) == first + rest[:1]
    with pytest.raises(TypeError, match="abstract"):
        PerfEstimator({})  # type: ignore[abstract]


def test_default_profile_is_fresh_and_exact():
    first = get_default_hardware_profile()
    assert first == NINE
    first["gpu_cores"] = 1
    assert get_default_hardware_profile() == NINE


# Worked by hand. 512x512, rank 64, one row: 64·1024 = 65536 weights; 131072 FLOPs;
# elements 65536+1088 = 66624, 266496 bytes. compute 131072·1e-6/0.8 = 0.16384.
# miss1 = 1-65536/266496 = 0.7540826…, miss2 = 0; memory = 266496·1e-8 +
# (266496-65536)·1e-7 = 0.00266496 + 0.020096 = 0.02276096. t: FLOPs/(2·5120·1.5e9·.8)
# = 1.0667e-8 s, bytes/9e11 = 2.96107e-7 s; static = 1000·25·2.96107e-7 = 0.00740267.
# 2048x1024, rank 700 > break-even 682.7, 32 rows: 2097152 weights; 2·32·2097152 =
# 134217728 FLOPs; elements 2097152+32·3772 = 2217856, 8871424 bytes. compute
# 167.77216; memory = .08871424 + (8871424-65536)·1e-7 + (8871424-1048576)·1e-6 =
# .08871424 + .8805888 + 7.822848 = 8.79215104; t = max(1.0923e-5, 9.85714e-6) s from
# 134217728/1.2288e13 = 1.092266…e-5; static = 25·1.0922666…e-2 = 0.27306667.
# 8x8, rank 1, one row: 16 weights, 32 FLOPs, 33 elements, 132 bytes: 4e-5, 1.32e-6,
# 25000·132/9e11 = 3.6666667e-6.
HAND = [
    ((512, 512), 64, 1, (0.16384, 0.02276096, 0.00740266667)),
    ((2048, 1024), 700, 32, (167.77216, 8.79215104, 0.273066667)),
    ((8, 8), 1, 1, (4e-5, 1.32e-6, 3.66666667e-6)),
]


@pytest.mark.critical
@pytest.mark.parametrize(("dims", "rank", "batch", "parts"), HAND)
def test_hand_worked_table(estimator, dims, rank, batch, parts):
    found = estimator.breakdown(dims, rank, batch)
    assert list(found) == ["compute", "memory", "static"]
    assert list(found.values()) == pytest.approx(parts, rel=1e-8)
    assert estimator.estimate(dims, rank, batch) == sum(found.values())


def test_utilization_divides_and_heat_scales_the_static_part(estimator):
    base = estimator.breakdown((512, 512), 64)
    low = estimator.breakdown((512, 512), 64, utilization=0.4)
    assert low["compute"] == pytest.approx(2 * base["compute"])
    assert low["memory"] == base["memory"]
    floor = estimator.breakdown((512, 512), 64, utilization=0.0)
    assert floor == estimator.breakdown((512, 512), 64, utilization=0.05)
    for temperature, factor in ((65.0, 1), (75.0, 1.1), (15.0, 0.5), (-50.0, 0.5)):
        hot = estimator.breakdown((512, 512), 64, temperature=temperature)
        assert hot["static"] == pytest.approx(base["static"] * factor)
        assert hot["compute"] == base["compute"]


def test_700_watts_for_one_second_are_7e5_millijoules():
    per_byte = (
        f"{level}_energy_per_byte" for level in ("dram", "l2_cache", "l1_cache")
    )
    profile = dict.fromkeys((*per_byte, "compute_energy_per_flop"), 0.0)
    # 64 weights, 8 inputs, 8 outputs and 8 between them move in exactly one second.
    profile |= {"idle_power": 700.0, "memory_bandwidth": 4.0 * (64 + 8 + 8 + 8)}
    estimator = EnergyEstimator(profile)
    assert estimator.estimate((8, 8), 8) == pytest.approx(7e5)
    assert estimator.estimate_all((8, 8), 8)["latency_ms"] == pytest.approx(1000)
    del profile["idle_power"]
    profile["thermal_design_power"] = 7000.0
    assert EnergyEstimator(profile).estimate((8, 8), 8) == pytest.approx(7e5)


def test_estimate_all(estimator):
    found = estimator.estimate_all((2048, 1024), 700, batch_size=32)
    assert list(found) == ["energy_mj", "latency_ms", "memory_mb", "flops", "params"]
    assert all(type(value) is float for value in found.values())
    assert found["energy_mj"] == estimator.estimate((2048, 1024), 700, 32)
    expected = [1.0922666667e-2, 8.871424, 134217728, 2097152]
    assert list(found.values())[1:] == pytest.approx(expected)


sizes = st.integers(1, 3000)


@settings(deadline=None)
@given(sizes, sizes, st.integers(1, 4000), st.integers(1, 5000), st.integers(1, 9))
def test_strictly_monotone_in_rank_and_batch(inside, outside, rank, batch, more):
    estimator = EnergyEstimator({})
    dims = (inside, outside)
    energy = estimator.estimate(dims, rank, batch)
    assert estimator.estimate(dims, rank, batch + more) > energy
    higher = estimator.estimate(dims, rank + more, batch)
    assert higher >= energy
    if (rank + more) * (inside + outside) <= inside * outside:
        assert higher > energy
    assert (
        0
        < energy
        == pytest.approx(sum(estimator.breakdown(dims, rank, batch).values()))
    )


def test_precedence_is_constructor_then_profile_then_default():
    def compute(profile, **options):
        return EnergyEstimator(profile, **options).breakdown((8, 8), 8)["compute"]

    default = 2 * 64 * 1e-6 / 0.8
    key = {"compute_energy_per_flop": 3e-6}
    assert compute({}) == pytest.approx(default)
    assert compute(key) == pytest.approx(3 * default)
    assert compute(key, energy_per_flop=5e-6) == pytest.approx(5 * default)
    assert compute(key, energy_per_flop=1e-6) == pytest.approx(3 * default)
    assert compute({}, flops_per_mac=4.0) == pytest.approx(2 * default)
    assert compute({"dvfs_factor": 0.25}) == pytest.approx(default / 4)

    def memory(profile, **options):
        small = {"l1_cache_size": 0, "l2_cache_size": 0, "dram_energy_per_byte": 0}
        found = EnergyEstimator(small | profile, **options)
        return found.breakdown((8, 8), 8)["memory"] / (4 * (64 + 24)) - 1e-8

    key = {"l2_cache_energy_per_byte": 3e-7}
    assert memory({}) == pytest.approx(1e-7)
    assert memory(key) == pytest.approx(3e-7)
    assert memory(key, energy_per_memory_access=5e-7) == pytest.approx(5e-7)
    assert memory(key, energy_per_memory_access=1e-7) == pytest.approx(3e-7)


def test_bytes_per_element_halves_the_traffic(estimator):
    half = EnergyEstimator(NINE | {"bytes_per_element": 2})
    full = estimator.estimate_all((512, 512), 64)["memory_mb"]
    assert half.estimate_all((512, 512), 64)["memory_mb"] == full / 2


def test_source_and_the_copied_profile():
    profile = get_default_hardware_profile()
    estimator = EnergyEstimator(profile)
    before = estimator.estimate((64, 64), 4)
    profile["compute_energy_per_flop"] = 1.0
    assert estimator.estimate((64, 64), 4) == before
    assert estimator.hardware_profile == NINE
    assert estimator.source == "nominal"
    named = EnergyEstimator({"source": "calibrated:H200:2026-11-21"})
    assert named.source == "calibrated:H200:2026-11-21"


@pytest.mark.parametrize(
    ("profile", "kind", "match"),
    [
        ({"gpu_core": 1}, ValueError, "Did you mean 'gpu_cores'"),
        ({"zzz": 1}, ValueError, "unknown"),
        ({"gpu_cores": 0}, ValueError, "above 0"),
        ({"memory_bandwidth": 0.0}, ValueError, "above 0"),
        ({"thermal_design_power": -1.0}, ValueError, "thermal"),
        ({"base_frequency": float("nan")}, ValueError, "base_frequency"),
        ({"idle_power": float("inf")}, ValueError, "idle_power"),
        ({"gpu_cores": "many"}, TypeError, "gpu_cores"),
        ({"source": 3}, TypeError, "source"),
        ([("gpu_cores", 1)], TypeError, "mapping"),
    ],
)
def test_bad_profiles(profile, kind, match):
    with pytest.raises(kind, match=match):
        EnergyEstimator(profile)


def test_bad_arguments(estimator):
    for name in ("flops_per_mac", "energy_per_flop", "energy_per_memory_access"):
        for bad in (-1.0, float("nan")):
            with pytest.raises(ValueError, match=name):
                EnergyEstimator({}, **{name: bad})
    with pytest.raises(ValueError, match="flops_per_mac"):
        EnergyEstimator({}, flops_per_mac=0.0)
    good = {"layer_dims": (8, 8), "rank": 4}
    for name, bad in (
        ("rank", 0),
        ("batch_size", 0),
        ("layer_dims", (8, 0)),
        ("layer_dims", (8, 8, 8)),
        ("utilization", 1.1),
        ("utilization", -0.1),
        ("temperature", float("nan")),
    ):
        with pytest.raises(ValueError, match=name):
            estimator.estimate(**good | {name: bad})
    for name, bad in (("rank", 4.0), ("rank", True), ("layer_dims", 8)):
        with pytest.raises(TypeError, match=name):
            estimator.estimate(**good | {name: bad})


@pytest.mark.parametrize(
    "entry", [{"base_frequency": 1e-308}, {"compute_energy_per_flop": 1e308}]
)
def test_an_energy_that_overflows_is_refused(entry):
    estimator = EnergyEstimator(get_default_hardware_profile() | entry)
    with pytest.raises(InvalidValue, match="not finite"):
        estimator.estimate((512, 512), 64, batch_size=8)
