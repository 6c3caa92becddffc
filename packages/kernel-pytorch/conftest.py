# SPDX-License-Identifier: Apache-2.0
"""Files that can't be collected for their doctests where an extra is missing."""

import importlib.util

collect_ignore_glob: list[str] = []
if importlib.util.find_spec("triton") is None:
    # The rest imports these only at need; collecting imports them all.
    modules = "src/kernel_pytorch/attention"
    collect_ignore_glob += [
        f"{modules}/triton_kernels.py",
        f"{modules}/triton_gradients.py",
        "tests/triton_compile.py",
    ]
