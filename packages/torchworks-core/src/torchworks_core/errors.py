# SPDX-License-Identifier: Apache-2.0
"""Exceptions whose message says what was wrong, why, and what to do.

Each shared kind also inherits the builtin exception that users catch. Standard
library only.
"""

import difflib
from collections.abc import Iterable


class TorchworksError(Exception):
    """Base of every error raised by torchworks packages.

    Args:
        what: The thing that was wrong, with the value that was given.
        why: The reason; may be empty.
        do: What the user can do about it; may be empty.

    Example:
        >>> error = InvalidValue("top_k=9", "there are 2 experts", "Use 1 or 2")
        >>> str(error), isinstance(error, ValueError)
        ('top_k=9: there are 2 experts. Use 1 or 2.', True)
    """

    def __init__(self, what: str, why: str = "", do: str = "") -> None:
        self.what, self.why, self.do = what, why, do
        first = f"{what}: {why}" if why else what
        message = " ".join(_sentence(part) for part in (first, do) if part)
        # OSError.__init__ would read three arguments as errno, strerror and
        # filename, and drop one of them; BaseException keeps them as they are.
        BaseException.__init__(self, message)

    def __str__(self) -> str:
        return str(self.args[0])

    def __reduce__(self) -> tuple:
        return type(self), (self.what, self.why, self.do), self.__dict__


class InvalidValue(TorchworksError, ValueError):
    """An argument or a setting has a value that cannot be used."""


class MissingFile(TorchworksError, FileNotFoundError):
    """A file or folder does not exist."""


class NotReady(TorchworksError, RuntimeError):
    """A call came before the step it needs, or the outside did not answer."""


class OutOfMemory(TorchworksError, MemoryError):
    """The memory needed is more than the memory there is."""


class CorruptFile(TorchworksError, ValueError):
    """A file's content breaks its format, or is not what was saved."""


class MissingExtra(TorchworksError, ImportError):
    """An optional dependency is not installed."""


def nearest(name: str, options: Iterable[str]) -> str | None:
    """Return the option spelled most like ``name``, or None if none is close.

    Example:
        >>> nearest("lama", ["gpt2", "llama"])
        'llama'
    """
    found = difflib.get_close_matches(str(name), list(options), n=1)
    return found[0] if found else None


def _sentence(text: str) -> str:
    return text if text.endswith((".", "!", "?")) else text + "."
