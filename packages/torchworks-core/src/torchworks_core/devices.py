# SPDX-License-Identifier: Apache-2.0
"""What this machine can compute on: CPU, CUDA, XPU and MPS devices."""

import os
import platform
import re
from dataclasses import dataclass
from pathlib import Path

import torch

# Dense bfloat16 (T4: float16) FLOP/s and bytes/s from NVIDIA's data sheets of
# the SXM parts where there are several; matched from the top.
_SHEETS = {
    "B200": (2250e12, 8.0e12),
    "H200": (989e12, 4.8e12),
    "H100 PCIe": (756e12, 2.0e12),
    "H100 80GB HBM3": (989e12, 3.35e12),
    "A100-SXM4-80GB": (312e12, 2.039e12),
    "A100-SXM4-40GB": (312e12, 1.555e12),
    "A10G": (70e12, 0.6e12),
    "L40S": (362e12, 0.864e12),
    "L4": (121e12, 0.3e12),
    "T4": (65e12, 0.32e12),
}


@dataclass(frozen=True)
class DeviceInfo:
    """One device.

    Attributes:
        kind: torch's device type: ``cpu``, ``cuda``, ``xpu`` or ``mps``.
        index: torch's device index.
        name: The maker's name of it.
        total_memory: Bytes; for the CPU at most the limit of its control group;
            None where the system does not tell.
        peak_flops: Dense bfloat16 FLOP/s by the data sheet; None if unknown.
        bandwidth: Bytes/s of its memory by the data sheet; None if unknown.
    """

    kind: str
    index: int
    name: str
    total_memory: int | None
    peak_flops: float | None = None
    bandwidth: float | None = None


def detect() -> tuple[DeviceInfo, ...]:
    """Return this machine's devices, the CPU first. Starts no CUDA context.

    Example:
        >>> detect()[0].kind
        'cpu'
    """
    found = [DeviceInfo("cpu", 0, cpu_name(), _cpu_memory())]
    for kind in ("cuda", "xpu"):
        module = getattr(torch, kind)
        for index in range(module.device_count() if module.is_available() else 0):
            about = module.get_device_properties(index)
            known = [v for k, v in _SHEETS.items() if f"{k} " in f"{about.name} "]
            info = (kind, index, about.name, about.total_memory)
            found.append(DeviceInfo(*info, *(known[0] if known else ())))
    if torch.backends.mps.is_available():
        memory = torch.mps.recommended_max_memory()
        found.append(DeviceInfo("mps", 0, "Apple GPU", memory))
    return tuple(found)


def cpu_name(path: str | os.PathLike = "/proc/cpuinfo") -> str:
    """Return the CPU's model name, or its architecture where it is not told."""
    text = Path(path).read_text(errors="replace") if Path(path).is_file() else ""
    found = re.search(r"^model name\s*:(.*)", text, re.MULTILINE)
    return found[1].strip() if found else platform.processor() or platform.machine()


def _cpu_memory(root: str | os.PathLike = "/") -> int | None:
    """Bytes of this machine or, if less, of this process's control groups."""
    if "SC_PHYS_PAGES" not in getattr(os, "sysconf_names", {}):
        return None
    base, table = Path(root, "sys/fs/cgroup"), Path(root, "proc/self/cgroup")
    lines = table.read_text().splitlines() if table.is_file() else []
    limits = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    for line in ["0::/", "0:memory:/", *lines]:
        _, kind, path = line.split(":", 2)
        # Version 2 of control groups has one tree, version 1 has one for memory.
        name = {"": "memory.max", "memory": "memory.limit_in_bytes"}.get(kind)
        leaf = Path(path.lstrip("/"))
        files = [base / kind / group / name for group in (leaf, *leaf.parents) if name]
        texts = [file.read_text().strip() for file in files if file.is_file()]
        limits += [int(text) for text in texts if text.isdigit()]
    return min(limits)
