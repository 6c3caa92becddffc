# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""The module ``torch.mycelya``, ids and hashes."""

import pytest
import torch

import mycelya_torch
from mycelya_torch import RemoteMachine

pytestmark = pytest.mark.fast


def test_module_has_all_its_names():
    names = """is_available device_count current_device set_device device synchronize
    manual_seed manual_seed_all seed seed_all initial_seed get_rng_state set_rng_state
    get_rng_state_all set_rng_state_all default_generators memory_allocated
    memory_reserved max_memory_allocated reset_peak_memory_stats memory_stats
    mem_get_info empty_cache get_device_name get_device_properties Stream Event stream
    current_stream get_amp_supported_dtype is_bf16_supported is_initialized init
    _lazy_init _is_in_bad_fork"""
    assert [name for name in names.split() if not hasattr(torch.mycelya, name)] == []


def test_current_device(both):
    index = both.device().index
    before = torch.mycelya.current_device()
    with torch.mycelya.device(index):
        assert torch.mycelya.current_device() == index
        assert torch.ones(1, device="mycelya").device == both.device()
    assert torch.mycelya.current_device() == before
    torch.mycelya.set_device(both.device())
    assert torch.mycelya.current_device() == index
    torch.mycelya.set_device(before)
    assert torch.mycelya.device_count() > index
    assert torch.mycelya.is_available()
    with pytest.raises(RuntimeError, match="mycelya device is needed"):
        torch.mycelya.synchronize("cpu")


def test_random_numbers_follow_the_seed(both):
    device = both.device()
    torch.manual_seed(7)
    first = torch.rand(5, device=device)
    assert torch.mycelya.default_generators[device.index].initial_seed() == 7
    state = torch.mycelya.get_rng_state(device)
    second = torch.rand(5, device=device)
    torch.mycelya.set_rng_state(state, device)
    assert torch.equal(torch.rand(5, device=device).cpu(), second.cpu())
    torch.manual_seed(7)
    assert torch.equal(torch.rand(5, device=device).cpu(), first.cpu())
    if torch.mycelya.get_device_properties(device).type == "cpu":
        torch.manual_seed(7)
        assert torch.equal(torch.rand(5), first.cpu())


def test_a_seed_before_the_start_counts():
    torch.manual_seed(11)
    with RemoteMachine("mock") as machine:
        if torch.cuda.is_available():
            pytest.skip("the worker's numbers are CUDA's")
        assert torch.equal(
            torch.rand(3, device=machine.device()).cpu(),
            torch.rand(3),
        )


def test_states_of_all_devices(both):
    torch.mycelya.manual_seed_all(3)
    states = torch.mycelya.get_rng_state_all()
    first = torch.rand(4, device=both.device()).cpu()
    torch.mycelya.set_rng_state_all(states)
    assert torch.equal(torch.rand(4, device=both.device()).cpu(), first)
    assert len(states) == torch.mycelya.device_count()


def test_memory(both):
    device = both.device()
    both.synchronize()
    before = torch.mycelya.memory_allocated(device)
    x = torch.ones(1 << 20, device=device)
    assert torch.mycelya.memory_allocated(device) - before >= x.nbytes
    assert torch.mycelya.max_memory_allocated(device) >= x.nbytes
    assert torch.mycelya.memory_reserved(device) >= x.nbytes
    free, total = torch.mycelya.mem_get_info(device)
    assert 0 <= free <= total
    del x
    assert torch.mycelya.memory_allocated(device) <= before
    stats = torch.mycelya.memory_stats(device)
    assert stats["allocated_bytes.all.current"] <= stats["allocated_bytes.all.peak"]
    torch.mycelya.reset_peak_memory_stats(device)
    torch.mycelya.empty_cache()


def test_properties(both):
    found = torch.mycelya.get_device_properties(both.device())
    assert found.name == torch.mycelya.get_device_name(both.device())
    assert found.total_memory > 0
    assert torch.bfloat16 in torch.mycelya.get_amp_supported_dtype()
    assert torch.mycelya.is_bf16_supported()


def test_streams_and_events(both):
    stream = torch.mycelya.current_stream(both.device())
    event = stream.record_event()
    stream.wait_event(event)
    with torch.mycelya.stream(stream):
        x = torch.ones(2, device=both.device()) + 1
    event.record(stream)
    event.synchronize()
    assert event.query()
    assert stream.query()
    assert stream == torch.mycelya.Stream(both.device())
    assert x.tolist() == [2, 2]
    with pytest.raises(NotImplementedError, match="perf_counter"):
        event.elapsed_time(event)


def test_ids_and_hashes(both):
    x = torch.ones(2, 3, device=both.device())
    number = mycelya_torch.get_storage_id(x)
    assert mycelya_torch.get_storage_id(x.t()) == number
    assert mycelya_torch.get_storage_id(x.clone()) == number + 1
    words = [number, 6, 0, 2, 2, 3, 3, 1, 0]
    value = 14695981039346656037
    for byte in b"".join(word.to_bytes(8, "little") for word in words):
        value = (value ^ byte) * 1099511628211 % 2**64
    assert mycelya_torch.get_metadata_hash(x) == value
    assert mycelya_torch.get_metadata_hash(x.t()) != value
    for function in (mycelya_torch.get_storage_id, mycelya_torch.get_metadata_hash):
        with pytest.raises(RuntimeError, match="cpu"):
            function(torch.ones(1))
        with pytest.raises(RuntimeError, match="list"):
            function([1])
