# SPDX-License-Identifier: Apache-2.0
"""Modules that can't be collected for their doctests where an extra is missing."""

import importlib.util

collect_ignore_glob: list[str] = []
if importlib.util.find_spec("triton") is None:
    # The rest imports these only at need; collecting imports them all.
    collect_ignore_glob += ["*/triton_kernels.py", "*/triton_gradients.py"]
