# SPDX-License-Identifier: Apache-2.0
"""Checks of scalar arguments: a wrong type is a TypeError, a wrong value ours.

Decisions:
- A number is whatever turns into a float, NaN and infinity excepted: a gradient
  norm or an accuracy often arrives as a tensor of one element.
- True and False are no numbers, and a float is no integer, even 4.0.
"""

import math
import operator
from typing import Any

from torchworks_core.errors import InvalidValue


def number(
    name: str,
    value: Any,
    low: float = 0.0,
    high: float = math.inf,
    *,
    above: bool = False,
) -> float:
    """Return ``value`` as a float from ``low`` to ``high``.

    Args:
        name: What the message calls it.
        value: A real number, or an array or tensor of one element.
        low: Smallest value; excluded with ``above``.
        high: Largest value.
        above: The value must lie above ``low``.

    Raises:
        TypeError: ``value`` is no number.
        InvalidValue: it is not finite or lies outside the range.

    Example:
        >>> number("price", 2)
        2.0
    """
    if type(value) is float:
        found = value
    elif isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise TypeError(f"{name} must be a number, not {type(value).__name__}")
    else:
        try:
            found = float(value)
        except OverflowError:
            found = math.inf
        except (RuntimeError, TypeError, ValueError) as error:
            raise TypeError(f"{name} must be one number: {error}") from error
    if not low <= found <= high or math.isinf(found) or (above and found == low):
        start = f"above {low:g}" if above else f"of at least {low:g}"
        end = "" if math.isinf(high) else f" and at most {high:g}"
        give = f"Give a finite number {start}{end}"
        raise InvalidValue(f"{name}={found!r}", "out of range", give)
    return found


def integer(name: str, value: Any, low: int = 1, high: int | None = None) -> int:
    """Return ``value`` as an int from ``low`` to ``high``.

    Raises:
        TypeError: ``value`` is no integer.
        InvalidValue: it lies outside the range.

    Example:
        >>> integer("rank", 8, high=16)
        8
    """
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError(f"{name} must be an int, not {type(value).__name__}")
    found = operator.index(value)
    if found < low or (high is not None and found > high):
        end = "" if high is None else f" and at most {high}"
        raise InvalidValue(
            f"{name}={found}", "out of range", f"Give at least {low}{end}"
        )
    return found


def dimensions(value: Any) -> tuple[int, int]:
    """Return ``layer_dims`` as (in_features, out_features), both at least 1.

    Raises:
        TypeError: not a pair of ints.
        InvalidValue: a size below 1, or another number of sizes.
    """
    if not isinstance(value, (tuple, list)):
        raise TypeError(f"layer_dims must be a tuple, not {type(value).__name__}")
    if len(value) != 2:
        do = "Give (in_features, out_features)"
        raise InvalidValue(f"layer_dims={value!r}", f"{len(value)} sizes, not 2", do)
    return integer("layer_dims[0]", value[0]), integer("layer_dims[1]", value[1])
