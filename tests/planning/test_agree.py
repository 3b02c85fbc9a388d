"""Ranks that must see the same inputs."""

from __future__ import annotations

import re
import socket

import pytest

from helpers.command import command, environment
from helpers.warm import WarmProcess


@pytest.mark.distributed
def test_ranks_that_see_different_inputs_stop_and_say_who_saw_what(tmp_path, checkpoint_8m, monkeypatch):
    for rank, text in enumerate((">a\nMKT\n", ">a\nMKTAYI\n")):
        (tmp_path / str(rank)).mkdir()
        (tmp_path / str(rank) / "a.fasta").write_text(text)
    overrides = [
        "output_dir=" + str(tmp_path / "out"),
        "model=esm2_t6_8M_UR50D",
        f"model.weights={checkpoint_8m}",
    ]
    ranks = []
    for rank in (0, 1):
        variables = {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": "29561",
        }
        monkeypatch.chdir(tmp_path / str(rank))
        ranks.append(WarmProcess(command(None, "input=a.fasta", *overrides), environment(**variables)))
    ends = [process.communicate(timeout=120) for process in ranks]
    # torchrun has seven lines for each rank that fails, so one of a host is enough.
    assert [process.returncode for process in ranks] == [1, 0]
    said = ends[0][1]
    host = re.escape(socket.gethostname())
    assert re.search(
        rf"the ranks see different inputs: \S+/0/a\.fasta has 7 bytes for rank 0 \({host}\) "
        rf"and is not there for rank 1 \({host}\): give all ranks the same files",
        said,
    )
    assert not list((tmp_path / "out").rglob("*.pt"))
