# SPDX-License-Identifier: Apache-2.0
"""Files that can't be collected for their doctests where an extra is missing."""

import importlib.util

collect_ignore: list[str] = []
if importlib.util.find_spec("triton") is None:
    # test_triton runs it in a process of its own, or is skipped.
    collect_ignore.append("triton_compile.py")
