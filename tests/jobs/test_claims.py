"""Real ranks that claim units: each is done once, and a fast rank relieves a slow one."""

from __future__ import annotations

from pathlib import Path

import pytest

from helpers.command import HELPERS, MODEL, read_report, run_ranks
from helpers.compare import digests

SLOWED = HELPERS / "slowed.py"
PROTEIN = "ACDEFGHIKLMNPQRSTVWY" * 10
LIMIT_SECONDS = 120


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """40 files of two proteins each, none like another."""
    folder = tmp_path_factory.mktemp("claims") / "in"
    folder.mkdir()
    for number in range(40):
        text = "".join(f">{number}_{i}\n{PROTEIN[number + i :]}{'MW'[i]}\n" for i in range(2))
        (folder / f"{number:02}.fasta").write_text(text)
    return folder


@pytest.fixture(scope="module")
def alone(inputs):
    out = inputs.parent / "alone"
    assert run_ranks(None, *settings(inputs, out)).returncode == 0
    return digests(out)


def settings(inputs: Path, out: Path, *more: str) -> list[str]:
    line = [f"input={inputs}", f"output_dir={out}", MODEL, "model.weights=random", "device=cpu"]
    return [*line, "toks_per_batch=450", *more]


def run_slowed(num_ranks: int, rank: int, seconds: float, *overrides: str) -> None:
    done = run_ranks(num_ranks, rank, seconds, *overrides, script=SLOWED, timeout=LIMIT_SECONDS)
    assert done.returncode == 0, done.stderr


@pytest.mark.distributed
@pytest.mark.parametrize("slow_rank", [0, 1])
def test_a_fast_rank_takes_over_what_a_slow_one_has_not_begun(slow_rank, inputs, alone, tmp_path):
    run_slowed(2, slow_rank, 1.0, *settings(inputs, tmp_path))
    report = read_report(tmp_path)
    assert report["status"] == "complete"
    assert digests(tmp_path) == alone
    slow, fast = report["ranks"][slow_rank], report["ranks"][1 - slow_rank]
    assert slow["taken_over"] == 0
    assert fast["taken_over"] >= 2, "all but what the slow one had read ahead"
    assert (slow["files"], fast["files"]) == (20 - fast["taken_over"], 20 + fast["taken_over"])
    assert sum(entry["rank"] == slow_rank for entry in report["files"]) == slow["files"]


@pytest.mark.distributed
def test_without_stealing_every_rank_does_its_own_bin(inputs, alone, tmp_path):
    run_slowed(2, 1, 0.1, *settings(inputs, tmp_path, "steal=false"))
    report = read_report(tmp_path)
    assert [(rank["files"], rank["taken_over"]) for rank in report["ranks"]] == [(20, 0), (20, 0)]
    assert digests(tmp_path) == alone


@pytest.mark.distributed
def test_more_ranks_than_files_and_files_without_proteins_end_well(inputs, tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "one.fasta").write_text(">a\nMKTAYIAKQR\n")
    (tmp_path / "in" / "none.fasta").write_text("")
    done = run_ranks(3, *settings(tmp_path / "in", tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "out")
    assert report["status"] == "complete"
    assert sum(rank["files"] for rank in report["ranks"]) == 2
