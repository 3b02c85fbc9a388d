"""Every ending of a run is a report: threads that end in any way, ranks that leave, writes that fail twice.

Each test has a limit of time of its own, so that a run that hangs fails it.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path

import pytest

from helpers.command import HELPERS, command, environment, processes_of, read_report, run_ranks
from helpers.slurm import wait_until
from helpers.warm import WarmProcess

LIMIT_SECONDS = 90
FAULTY = HELPERS / "faulty.py"
PROTEIN = "ACDEFGHIKLMNPQRSTVWY" * 10


@pytest.fixture
def inputs(tmp_path):
    """30 files of two proteins each, none like another."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(30):
        records = "".join(f">{number}_{i}\n{PROTEIN[number + i :]}{'MW'[i]}\n" for i in range(2))
        (folder / f"{number:02}.fasta").write_text(records)
    return folder


def run_faulty(
    num_ranks: int | None, place: str, ending: str, rank: int, *overrides: str, is_warm: bool = True
) -> subprocess.CompletedProcess[str]:
    """Run the command, one function of which ends its thread or process on one rank."""
    words = [place, ending, rank, *overrides]
    return run_ranks(num_ranks, *words, script=FAULTY, timeout=LIMIT_SECONDS, is_warm=is_warm)


def settings(inputs: Path, out: Path) -> list[str]:
    return [
        f"input={inputs}",
        f"output_dir={out}",
        "model=esm2_t6_8M_UR50D",
        "model.weights=random",
        "device=cpu",
        "toks_per_batch=600",
    ]


def assert_accounted(report: dict, out: Path, num_files: int = 30) -> None:
    """Every record and file is accounted for, and what the report calls done is there."""
    records = report["records"]
    outcomes = ("ok", "truncated", "windowed", "skipped", "failed", "not_attempted")
    assert records["in"] == sum(records[outcome] for outcome in outcomes)
    assert len(report["files"]) + len(report["failed"]) + len(report["not_attempted"]) == num_files
    assert {entry["output"] for entry in report["files"]} <= {path.name for path in out.glob("*.pt")}


THREADS = {
    "reader": "dist_esm.pipeline.reader:Reader._announce@20",
    "collector": "dist_esm.pipeline.assembly:Assembly.add_embeddings@3",
    "writer": "dist_esm.pipeline.writer_pool:commit_together@2",
    "main": "dist_esm.pipeline.worker:finish@3",
}


@pytest.mark.parametrize(
    ("thread", "ending"),
    [
        ("reader", "SystemExit"),  # an Exception while a file is read is that file's failure
        ("reader", "pthread_exit"),
        ("collector", "SystemExit"),
        ("collector", "RuntimeError"),
        ("collector", "pthread_exit"),
        ("writer", "SystemExit"),
        ("writer", "RuntimeError"),
        ("writer", "pthread_exit"),
        ("main", "SystemExit"),  # below Python its end is that of the process
        ("main", "RuntimeError"),
    ],
)
def test_a_thread_that_ends_early_ends_the_run_as_aborted_with_its_name(thread, ending, inputs, tmp_path):
    out = tmp_path / "out"
    done = run_faulty(None, THREADS[thread], ending, 0, *settings(inputs, out))
    assert done.returncode == 1, done.stderr
    report = read_report(out)
    assert report["status"] == "aborted"
    assert f"the {thread} thread of rank 0" in report["reason"]
    if ending != "pthread_exit":
        assert ending in report["reason"]
    assert_accounted(report, out)
    if thread == "writer":
        assert_resumes(inputs, out)


def assert_resumes(inputs: Path, out: Path) -> None:
    """The same command goes on to the end."""
    again = run_faulty(None, THREADS["main"] + "9999", "SIGKILL", 0, *settings(inputs, out))
    assert again.returncode == 0, again.stderr
    assert read_report(out)["status"] == "complete"


@pytest.mark.distributed
@pytest.mark.parametrize("rank", [0, 1])
def test_a_thread_that_ends_on_one_rank_is_named_and_the_others_work_is_kept(rank, inputs, tmp_path):
    out = tmp_path / "out"
    done = run_faulty(2, THREADS["collector"], "RuntimeError", rank, *settings(inputs, out))
    assert done.returncode == 1
    report = read_report(out)
    assert report["status"] == "aborted"
    assert report["reason"] == f"the collector thread of rank {rank} ended with RuntimeError: a fault of ours"
    assert_accounted(report, out)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ending", "words"),
    [
        ("exit_code_0", "ended"),
        ("exit_code_3", "ended"),
        ("exit_code_3_seen_late", "ended"),
        ("SIGKILL", "ended before its work was done|was killed by SIGKILL"),
    ],
)
def test_a_rank_that_leaves_is_named_with_how_it_ended(ending, words, inputs, tmp_path):
    out = tmp_path / "out"
    line = settings(inputs, out)
    done = run_faulty(2, "dist_esm.pipeline.worker:finish@3", ending, 1, *line, is_warm=False)
    assert done.returncode == 1
    report = read_report(out)
    assert report["status"] == "aborted"
    assert report["reason"].startswith("rank 1 (")
    assert any(word in report["reason"] for word in words.split("|")), report["reason"]
    assert "SIGTERM" not in report["reason"]
    assert_accounted(report, out)


@pytest.mark.distributed
def test_a_rank_that_is_stopped_is_named_after_the_time_that_was_set(inputs, tmp_path):
    out = tmp_path / "out"
    words = ["dist_esm.pipeline.worker:finish@3", "SIGSTOP", "1", *settings(inputs, out)]
    line = command(2, *words, "heartbeat_timeout=6", script=FAULTY, forks=True)
    process = WarmProcess(line, environment())
    try:
        wait_until(lambda: is_aborted(out), LIMIT_SECONDS, "the report")
    finally:
        for pid in processes_of(out):  # torchrun itself gives it half a minute
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=LIMIT_SECONDS)
    assert process.returncode == 1
    report = read_report(out)
    assert report["status"] == "aborted"
    assert report["reason"].startswith("rank 1 (")
    assert "gave no sign of life for" in report["reason"]
    assert_accounted(report, out)


def is_aborted(out: Path) -> bool:
    return (out / "report.json").exists() and read_report(out)["status"] == "aborted"


def test_while_a_run_is_under_way_its_report_says_so(inputs, tmp_path):
    """Also in place of an earlier report, and when rank 0 died without a word."""
    out = tmp_path / "out"
    assert (
        run_faulty(None, THREADS["main"] + "9999", "exit_code_0", 0, *settings(inputs, out)).returncode == 0
    )
    assert read_report(out)["status"] == "complete"
    (inputs / "more.fasta").write_text(">more\nMKTAYIAKQR\n")
    done = run_faulty(None, "dist_esm.pipeline.worker:finish", "exit_code_3", 0, *settings(inputs, out))
    assert done.returncode == 3
    report = read_report(out)
    assert report["status"] == "running"
    assert len(report["files"]) == 30
    assert [Path(path).name for path in report["not_attempted"]] == ["more.fasta"]
    assert json.loads((out / "report.json").read_text())["format_version"] == 2
