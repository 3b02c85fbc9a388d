"""What a person sees while a run works: lines where there is no terminal, a live view on one."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import struct
import termios

import pytest

from dist_esm.progress import Phase
from helpers.command import MODEL, command, environment, run_ranks

CONTROL = re.compile(r"[\x00-\x09\x0b-\x1f\x7f]")
LINE = re.compile(
    rf"\d\d:\d\d:\d\d rank 0 INFO ({'|'.join(phase.value for phase in Phase)})"
    r"( \d+\.\d%, \d of 3 files, [\d,]+ of [\d,]+ proteins)?.* so far"
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """Three files, one with a name that recolours a terminal, for some seconds of a CPU."""
    folder = tmp_path_factory.mktemp("progress") / "in"
    folder.mkdir()
    letters = "ACDEFGHIKLMNPQRSTVWY"
    for file, name in enumerate(("a.fasta", "b.fasta", "c\x1b[31m\n.fasta")):
        records = (f">{i}\n{letters[i % 20 :]}{letters[file:] * (3 + i // 4)}\n" for i in range(40))
        (folder / name).write_text("".join(records))
    return folder


def settings(inputs, out) -> list[str]:
    return [
        f"input={inputs}",
        f"output_dir={out}",
        MODEL,
        "model.weights=random",
        "device=cpu",
        "report=json",
    ]


@pytest.mark.distributed
def test_a_pipe_gets_lines_and_each_rank_a_log(inputs, tmp_path):
    out = tmp_path / "out"
    done = run_ranks(2, *settings(inputs, out), "progress_seconds=0.5", "steal=false")
    assert done.returncode == 0, done.stderr
    assert not CONTROL.search(done.stderr.replace("\t", " ")), "control characters"
    assert not CONTROL.search(done.stdout)
    lines = [line for line in done.stderr.splitlines() if " so far" in line]
    assert len(lines) >= 2
    assert all(LINE.fullmatch(line) or "left" in line or "starting" in line for line in lines), lines
    assert " rank 1 INFO" not in done.stderr
    shares = [float(share) for share in re.findall(r"embedding (\d+\.\d)%", done.stderr)]
    assert shares == sorted(shares)
    logs = sorted((out / ".dist_esm" / "logs").iterdir())
    assert [log.name for log in logs] == [f"{1:020d}.{rank:05d}.log" for rank in range(2)]
    texts = [log.read_text() for log in logs]
    for rank, text in enumerate(texts):
        assert re.search(
            rf"^\d{{4}}-\d\d-\d\d [\d:]+ rank {rank} INFO bin: \d units of \d files, \d+ proteins$",
            text,
            re.M,
        )
        assert text.count(" begins ") == text.count(" ends ") >= 1
    assert sum(text.count(" ends ") for text in texts) == 3
    state = json.loads((out / ".dist_esm" / "progress.json").read_text())
    assert (state["status"], state["share"], state["files"], state["proteins"]) == ("complete", 1.0, 3, 120)
    assert [rank["rank"] for rank in state["ranks"]] == [0, 1]


def on_terminal(line: list[str]) -> tuple[int, str]:
    """Run a command on a terminal of 120 columns; its exit code, and all that it writes."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execve(line[0], line, environment(TERM="xterm-256color", COLUMNS="120", LINES="30"))
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 120, 0, 0))
    written = b""
    while True:
        try:
            block = os.read(terminal, 1 << 16)
        except OSError:  # the terminal's other end is closed
            break
        if not block:
            break
        written += block
    os.close(terminal)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), written.decode(errors="replace")


def test_a_terminal_gets_a_live_view_that_goes_at_the_end(inputs, tmp_path):
    code, text = on_terminal(command(None, *settings(inputs, tmp_path / "out")))
    assert code == 0, text
    view, _, summary = text.rpartition("complete: 3 of 3 files embedded")
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", view)
    for words in ("device", "status", "tokens/s", "embedding", "c\\x1b[31m\\n.fasta", "/120 proteins"):
        assert words in plain, words
    assert "\x1b[31m\n" not in view
    assert view.rfind("\x1b[?25h") > view.rfind("\x1b[?25l"), "the cursor is there again"
    assert "\x1b" not in summary
    assert "bin: 3 units of 3 files, 120 proteins" in plain, "log lines stand above the view"


def test_quiet_says_how_it_ended_and_warnings(inputs, tmp_path):
    done = run_ranks(
        None, *settings(inputs / "a.fasta", tmp_path / "out"), "verbosity=quiet", "progress_seconds=0.5"
    )
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 2
    assert done.stdout.startswith("complete: 1 of 1 files embedded")
    assert "WEIGHTS ARE RANDOM" in done.stdout
    assert all(" WARNING " in line for line in done.stderr.splitlines())
