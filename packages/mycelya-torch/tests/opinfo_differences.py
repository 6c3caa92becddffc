# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""What differs from the CPU, by mode of the sweep: {entry of OpInfo: reason}.

`test_opinfo.py` fails when an entry that is not here differs, and when one that is
here has begun to pass. What is only close, or has other strides, is not listed: the
report of `test_opinfo.py` prints it.
"""

DIFFERENCES: dict[str, dict[str, str]] = {
    "float16": {
        "nn.functional.linear_cross_entropy.chunked_none": (
            "torch's acc_policy='auto' asks for the device's type: float32 sums on "
            "the CPU, the input's dtype on any other device"
        ),
    },
}
