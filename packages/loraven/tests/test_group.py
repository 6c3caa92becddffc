# SPDX-License-Identifier: Apache-2.0
"""Two gloo processes convert one model, and train its factors."""

import sys
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp

sys.path.insert(0, str(Path(__file__).parent))

import group_cases

import loraven


@pytest.fixture(scope="module")
def reports(tmp_path_factory):
    folder = tmp_path_factory.mktemp("group")
    context = mp.get_context("spawn")
    processes = [
        context.Process(target=group_cases.worker, args=(rank, str(folder)))
        for rank in range(group_cases.RANKS)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=240)
        if process.is_alive():
            process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    return [
        torch.load(folder / f"rank{rank}.pt", weights_only=True)
        for rank in range(group_cases.RANKS)
    ]


def equal(one, two):
    assert one.keys() == two.keys()
    return all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.critical
def test_both_processes_hold_the_same_family(reports):
    first, second = reports
    assert equal(first["state"], second["state"])
    assert first["plans"] == second["plans"]
    assert first["costs"] == second["costs"]


def test_it_is_the_family_of_all_data(reports):
    everything = group_cases.data(0) + group_cases.data(1)
    model, summary = group_cases.converted(everything, sensitivity=False)
    assert reports[0]["tokens"] == summary.tokens == sum(map(len, everything))
    # The family of one half alone is another one.
    half = group_cases.converted(group_cases.data(0), sensitivity=False)[0]
    state = reports[0]["plain"]
    bias, alone = model[0].up_bias, half[0].up_bias
    torch.testing.assert_close(state["0.up_bias"], bias, atol=1e-5, rtol=1e-5)
    assert (alone - bias).abs().max() > 0.01
    # Eigenvectors have no sign of their own: the map of rank r is what is compared.
    for name in ("0", "2", "4"):
        mine = state[f"{name}.up"][:8].T @ state[f"{name}.down"][:8]
        layer = model.get_submodule(name)
        both = layer.up[:8].T @ layer.down[:8]
        torch.testing.assert_close(mine, both, atol=1e-3, rtol=1e-3)


def test_a_failure_of_one_is_raised_by_both(reports):
    kind, message, changed = reports[1]["failing"]
    assert (kind, message, changed) == ("OSError", "disk gone", False)
    kind, message, changed = reports[0]["failing"]
    assert kind == "NotReady"
    assert "process 1" in message
    assert "disk gone" in message
    assert not changed


def test_processes_that_run_other_layers_say_so(reports):
    for report in reports:
        assert "other layers ran" in report["parting"]


@pytest.mark.critical
def test_processes_may_run_the_layers_in_another_order(reports):
    everything = group_cases.data(0) + group_cases.data(1)
    expected = group_cases.crossing(0, everything)
    for report in reports:
        for layer in ("layers.0", "layers.1"):
            name = f"{layer}.up_bias"
            torch.testing.assert_close(
                report["crossing"][name], expected[name], atol=1e-5, rtol=1e-5
            )


@pytest.mark.critical
def test_ddp_trains_the_factors_without_looking_for_unused_ones(reports):
    first, second = reports
    assert equal(first["trained"], second["trained"])
    before, after = first["state"], first["trained"]
    for name in ("0", "2", "4"):
        for key in ("up", "down", "down_bias", "up_bias"):
            assert not torch.equal(before[f"{name}.{key}"], after[f"{name}.{key}"])
        assert torch.equal(before[f"{name}.weight"], after[f"{name}.weight"])
    for report in reports:
        assert report["losses"][-1] < report["losses"][0]


def test_without_a_group_nothing_is_gathered():
    assert not torch.distributed.is_initialized()
    assert loraven.calibrate.gathered(3) == [3]
