"""Real gloo ranks: status, waiting without a time limit, and a start that all ranks agree on."""

from __future__ import annotations

import json
import pickle
import socket
import time
from pathlib import Path

import pytest

from dist_esm.distributed import World
from dist_esm.types import Tally, UnitResult, WorkerStatus, WrittenFile
from dist_esm.wire import WireError, decode, encode
from helpers.command import HELPERS, run_ranks
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
    assert time.monotonic() - began < 10


@pytest.mark.distributed
def test_ranks_see_each_other_and_wait_longer_than_the_timeout_of_a_collective(tmp_path):
    result = run_ranks(2, tmp_path, script=HELPERS / "ranks_status.py")
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
    result = run_ranks(
        2, f"input={PROTEINS}", f"output_dir={tmp_path / 'out'}", "toks_per_bach=100", forks=False
    )
    assert result.returncode == 1
    assert result.stderr.count("dist_esm: error:") == 1
    assert "dist_esm: error: 'toks_per_bach' is no key: did you mean toks_per_batch?\n" in result.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.distributed
def test_help_is_printed_once():
    result = run_ranks(2, "--help")
    assert result.returncode == 0
    assert result.stdout.count("usage: dist-esm") == 1
    assert "truncation_seq_length=1022" in result.stdout


@pytest.mark.distributed
def test_values_of_any_size_pass_between_ranks(tmp_path):
    """One value of torchrun's store holds at most 8 MiB."""
    done = run_ranks(2, tmp_path, script=HELPERS / "large_values.py")
    assert done.returncode == 0, done.stderr
    for rank in (0, 1):
        seen = json.loads((tmp_path / f"{rank}.json").read_text())
        assert seen["exchanged"] == [4_300_000, 4_300_001]
        assert seen["gathered"] == [[3_000_000, 0, 0], [3_000_000, 1, 1]]
        assert seen["is_equal"]
    assert json.loads((tmp_path / "0.json").read_text())["hasty"] == [[0, 50_000], [1, 50_000]]


class Harmful:
    """Runs code in whoever unpickles it."""

    def __reduce__(self):
        return (Path.touch, (Path("unpickled"),))


def test_nothing_is_made_of_a_message_but_the_data_that_is_expected(tmp_path, monkeypatch):
    """Whoever reaches torchrun's store can leave anything in it."""
    monkeypatch.chdir(tmp_path)
    written = WrittenFile("a.pt", 3, "sum")
    result = UnitResult(0, 1, (written,), "digest", Tally({"ok": 2}), 0, 1.5)
    assert decode(encode([result, {"bytes": b"\x00\xff"}]), UnitResult, WrittenFile, Tally) == [
        result,
        {"bytes": b"\x00\xff"},
    ]
    forged = [
        pickle.dumps(Harmful()),
        encode(result),
        b'{"__type__": "WrittenFile", "path": "a"}',
        b'{"__type__": "Path"}',
        b"\xff\xfe",
    ]
    for message in forged:
        with pytest.raises(WireError):
            decode(message, WrittenFile)
    assert not list(tmp_path.iterdir())
    with pytest.raises(TypeError, match="Path has no place in a message"):
        encode(Path("a"))
