"""Runs that are interrupted end within seconds, keep and report what is done, and say how to go on."""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import dist_esm
from helpers.command import MODEL, command, environment, processes_of, read_report, run_meanwhile, run_ranks
from helpers.compare import digests
from helpers.data import PROTEINS
from helpers.warm import WarmProcess

SECONDS = 15
"""Within which an interrupted run must have ended, on a machine that may be busy."""


def make_files(folder: Path, number: int) -> None:
    """So many files of ten proteins."""
    folder.mkdir()
    protein = "ACDEFGHIKLMNPQRSTVWY" * 50
    for i in range(number):
        (folder / f"{i:02}.fasta").write_text("".join(f">{j}\n{protein[j + i :]}\n" for j in range(10)))


def interrupt(
    settings: list[str],
    output_dir: Path,
    number: signal.Signals,
    enough: int,
    rank: int | None = None,
    is_scheduler: bool = False,
) -> dict:
    """Start two ranks, send a signal when so many outputs are there, and give the report that the run leaves.

    The signal goes to torchrun, as a terminal's does, to one rank alone, or to every process, as a
    scheduler's does. In the last case ranks get torchrun's signal, too.
    """
    process = WarmProcess(command(2, *settings, forks=True), environment(), start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while len(list(output_dir.glob("*.pt"))) < enough and time.monotonic() < deadline:
            time.sleep(0.05)
        if rank is not None:
            os.kill(rank_process(output_dir, rank), number)
        elif is_scheduler:
            for pid in (process.pid, *processes_of(output_dir)):
                os.kill(pid, number)
        else:
            process.send_signal(number)  # torchrun passes it on
        began = time.monotonic()
        said, _ = process.communicate(timeout=60)
        assert time.monotonic() - began < SECONDS
        assert "run the same command again to go on from there" in said
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    return read_report(output_dir)


def rank_process(output_dir: Path, rank: int) -> int:
    """The process of a rank."""
    (found,) = [
        pid
        for pid in processes_of(output_dir)
        if f"\0RANK={rank}\0".encode() in Path(f"/proc/{pid}/environ").read_bytes()
    ]
    return found


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("number", "is_scheduler"), [(signal.SIGINT, False), (signal.SIGTERM, True)], ids=["Ctrl-C", "scancel"]
)
def test_an_interrupted_run_keeps_what_is_done_and_reports_itself_aborted(
    number, is_scheduler, tmp_path, checkpoint_8m
):
    make_files(tmp_path / "in", 40)
    settings = [
        f"input={tmp_path / 'in'}",
        f"output_dir={tmp_path / 'out'}",
        MODEL,
        f"model.weights={checkpoint_8m}",
        "toks_per_batch=2000",
    ]
    report = interrupt(settings, tmp_path / "out", number, enough=2, is_scheduler=is_scheduler)
    assert report["status"] == "aborted"
    assert f"interrupted by {number.name}" in report["reason"]
    done = {entry["output"] for entry in report["files"]}
    assert done == {path.name for path in (tmp_path / "out").glob("*.pt")}
    assert len(done) >= 2
    assert len(done) + len(report["not_attempted"]) == 40
    for name in done:
        assert len(torch.load(tmp_path / "out" / name, weights_only=True)["data"]) == 10
    assert json.loads((tmp_path / "out" / ".dist_esm" / "config.json").read_text())["toks_per_batch"] == 2000


REPEATED = """
import os, signal, sys, time
from dist_esm.stop import REPEAT_SECONDS, on_signals

said = []
with on_signals(said.append):
    for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
        os.kill(os.getpid(), number)
print(said, flush=True)
time.sleep(float(sys.argv[1]) * REPEAT_SECONDS)
os.kill(os.getpid(), signal.SIGTERM)
print("still here")
"""


@pytest.mark.parametrize(
    ("wait", "code", "rest"), [(0, 0, "still here\n"), (1.1, -signal.SIGTERM, "")], ids=["at once", "later"]
)
def test_signals_that_come_together_are_one_and_a_later_one_ends_the_process(wait, code, rest):
    """A scheduler signals every process, and torchrun passes its own on to the ranks."""
    result = subprocess.run(
        [sys.executable, "-c", REPEATED, str(wait)],
        capture_output=True,
        text=True,
        timeout=60,
        env=environment(),
        check=False,
    )
    assert (result.returncode, result.stdout) == (code, f"['interrupted by SIGTERM']\n{rest}"), result.stderr


