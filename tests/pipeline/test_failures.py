"""Only failures of files in a row abort a run."""

from __future__ import annotations

import pytest

from dist_esm.pipeline.failures import run_around
from helpers.fasta import write_files
from helpers.standin import accounts_add_up, embed_directory


@pytest.mark.parametrize(
    ("names", "is_aborted"), [("bbb", True), ("bgbb", False), ("bbgbbb", True), ("bbgbb", False)]
)
def test_only_failures_in_a_row_abort(tmp_path, names, is_aborted):
    """In the order of the bin, though good files end later than bad ones.

    In `names` b is bad and g is good. Each file has fewer records than the last.
    """
    inputs = tmp_path / "in"
    inputs.mkdir()
    for i, kind in enumerate(names):
        text = ">x\nMKTAY\n" * (20 - i)
        (inputs / f"{i}.fasta").write_text(text + (f">y\n{'W' * (i + 3)}\n" if kind == "b" else ">y\nMK\n"))
    poison = ["W" * (i + 3) for i in range(len(names))]
    run = embed_directory(inputs, tmp_path / "out", poison, max_consecutive_failures=3)
    assert (run.report.status == "aborted") is is_aborted
    assert accounts_add_up(run.report)
    assert len(run.report.failed) == names.count("b")


def test_files_that_cannot_be_read_say_nothing_of_the_device(tmp_path):
    """However many there are in a row, such as FASTQ files of another name."""
    bad = {f"bad{i}": f"@read{i}\nACGT\n+\nIIII\n" for i in range(5)}
    inputs = write_files(tmp_path / "in", **bad, good=">c\nMKT\n")
    run = embed_directory(inputs, tmp_path / "out", max_consecutive_failures=1)
    assert (run.report.status, len(run.report.failed), run.outputs()) == ("partial", 5, ["good_ESM"])
    assert accounts_add_up(run.report)


def test_units_of_one_broken_file_are_one_failure(tmp_path, monkeypatch):
    """A large file that is cut and has a fault in every slice counts once towards the failures in a row."""
    monkeypatch.setattr("dist_esm.planning.units.MIN_UNIT_BYTES", 64)
    inputs = write_files(tmp_path / "in", broken=">a\nMKT\n>b\nWWWW\n" * 40, good=">c\nMKT\n")
    run = embed_directory(inputs, tmp_path / "out", ["WWWW"], max_consecutive_failures=2, unit_share=0.1)
    assert len(run.plan.units) > 5
    assert (run.report.status, len(run.report.failed), run.outputs()) == ("partial", 1, ["good_ESM"])


def test_neighbouring_failures_are_found_on_both_sides():
    assert run_around({1, 2, 4, 5, 6, 9}, 5) == range(4, 7)
    assert run_around({3}, 3) == range(3, 4)
