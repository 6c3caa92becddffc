# SPDX-License-Identifier: Apache-2.0
"""Loggers that stay silent until the user asks for them. Standard library only."""

import logging


def get_logger(name: str) -> logging.Logger:
    """Return the logger ``name`` with a handler that prints nothing.

    Example:
        >>> get_logger("torchworks_core.example").info("not shown")
    """
    logger = logging.getLogger(name)
    if not any(isinstance(h, logging.NullHandler) for h in logger.handlers):
        logger.addHandler(logging.NullHandler())
    return logger


class _Handler(logging.StreamHandler):
    """Marks what `enable` added."""


def enable(level: int | str = "INFO", name: str = "torchworks_core") -> logging.Handler:
    """Print the records of ``name`` and its children to stderr.

    Calling it again changes the level and adds no second handler.

    Raises:
        ValueError: ``level`` is no logging level.
    """
    logger = logging.getLogger(name)
    logger.setLevel(level)
    for handler in logger.handlers:
        if isinstance(handler, _Handler):
            return handler
    handler = _Handler()
    handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
    logger.addHandler(handler)
    return handler
