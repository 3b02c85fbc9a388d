"""Processes that write a rank's outputs: the bytes of its threads, and no end of theirs is the run's."""

from __future__ import annotations

import contextlib
import logging
import os
import pickle
import signal
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_esm.config import FORMAT_NAMES, Config, DeviceKind, Format, Include, Writers
from dist_esm.distributed import World
from dist_esm.outputs import arena, builder
from dist_esm.outputs.arena import Arena
from dist_esm.outputs.work import Work
from dist_esm.pipeline import writer_processes, writing
from dist_esm.pipeline.writer_processes import MIN_WRITERS, WriterProcess, WriterProcesses, are_wanted
from dist_esm.planning import units
from helpers.command import MODEL, command, environment, read_report
from helpers.data import PROTEINS
from helpers.fasta import write_files
from helpers.intake import MANY_TEXT
from helpers.standin import ALL_KINDS, embed_directory
from helpers.warm import run_warm
from helpers.written import MOST, bytes_written, fasta, share_of, so_far

SECONDS = 60


class OfManyRuns(WriterProcesses):
    """Processes that a run does not end."""

    def end(self) -> None:
        """Go on."""


def start(
    output_format: str, num_processes: int = MIN_WRITERS, kind: type[WriterProcesses] = WriterProcesses
) -> WriterProcesses:
    """Start processes, and wait until they are ready."""
    processes = kind()
    processes.start(num_processes, Format[output_format])
    assert all(line.is_ready(SECONDS) for line in processes.lines)
    return processes


@pytest.fixture(scope="module")
def processes():
    """One for each thread; they have imported all that parquet takes, and write any format."""
    started = start("parquet", kind=OfManyRuns)
    yield started
    WriterProcesses.end(started)


@pytest.fixture
def written(monkeypatch):
    """What processes were asked for: how many outputs, and whether they wrote them."""
    asked: list[tuple[int, bool]] = []
    write = WriterProcess.write

    def noted(self, works, output_dir):
        answer = write(self, works, output_dir)
        asked.append((len(works), answer is not None))
        return answer

    monkeypatch.setattr(WriterProcess, "write", noted)
    return asked


def content_of(output_dir: Path) -> dict[str, bytes]:
    """All outputs and their records."""
    return {
        str(path.relative_to(output_dir)): path.read_bytes()
        for path in sorted(output_dir.rglob("*_ESM*"))
        if path.is_file()
    } | {
        str(path.relative_to(output_dir)): path.read_bytes()
        for folder in output_dir.glob("*_ESM*/")
        for path in sorted(folder.iterdir())
    }


@pytest.mark.parametrize("share", [1.0, 0.2], ids=["whole", "cut"])
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_processes_write_the_bytes_of_threads(tmp_path, monkeypatch, processes, written, name, share):
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 50)
    monkeypatch.setattr(arena, "LEAST_BYTES", 1)
    inputs = write_files(tmp_path / "in", a=MANY_TEXT, b=">one\nMKTAYIAKQR\n", c="")
    options = {"include": ALL_KINDS, "format": Format[name], "unit_share": share}
    for who, writers in ("threads", None), ("processes", processes):
        run = embed_directory(inputs, tmp_path / who, processes=writers, **options)
        assert run.report.status == "complete", run.report.failed
    ours, theirs = content_of(tmp_path / "processes"), content_of(tmp_path / "threads")
    assert ours.keys() == theirs.keys()
    assert len(ours) >= 3
    assert ours == theirs
    assert sum(number for number, is_done in written if is_done) == 3 + (share < 1) * 4
    assert all(is_done for _, is_done in written)


@pytest.mark.skipif(not Path("/proc/self/io").exists(), reason="no counters of written bytes")
@pytest.mark.parametrize("share", [1.0, 0.1], ids=["whole", "cut"])
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_rank_and_processes_together_write_an_output_once(tmp_path, processes, written, name, share):
    (tmp_path / "a.fasta").write_text(fasta(200))
    writers = members_of(processes._process.pid)
    before = sum(so_far("wchar", writer) for writer in writers)
    alone = World(None, 0, 1, 0, 1)
    settings = {"include": [Include.per_tok], "format": Format[name], "unit_share": share}
    in_rank = bytes_written(
        tmp_path / "a.fasta", tmp_path / "out", alone, processes, writers=Writers.processes, **settings
    )
    in_processes = sum(so_far("wchar", writer) for writer in writers) - before
    assert any(is_done for _, is_done in written)
    assert 1 <= share_of(in_rank + in_processes, tmp_path / "out") < MOST[Format[name]]