TWICE = """
import os, signal, time
from dist_esm.stop import DOUBLE_SECONDS, on_signals

with on_signals(lambda reason: print(reason, flush=True)):
    os.kill(os.getpid(), signal.SIGINT)
    os.kill(os.getpid(), signal.SIGINT)
    time.sleep(1.5 * DOUBLE_SECONDS)
    print("still here", flush=True)
    os.kill(os.getpid(), signal.SIGINT)
    print("never here")
"""


@pytest.mark.parametrize("rank", [None, "0"], ids=["alone", "a rank"])
def test_ctrl_c_twice_ends_a_process_at_once_unless_a_launcher_passes_it_on(rank):
    extra = {} if rank is None else {"RANK": rank}
    line = [sys.executable, "-c", TWICE]
    done = subprocess.run(
        line, capture_output=True, text=True, timeout=60, env=environment(**extra), check=False
    )
    code, rest = (130, "") if rank is None else (0, "never here\n")
    assert (done.returncode, done.stdout) == (code, f"interrupted by SIGINT\nstill here\n{rest}")


@pytest.mark.distributed
def test_a_rank_that_waits_for_the_others_still_reports_when_the_run_is_interrupted(tmp_path, checkpoint_8m):
    """Rank 0 has one file of many copies and is done at once; rank 1 has all the others."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "many.fasta").write_text(">a\nMKTAYI\n" * 100)
    protein = "ACDEFGHIKLMNPQRSTVWY" * 50
    for i in range(30):
        (tmp_path / "in" / f"slow{i:02}.fasta").write_text(
            "".join(f">{j}\n{protein[j + i :]}\n" for j in range(3))
        )
    settings = [
        f"input={tmp_path / 'in'}",
        f"output_dir={tmp_path / 'out'}",
        MODEL,
        f"model.weights={checkpoint_8m}",
        "toks_per_batch=1000",
        "steal=false",
    ]
    report = interrupt(settings, tmp_path / "out", signal.SIGTERM, enough=4)
    assert report["status"] == "aborted"
    assert [rank["status"] for rank in report["ranks"]] == ["COMPLETED", "FAILED"]
    done = {entry["output"] for entry in report["files"]}
    assert "many_ESM.pt" in done
    assert done == {path.name for path in (tmp_path / "out").glob("*.pt")}
    assert len(done) + len(report["not_attempted"]) == 31


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_a_rank_that_is_interrupted_alone_ends_the_run(rank, tmp_path, checkpoint_8m):
    make_files(tmp_path / "in", 40)
    settings = [
        f"input={tmp_path / 'in'}",
        f"output_dir={tmp_path / 'out'}",
        MODEL,
        f"model.weights={checkpoint_8m}",
        "toks_per_batch=2000",
    ]
    report = interrupt(settings, tmp_path / "out", signal.SIGTERM, enough=2, rank=rank)
    assert report["status"] == "aborted"
    assert report["files"]
    assert len(report["files"]) + len(report["not_attempted"]) == 40
    assert not any(entry["resumed"] for entry in report["files"])


@pytest.mark.distributed
def test_ranks_that_torchrun_starts_again_go_on_from_the_journal(tmp_path, checkpoint_8m):
    """torchrun's store outlives them, with all that they left in it."""
    make_files(tmp_path / "in", 10)
    out = tmp_path / "out"
    line = command(
        2,
        f"input={tmp_path / 'in'}",
        f"output_dir={out}",
        MODEL,
        f"model.weights={checkpoint_8m}",
        "toks_per_batch=2000",
        torchrun=["--max-restarts=1"],
        forks=True,
    )
    process = WarmProcess(line, environment(), start_new_session=True)
    try:
        deadline = time.monotonic() + 90
        while len(list(out.glob("*.pt"))) < 2 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(rank_process(out, 1), signal.SIGKILL)
        said, errors = process.communicate(timeout=100)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, errors
    assert re.search(r"complete: 10 of 10 files embedded \(\d+ by earlier launches\)", said)
    report = read_report(out)
    assert report["status"] == "complete"
    assert [rank["status"] for rank in report["ranks"]] == ["COMPLETED"] * 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory, checkpoint_8m):
    """A finished run over a copy of the test proteins."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(PROTEINS, folder / "in")
    assert (
        run_ranks(
            None,
            f"input={folder / 'in'}",
            f"output_dir={folder / 'out'}",
            MODEL,
            f"model.weights={checkpoint_8m}",
        ).returncode
        == 0
    )
    return folder


@pytest.fixture
def half_done(finished, tmp_path, checkpoint_8m):
    """Settings and output directory of a copy of the finished run, with two more inputs that are cut."""
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    for name in ("cut_1", "cut_2"):
        (folder / "in" / f"{name}.fasta").write_text(
            "".join(f">{name}_{i}\n{'MKTAYIAKQR' * 30}\n" for i in range(600))
        )
    return [
        f"input={folder / 'in'}",
        f"output_dir={folder / 'out'}",
        MODEL,
        f"model.weights={checkpoint_8m}",
    ], folder / "out"


def test_a_run_that_is_interrupted_while_it_plans_leaves_the_report_of_what_is_done(half_done):
    settings, out = half_done
    before = (out / "report.json").read_bytes()
    result = run_meanwhile("dist_esm.jobs.embed:agree_on_plan", "kill -INT $PPID", *settings)
    assert (result.returncode, result.stdout) == (130, "")
    assert (
        result.stderr == "dist_esm: interrupted by SIGINT: what is done is kept, "
        "run the same command again to go on from there\n"
    )
    assert (out / "report.json").read_bytes() == before
    over = run_meanwhile("dist_esm.jobs.embed:agree_on_plan", "kill -INT $PPID", *settings, "resume=false")
    assert over.returncode == 130
    assert not (out / "report.json").exists(), "a report must not speak of outputs that were removed"


@pytest.mark.parametrize(
    ("place", "joined"),
    [("setup:build_engine", []), ("embed:join_file", []), ("embed:join_file", ["cut_1"])],
    ids=["loads", "joins", "joins on"],
)
def test_a_run_that_is_interrupted_while_it_loads_or_joins_reports_what_is_done(place, joined, half_done):
    settings, out = half_done
    done = digests(out)
    result = run_meanwhile(
        f"dist_esm.jobs.{place}",
        " && ".join([*(f"test -e {out / name}_ESM.pt" for name in joined), "kill -TERM $PPID"]),
        *settings,
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    report = read_report(out)
    assert (report["status"], report["reason"]) == ("aborted", "interrupted by SIGTERM")
    assert [Path(path).stem for path in report["not_attempted"]] == [
        name for name in ("cut_1", "cut_2") if name not in joined
    ]
    assert {entry["output"]: entry["resumed"] for entry in report["files"]} == dict.fromkeys(done, True) | {
        f"{name}_ESM.pt": False for name in joined
    }
    assert len(dist_esm.load(out).vectors) == 28 + 600 * len(joined)
    records = report["records"]
    assert (records["in"], records["ok"], records["not_attempted"]) == (
        1228,
        28 + 600 * len(joined),
        1200 - 600 * len(joined),
    )
    assert not list(out.rglob("*.tmp"))
    assert run_ranks(None, *settings).returncode == 0
    assert digests(out).items() >= done.items()
    for name in ("cut_1", "cut_2"):
        assert torch.load(out / f"{name}_ESM.pt", weights_only=True)["proteins"] == [
            f"{name}_{i}" for i in range(600)
        ]


def test_a_long_forward_on_a_cpu_is_not_waited_for(tmp_path, checkpoint_8m):
    """One protein takes minutes."""
    (tmp_path / "long.fasta").write_text(">titin\n" + "MKTAYIAKQR" * 8000 + "\n")
    settings = [
        f"input={tmp_path / 'long.fasta'}",
        f"output_dir={tmp_path / 'out'}",
        MODEL,
        f"model.weights={checkpoint_8m}",
        "truncation_seq_length=null",
    ]
    process = subprocess.Popen(
        command(None, *settings), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment()
    )
    try:
        while "bin: 1 units" not in (line := process.stderr.readline()):
            assert line, "ended before it began"
        time.sleep(3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        began = time.monotonic()
        said, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert time.monotonic() - began < SECONDS
    assert process.returncode == 130
    assert "aborted: 0 of 1 files" in said
    assert "Traceback" not in errors
    assert read_report(tmp_path / "out")["ranks"][0]["split_packs"] == 0
