# SPDX-License-Identifier: Apache-2.0
"""Detection, with and without accelerators."""

import os
from types import SimpleNamespace

import pytest
import torch

from torchworks_core import devices


def no_accelerators(monkeypatch):
    for kind in ("cuda", "xpu"):
        if hasattr(torch, kind):
            monkeypatch.setattr(getattr(torch, kind), "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)


def test_cpu_is_always_there(monkeypatch):
    no_accelerators(monkeypatch)
    (cpu,) = devices.detect()
    assert (cpu.kind, cpu.index, cpu.peak_flops, cpu.bandwidth) == (
        "cpu",
        0,
        None,
        None,
    )
    assert cpu.name
    assert (
        2**20
        < cpu.total_memory
        <= os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    )


@pytest.mark.parametrize(
    ("name", "flops", "bandwidth"),
    [
        ("NVIDIA H200", 989e12, 4.8e12),
        ("NVIDIA H100 80GB HBM3", 989e12, 3.35e12),
        ("NVIDIA L4", 121e12, 0.3e12),
        ("Tesla T4", 65e12, 0.32e12),
        ("NVIDIA L40", None, None),
        ("NVIDIA T400", None, None),
        ("Some GPU", None, None),
    ],
)
def test_cuda_devices(monkeypatch, name, flops, bandwidth):
    no_accelerators(monkeypatch)
    about = SimpleNamespace(name=name, total_memory=141 * 2**30)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: about)
    _, first, second = devices.detect()
    assert first == devices.DeviceInfo("cuda", 0, name, 141 * 2**30, flops, bandwidth)
    assert second.index == 1


def test_mps(monkeypatch):
    no_accelerators(monkeypatch)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "recommended_max_memory", lambda: 8 << 30)
    assert devices.detect()[1] == devices.DeviceInfo("mps", 0, "Apple GPU", 8 << 30)


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({}, None),
        ({"sys/fs/cgroup/memory.max": "max\n"}, None),
        ({"sys/fs/cgroup/memory.max": "4096\n"}, 4096),
        (
            {
                "proc/self/cgroup": "0::/a/b\n",
                "sys/fs/cgroup/a/memory.max": "8192",
                "sys/fs/cgroup/a/b/memory.max": "max",
            },
            8192,
        ),
        ({"sys/fs/cgroup/memory/memory.limit_in_bytes": "16384"}, 16384),
        (
            {
                "proc/self/cgroup": "2:cpu:/x\n4:memory:/job\n",
                "sys/fs/cgroup/memory/job/memory.limit_in_bytes": "512",
            },
            512,
        ),
    ],
)
def test_control_group_limit(tmp_path, files, limit):
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    found = devices._cpu_memory(tmp_path)
    assert found == limit if limit else found > 2**20


def test_cpu_name(tmp_path):
    (tmp_path / "a").write_text("processor\t: 0\nmodel name\t: Fast CPU @ 3GHz\n")
    assert devices.cpu_name(tmp_path / "a") == "Fast CPU @ 3GHz"
    assert devices.cpu_name(tmp_path / "missing")
