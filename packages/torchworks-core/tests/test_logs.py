# SPDX-License-Identifier: Apache-2.0
"""Silent by default; one handler after enable."""

import logging

import pytest

from torchworks_core import logs


@pytest.fixture
def name():
    name = "torchworks_core.test_logs"
    yield name
    logging.getLogger(name).handlers.clear()


def test_silent_until_enabled(name, capsys):
    logger = logs.get_logger(name)
    logger.propagate = False
    assert logs.get_logger(name).handlers == logger.handlers
    logger.warning("unseen")
    assert capsys.readouterr().err == ""
    logs.enable("WARNING", name)
    logs.enable("INFO", name)
    logger.info("seen")
    assert capsys.readouterr().err.count("seen") == 1


def test_unknown_level(name):
    with pytest.raises(ValueError, match="LOUD"):
        logs.enable("LOUD", name)