@pytest.mark.parametrize("carried", [0, 1 << 20], ids=["done here", "sent"])
def test_rows_that_found_no_room_in_the_arena_are_written_all_the_same(
    tmp_path, monkeypatch, processes, written, carried
):
    monkeypatch.setattr(writing, "CARRIED_BYTES", carried)
    monkeypatch.setattr(arena, "LEAST_BYTES", 1 << 40)
    inputs = write_files(tmp_path / "in", a=MANY_TEXT)
    run = embed_directory(inputs, tmp_path / "out", processes=processes, include=[Include.per_tok])
    assert run.report.status == "complete"
    assert [is_done for _, is_done in written] == [carried > 0]
    threads = embed_directory(inputs, tmp_path / "threads", include=[Include.per_tok])
    assert threads.report.status == "complete"
    assert content_of(tmp_path / "out") == content_of(tmp_path / "threads")


def test_an_output_that_cannot_be_written_says_what_a_thread_says(tmp_path, processes, written):
    inputs = write_files(tmp_path / "in", a=">1\nMKTAY\n", b=">2\nMKTAYI\n")
    said = []
    for who, writers in ("threads", None), ("processes", processes):
        (tmp_path / who / "a_ESM").mkdir(parents=True)
        (tmp_path / who / "a_ESM" / "mine.txt").write_text("kept")
        run = embed_directory(
            inputs, tmp_path / who, processes=writers, format=Format["fair_esm"], include=ALL_KINDS
        )
        said.append(run.failure("a.fasta").replace(str(tmp_path / who), ""))
        assert (tmp_path / who / "a_ESM" / "mine.txt").read_text() == "kept"
        assert sorted(path.name for path in (tmp_path / who).glob("b_ESM/*.pt")) == ["2.pt"]
    assert said[0] == said[1]
    assert "move it away" in said[0]
    assert any(is_done for _, is_done in written)


@pytest.mark.parametrize(
    ("after", "share"), [(0, 1.0), (1, 0.01)], ids=["before the first output", "on the way, cut files"]
)
def test_processes_that_are_killed_leave_their_work_to_threads(tmp_path, monkeypatch, caplog, after, share):
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 500)
    done = []
    write = WriterProcess.write

    def until_killed(self, works, output_dir):
        if len(done) == after:
            os.killpg(started._process.pid, signal.SIGKILL)
        done.append(works)
        return write(self, works, output_dir)

    monkeypatch.setattr(WriterProcess, "write", until_killed)
    inputs = write_files(tmp_path / "in", **{f"f{i}": MANY_TEXT[: 1000 + 100 * i] for i in range(30)})
    with start("pt") as started, caplog.at_level(logging.WARNING, "dist_esm"):
        run = embed_directory(
            inputs, tmp_path / "out", processes=started, include=ALL_KINDS, unit_share=share
        )
    assert run.report.status == "complete"
    said = [record.getMessage() for record in caplog.records if "gone" in record.getMessage()]
    assert said == [
        "rank 0: a process that writes outputs is gone (killed, or out of memory): "
        "a thread of this rank writes in its place"
    ]
    threads = embed_directory(inputs, tmp_path / "threads", include=ALL_KINDS)
    assert threads.report.status == "complete"
    assert content_of(tmp_path / "out") == content_of(tmp_path / "threads")
    assert not list((tmp_path / "out" / ".dist_esm" / "scratch").rglob("*.*/*"))


def test_a_process_that_is_not_ready_is_not_waited_for(tmp_path):
    ours, other = socket.socketpair()
    with other:
        line = WriterProcess(ours, Arena.make(1 << 16))
        assert not line.is_ready()
        assert line.write([], tmp_path) is None
        line.close()


