# SPDX-License-Identifier: Apache-2.0
"""What a list of levels may be.

At most seven: a compiler builds one graph for each value of an integer attribute,
and gives up after eight.
"""

from collections.abc import Iterable, Mapping, Sequence
from numbers import Real
from typing import Any

from torchworks_core.errors import InvalidValue

__all__ = ["check_levels"]

_MAX_LEVELS = 7


def check_levels(levels: Sequence[float]) -> tuple[float, ...]:
    """The levels in ascending order, as floats.

    Raises:
        TypeError: they are no numbers.
        InvalidValue: none or more than 7, outside (0, 1], or one twice.

    Example:
        >>> check_levels([1, 0.5])
        (0.5, 1.0)
    """
    # Text and mappings iterate as well, over what was not meant.
    if not isinstance(levels, Iterable) or isinstance(levels, str | bytes | Mapping):
        raise TypeError(f"levels={levels!r}: a list of numbers in (0, 1] is needed")
    given = tuple(levels)
    if not all(map(_is_number, given)):
        raise TypeError(f"levels={levels!r}: numbers in (0, 1] are needed")
    found = tuple(sorted(map(float, given)))
    if not 1 <= len(found) <= _MAX_LEVELS:
        do = f"Give 1 to {_MAX_LEVELS}: a compiler builds a graph for each"
        raise InvalidValue(f"levels={levels!r}", f"{len(found)} levels", do)
    if not all(0 < level <= 1 for level in found):
        why = "a level is a fraction of the dense cost"
        raise InvalidValue(f"levels={levels!r}", why, "Give numbers in (0, 1]")
    if len(set(found)) < len(found):
        raise InvalidValue(f"levels={levels!r}", "one is there twice")
    return found


def _is_number(level: Any) -> bool:
    return isinstance(level, Real) and not isinstance(level, bool)
