# SPDX-License-Identifier: Apache-2.0
"""The errors of mol, each with what was wrong, the value given, and what to do.

Every class here also derives from the built-in exception that the
specification names, so ``except ValueError`` keeps working.
"""

from torchworks_core.errors import (
    InvalidValue,
    MissingFile,
    NotReady,
    OutOfMemory,
    TorchworksError,
    nearest,
)

__all__ = [
    "InvalidValue",
    "MissingFile",
    "NotReady",
    "NotYetBuilt",
    "OutOfMemory",
    "UnsupportedArchitectureError",
    "nearest",
    "one_of",
]


class UnsupportedArchitectureError(TorchworksError, RuntimeError):
    """A model family, or one of its blocks, failed a check made at build time."""


class NotYetBuilt(TorchworksError, NotImplementedError):
    """An option of the public interface that this release does not have."""


def one_of(field: str, value: object, options: tuple[str, ...]) -> None:
    """Raise ``InvalidValue`` unless ``value`` is one of ``options``.

    Args:
        field: name of the argument, as the caller wrote it.
        value: what the caller gave.
        options: the values that are accepted.

    Raises:
        InvalidValue: a ``ValueError`` naming the nearest accepted value.
    """
    if value in options:
        return
    close = nearest(value, options) if isinstance(value, str) else None
    hint = f"did you mean {close!r}? " if close else ""
    raise InvalidValue(
        f"{field}={value!r} is unknown",
        f"accepted are {', '.join(map(repr, options))}",
        f"{hint}Use one of them",
    )