def test_a_system_without_processes_to_give_leaves_it_to_threads(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(writer_processes.sys, "executable", str(tmp_path / "no python"))
    none = WriterProcesses()
    none.start(2, Format["pt"])
    assert none.lines == []
    inputs = write_files(tmp_path / "in", a=MANY_TEXT)
    with caplog.at_level(logging.WARNING, "dist_esm"):
        run = embed_directory(inputs, tmp_path / "out", processes=none)
    assert run.report.status == "complete"
    assert "threads write the outputs, no processes can be started: " in caplog.text


def test_nothing_is_put_in_place_for_a_rank_that_is_gone(tmp_path):
    """Another launch may be at work there by then."""
    ours, other = socket.socketpair()
    ours.close()
    line, memory = Connection(other.detach()), Arena.make(1 << 16)
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    asked = writing.pack_work([Work(partial(stage_one, tmp_path, scratch), True)], tmp_path, memory)
    with pytest.raises(EOFError):
        writing.answer_one(asked, line, memory)
    assert [path.name for path in tmp_path.iterdir()] == ["scratch"]
    assert len(list(scratch.iterdir())) == 1


def stage_one(output_dir: Path, scratch: Path) -> builder.Staged:
    """Write an output of one number under a temporary name."""
    (scratch / "0").write_bytes(b"1")
    return builder.Staged(output_dir / "a_ESM", "", [(scratch / "0", output_dir / "a_ESM")])


def test_rows_in_the_arena_are_not_sent(monkeypatch):
    monkeypatch.setattr(arena, "LEAST_BYTES", 1)
    memory = Arena.make(1 << 20)
    rows = memory.take((1000, 100), np.dtype(np.float16))
    rows[:] = 3
    sent = writing.pack_work([Work(partial(torch.sum, torch.from_numpy(rows[5:])), True)], Path(), memory)
    assert len(sent) < 1000


@pytest.mark.parametrize(
    ("writers", "device", "has_gpu", "wants"),
    [
        ("auto", "auto", True, True),
        ("auto", "auto", False, False),
        ("auto", "cpu", True, False),
        ("threads", "auto", True, False),
        ("processes", "cpu", False, True),
    ],
)
def test_they_are_wanted_where_there_may_be_a_gpu(tmp_path, monkeypatch, writers, device, has_gpu, wants):
    place = tmp_path / "gpu"
    if has_gpu:
        place.touch()
    monkeypatch.setattr(writer_processes, "GPU_FILES", (str(tmp_path / "other"), str(place)))
    config = Config(input="x", writers=Writers[writers], device=DeviceKind[device])
    assert are_wanted(config) is wants


def settings_of(checkpoint: Path, output_dir: Path) -> list[str]:
    """Words of a run of several seconds whose outputs are written by processes."""
    return [
        f"input={PROTEINS}",
        f"output_dir={output_dir}",
        MODEL,
        f"model.weights={checkpoint}",
        "include=[mean,per_tok]",
        "writers=processes",
    ]


def sessions_of(parent: int) -> set[int]:
    """Sessions that children of a process have begun."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            if int(fields[1]) == parent and int(fields[3]) == int(path.name):
                found.add(int(path.name))
    return found


def members_of(session: int) -> list[int]:
    """Processes of a session that are not dead."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            fields = (path / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session and fields[0] != "Z":
                found.append(int(path.name))
    return found


def wait_for(condition) -> bool:
    """Wait until something is so; false if it takes too long."""
    deadline = time.monotonic() + SECONDS
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    return bool(condition())


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM], ids=lambda how: how.name)
def test_they_end_with_the_rank_however_it_ends(tmp_path, checkpoint_8m, how):
    proteins = "".join(f">{number}\n{'MKTAYIAKQR' * 50}\n" for number in range(5000))
    inputs = write_files(tmp_path / "in", a=proteins)
    words = [*settings_of(checkpoint_8m, tmp_path / "out")[1:], f"input={inputs}", "dedupe=false"]
    line = command(None, *words)
    with subprocess.Popen(line, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE) as rank:
        assert wait_for(lambda: sessions_of(rank.pid))
        (session,) = sessions_of(rank.pid)
        assert wait_for(lambda: len(members_of(session)) > 1), "it has not forked"
        rank.send_signal(how)
        rank.communicate(timeout=SECONDS)
    assert wait_for(lambda: not members_of(session))


