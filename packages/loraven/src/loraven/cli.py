# SPDX-License-Identifier: Apache-2.0
"""The command ``loraven``: says what to install, or runs `loraven.commands`.

This module imports nothing of the extra ``[cli]``. A failure that the library
explains is one sentence on standard error: exit code 2 without the extra, else 1.
Ctrl-C is exit code 130.
"""

import sys
import warnings
from importlib import import_module

from torchworks_core.errors import MissingExtra, TorchworksError

__all__ = ["main"]

_NEEDED = ("rich", "tqdm", "transformers", "typer")


def main() -> None:
    """Run the command line of this process, and exit with its code."""
    with warnings.catch_warnings():
        warnings.showwarning = _warn
        try:
            _check_extra()
            from loraven.commands import app

            app(prog_name="loraven")
        except TorchworksError as error:
            print(f"loraven: {error}", file=sys.stderr)
            sys.exit(2 if isinstance(error, MissingExtra) else 1)
        except KeyboardInterrupt:
            # The imports take seconds; once a command runs, typer answers Ctrl-C.
            print("loraven: interrupted", file=sys.stderr)
            sys.exit(130)


def _warn(message: Warning | str, *_: object, **__: object) -> None:
    """Print a warning without the line of code that nobody here wrote."""
    print(f"loraven: warning: {message}", file=sys.stderr)


def _check_extra() -> None:
    for name in _NEEDED:
        try:
            import_module(name)
        except ImportError as error:
            do = "Run: pip install 'loraven[cli]'"
            raise MissingExtra("command line", f"{name} is missing", do) from error


if __name__ == "__main__":
    main()
