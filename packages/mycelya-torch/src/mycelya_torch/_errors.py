# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""What a machine raises. The native library raises these classes by address.

Their constructors get one text; a `RemoteExecutionError` finds the operator, the
shapes and the machine in it.
"""

import re
from typing import Any

import torch

# A worker chooses most of these texts: nothing here may take long over a long one.
_HEAD = re.compile(r"(?P<op>a request|\S{1,256}) failed on (?P<machine>[^\s:]+): ")
_SHAPE = re.compile(r"\b[a-z]\w{0,31}\[([\d,]{0,1400})\]")


class RemoteError(RuntimeError):
    """Base of what a machine, or the way to it, raises."""


class RemoteExecutionError(RemoteError):
    """An operation or a request failed on the worker.

    It is also an instance of the kind raised there, as `IndexError`.

    Attributes:
        op: The operator, as ``"aten::gather"``; empty for a request.
        shapes: The shapes of its tensor arguments, in their order.
        remote_type: The name of the kind, as ``"IndexError"``.
        machine_id: The machine, as ``"local-1a2b"``; empty if it was none.

    Example:
        >>> text = "aten::mm failed on local-1: bad [arguments float32[2,3]; op 4; "
        >>> text += "set MYCELYA_BLOCKING=1 to raise at the calling line]"
        >>> error = RemoteExecutionError(text)
        >>> error.op, error.shapes, error.remote_type, error.machine_id
        ('aten::mm', ((2, 3),), 'RuntimeError', 'local-1')
    """

    remote_type = "RuntimeError"

    def __init__(self, text: str = "") -> None:
        super().__init__(text)
        head = _HEAD.match(text)
        op = head["op"] if head else ""
        self.op: str = "" if op == "a request" else op
        self.machine_id: str = head["machine"] if head else ""
        _, mark, tail = text.rpartition(" [arguments ")
        arguments = tail.rpartition("; op ")[0] if head and mark else ""
        self.shapes: tuple[tuple[int, ...], ...] = tuple(
            tuple(int(size[:19]) for size in shape.split(",") if size)
            for shape in _SHAPE.findall(arguments)
        )


class RemoteIndexError(RemoteExecutionError, IndexError):
    """An index was out of bounds on the worker."""

    remote_type = "IndexError"


class RemoteValueError(RemoteExecutionError, ValueError):
    """A value was refused on the worker."""

    remote_type = "ValueError"


class RemoteTypeError(RemoteExecutionError, TypeError):
    """A type was refused on the worker."""

    remote_type = "TypeError"


class RemoteNotImplementedError(RemoteExecutionError, NotImplementedError):
    """The worker's device has no such operation."""

    remote_type = "NotImplementedError"


class RemoteLinAlgError(RemoteExecutionError, torch.linalg.LinAlgError):
    """A matrix was singular, or an algorithm did not converge, on the worker."""

    remote_type = "LinAlgError"


class RemoteOutOfMemoryError(RemoteExecutionError, torch.OutOfMemoryError):
    """The worker's memory, or the range of addresses, ran out."""

    remote_type = "OutOfMemoryError"


class MachineDiedError(RemoteError):
    """The worker is gone, and with it its data."""


class AuthenticationError(RemoteError):
    """The other side doesn't know the token, or its certificate is another one."""


class ProtocolError(RemoteError):
    """The other side sent something that the protocol doesn't allow."""


class SyncForbiddenError(RemoteError):
    """A round trip was needed inside `forbid_sync`."""


# In the order of ErrorKind in csrc/mycelya/Mycelya.h.
BY_KIND: tuple[type[BaseException], ...] = (
    RemoteExecutionError,
    RemoteIndexError,
    RemoteValueError,
    RemoteTypeError,
    RemoteNotImplementedError,
    RemoteLinAlgError,
    RemoteOutOfMemoryError,
    MachineDiedError,
    ProtocolError,
    SyncForbiddenError,
    KeyboardInterrupt,
)


def kind_of(error: BaseException) -> int:
    """Return the ErrorKind that a worker reports an exception as."""
    if isinstance(error, MemoryError):
        return 6
    for kind in range(6, 0, -1):
        # The builtin that the class at `kind` adds to RemoteExecutionError.
        if isinstance(error, BY_KIND[kind].__bases__[1]):
            return kind
    return 0


def field(message: Any, name: str, kind: type) -> Any:
    """Return a field of a worker's answer.

    Raises:
        ProtocolError: the answer is no map, or the field is of another type.
    """
    value = message.get(name) if isinstance(message, dict) else None
    if type(value) is not kind:
        raise ProtocolError(f"the worker's answer has no usable {name!r}")
    return value