def test_a_rank_of_the_command_has_its_outputs_written_by_them(tmp_path, checkpoint_8m):
    settings = settings_of(checkpoint_8m, tmp_path / "out")
    done = run_warm(command(1, *settings), environment(), SECONDS)
    assert done.returncode == 0, done.stderr
    assert "gone" not in done.stderr
    assert read_report(tmp_path / "out")["status"] == "complete"
    threads = [*settings_of(checkpoint_8m, tmp_path / "threads")[:-1], "writers=threads"]
    assert run_warm(command(None, *threads), environment(), SECONDS).returncode == 0
    assert content_of(tmp_path / "out") == content_of(tmp_path / "threads")


@pytest.mark.parametrize("is_early", [True, False], ids=["while they import", "when they are ready"])
def test_signals_to_all_processes_of_a_run_are_the_ranks_alone(is_early):
    with WriterProcesses() as started:
        started.start(1, Format["pt"])
        (line,) = started.lines
        if is_early:
            time.sleep(0.5)  # so long Python itself takes at most
        else:
            assert line.is_ready(SECONDS)
        for number in writer_processes.IGNORED:
            os.killpg(started._process.pid, number)
        assert line.is_ready(SECONDS)
        assert line.write([], Path()) == []


READY = """
from pathlib import Path
from dist_esm.config import Format
from dist_esm.pipeline.writer_processes import WriterProcesses
with WriterProcesses() as started:
    started.start(1, Format["pt"])
    print(started.problem, [line.is_ready(60) for line in started.lines])
"""


@pytest.mark.parametrize("shell", ["", " <&-", " <&- 2>&-"], ids=["open", "no stdin", "no stdin, no stderr"])
def test_they_start_whatever_is_in_the_folder_and_whatever_is_closed(tmp_path, shell):
    (tmp_path / "queue.py").write_text("raise RuntimeError('this is not the queue')")
    line = f'{sys.executable} -P -c "$0"{shell}'
    done = subprocess.run(
        ["bash", "-c", line, READY],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=SECONDS,
        check=False,
    )
    assert (done.stdout, done.stderr, done.returncode) == ("None [True]\n", "", 0)


KILLED = """
import os, signal, sys, threading, time
from functools import partial
from pathlib import Path
from dist_esm.config import Format
from dist_esm.outputs.work import Work
from dist_esm.pipeline.writer_processes import WriterProcesses
started = WriterProcesses()
started.start(1, Format["pt"])
(line,) = started.lines
assert line.is_ready(60)
threading.Thread(target=line.write, args=([Work(partial(time.sleep, 600), True)], Path())).start()
time.sleep(0.5)
print(started._process.pid, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_one_that_writes_does_not_outlive_the_rank():
    """It would write beside the next launch."""
    done = subprocess.run([sys.executable, "-c", KILLED], stdout=subprocess.PIPE, text=True, check=False)
    assert done.returncode == -signal.SIGKILL
    session = int(done.stdout)
    assert wait_for(lambda: not members_of(session))


class OddError(Exception):
    """Its arguments are not those that it is made with."""

    def __init__(self, one: int, other: int) -> None:
        super().__init__(f"{one} and {other}")


class UnpicklableError(Exception):
    """It holds what no other process can have."""

    def __init__(self) -> None:
        super().__init__("a lock")
        self.lock = threading.Lock()


def test_an_exception_that_cannot_be_sent_fails_its_output_with_its_words():
    sent = writing.sendable([OddError(1, 2), UnpicklableError(), OSError(28, "full"), ValueError("no")])
    got = pickle.loads(pickle.dumps(sent))
    assert [str(error) for error in got] == [
        "OddError: 1 and 2",
        "UnpicklableError: a lock",
        "[Errno 28] full",
        "no",
    ]
    assert isinstance(got[2], OSError)
    assert got[2].errno == 28


def test_what_a_process_can_make_nothing_of_is_done_by_the_thread():
    with start("pt", 1) as started:
        (line,) = started.lines
        assert line.write(no_works(), Path()) is None
        assert line.write([], Path()) == []


class Unreadable:
    """Nothing that another process can make again."""

    def __reduce__(self):
        return int, ("not a number",)


def no_works() -> list[Work]:
    """Work whose arguments cannot be read again."""
    return [Work(partial(print, Unreadable()), True)]
