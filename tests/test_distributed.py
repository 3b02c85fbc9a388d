"""Real gloo ranks: status, waiting without a time limit, and a start that all ranks agree on."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time

import pytest

from dist_esm.distributed import World
from dist_esm.types import WorkerStatus
from helpers.command import HELPERS, environment, run_ranks
from helpers.data import PROTEINS


def test_a_world_of_one_needs_no_process_group(monkeypatch):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with World.connect() as world:
        assert world.get_worker_status() == {0: WorkerStatus.IDLE}
        assert world.all_gather("x") == ["x"]
        assert world.exchange("y") == ["y"]
        world.set_status(WorkerStatus.COMPLETED)
        assert world.is_complete()


def test_a_rank_whose_launcher_is_gone_does_not_wait_for_it_for_long(monkeypatch):
    """As a rank finds it that starts when torchrun has just been killed: nobody listens."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    settings = {
        "RANK": "1",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    for name, value in settings.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("dist_esm.distributed.CONNECT_SECONDS", 1.0)
    began = time.monotonic()
    with (
        pytest.raises(SystemExit, match=f"torchrun's store at 127.0.0.1:{port} does not answer"),
        World.connect(),
    ):
        pass
    assert time.monotonic() - began < 30


@pytest.mark.distributed
def test_ranks_see_each_other_and_wait_longer_than_the_timeout_of_a_collective(tmp_path):
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(HELPERS / "ranks_status.py"),
        str(tmp_path),
    ]
    result = subprocess.run(
        launch, capture_output=True, text=True, timeout=120, env=environment(), check=False
    )
    assert result.returncode == 0, result.stderr
    for rank in (0, 1):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert seen["start"] == {"0": "IDLE", "1": "IDLE"}
        assert seen["values"] == ["value of 0", "value of 1"]
        assert seen["complete_at_work"] is False
        assert seen["end"] == {"0": "COMPLETED", "1": "FAILED"}
        assert seen["complete_at_end"] is True
        assert seen["gathered"] == [{"rank": 0}, {"rank": 1}]


@pytest.mark.distributed
def test_a_wrong_key_is_said_once_and_nothing_is_written(tmp_path):
    result = run_ranks(2, f"input={PROTEINS}", f"output_dir={tmp_path / 'out'}", "toks_per_bach=100")
    assert result.returncode == 1
    assert result.stderr.count("dist_esm: error:") == 1
    assert "dist_esm: error: 'toks_per_bach' is no key: did you mean toks_per_batch?\n" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.distributed
def test_help_is_printed_once():
    result = run_ranks(2, "--help")
    assert result.returncode == 0
    assert result.stdout.count("usage: torchrun") == 1
    assert "truncation_seq_length=1022" in result.stdout
