"""The log file of a rank, whatever becomes of its disk."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest

from dist_esm.logs import logging_to


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk_costs_lines_of_the_log_and_nothing_else(capsys):
    with logging_to(Path("/dev/full"), 0):
        logging.getLogger("dist_esm").debug("nobody can read this")
    assert capsys.readouterr().err == ""
