# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Check that Modal works: start a GPU there, multiply on it, stop it.

    pip install 'mycelya-torch[modal]'
    modal setup            # or set MODAL_TOKEN_ID and MODAL_TOKEN_SECRET
    python modal_check.py --gpu T4

This costs a few cents of your Modal account. Without the extra or without credentials
it says what is missing, and ends with status 1.
"""

import argparse
import sys
import time

import torch

import mycelya_torch


def main() -> int:
    parser = argparse.ArgumentParser(description="check the provider modal")
    gpus = [gpu.value for gpu in mycelya_torch.GPUType]
    parser.add_argument("--gpu", default="T4", choices=gpus)
    options = parser.parse_args()
    begin = time.perf_counter()
    try:
        machine = mycelya_torch.RemoteMachine("modal", options.gpu)
    except (ImportError, RuntimeError) as error:
        print(f"Modal can't be used: {error}", file=sys.stderr)
        return 1
    with machine:
        device = machine.device()
        x = torch.randn(2048, 2048, device=device)
        norm = (x @ x).norm().item()
        seconds = time.perf_counter() - begin
        name = torch.mycelya.get_device_name(device)
        print(f"{name}: norm {norm:.1f}, {seconds:.1f} s after the start")
        begin = time.perf_counter()
        for _ in range(10):
            x.sum().item()
        print(f"one value takes {(time.perf_counter() - begin) * 100:.1f} ms")
    return 0


if __name__ == "__main__":
    sys.exit(main())
