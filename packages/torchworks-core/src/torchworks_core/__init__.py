# SPDX-License-Identifier: Apache-2.0
"""The little that at least three packages of torchworks need.

Importing this package imports nothing else: take the modules by name, for
example ``from torchworks_core import checkpoint``.
"""


def __getattr__(name: str) -> str:
    if name != "__version__":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib.metadata import version

    return version("torchworks-core")
