# Copyright (C) 2025 alyxya
# SPDX-License-Identifier: AGPL-3.0-or-later
"""Ways to get a worker: one file each. All end in a socket to it."""

from mycelya_torch.backends.base import Backend, Settings

__all__ = ["Backend", "Settings", "make"]


def make(provider: str, settings: Settings) -> Backend:
    """Return the backend of a provider; nothing is started yet.

    Raises:
        ImportError: the provider's extra is not installed.
        ValueError: an option of the provider can't be used.
    """
    if provider == "local":
        from mycelya_torch.backends.local import LocalBackend as Chosen
    elif provider == "mock":
        from mycelya_torch.backends.mock import MockBackend as Chosen
    elif provider == "tcp":
        from mycelya_torch.backends.tcp import TcpBackend as Chosen
    else:
        from mycelya_torch.backends.modal import ModalBackend as Chosen
    return Chosen(settings)
