"""`job=report`: the same report of the output directory alone, also after a crash."""

from __future__ import annotations

import json
import shlex
import signal
from dataclasses import fields
from pathlib import Path

import pytest

from dist_esm.jobs.report.content import Report
from dist_esm.jobs.report.job import rebuild_report
from dist_esm.outputs.load import load
from helpers.command import HELPERS, MODEL, run_ranks
from helpers.reports import SCHEMA, checked_report
from helpers.standin import embed_directory

SMALL = ">a\nMKTAYIAKQR\n>b\nMKTAYIAKQ\n"


@pytest.fixture
def inputs(tmp_path):
    """Files that are embedded whole, cut, skipped from, and no FASTA."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.fasta").write_text(SMALL)
    (folder / "b.fasta").write_text(">long\n" + "MKTAYIAKQR" * 20 + "\n>twin\nMKTAYIAKQR\n>empty\n\n")
    records = [f">{i}\n{'ACDEFGHIKLMNPQRSTVWY'[i % 20] * (9 + i % 90)}\n" for i in range(3000)]
    (folder / "cut.fasta").write_text("".join(records))
    (folder / "no.fasta").write_text("no header\n" + ">short\nMKTAYIAKQR\n" * 1100)
    return folder


def assert_rebuilt(output_dir: Path) -> dict:
    """What is made of the directory without its reports is what was there."""
    before = checked_report(output_dir)
    failed = output_dir / "failed_files.txt"
    lines = failed.read_text() if failed.exists() else None
    for path in (output_dir / "report.json", failed):
        path.unlink(missing_ok=True)
    rebuild_report(output_dir)
    assert checked_report(output_dir) == before
    assert (failed.read_text() if failed.exists() else None) == lines
    return before


def test_the_schema_names_every_field():
    names = {field.name for field in fields(Report)}
    assert set(SCHEMA["properties"]) == {"format_version", *names}


def test_a_report_is_made_again_of_what_the_directory_holds(inputs, tmp_path):
    out = tmp_path / "out"
    embed_directory(inputs, out, unit_share=0.2, truncation_seq_length=100)
    report = assert_rebuilt(out)
    assert report["status"] == "partial"
    assert (len(report["files"]), len(report["failed"])) == (3, 1)
    assert {entry["units"] for entry in report["files"]} > {1}, "one file was cut"
    assert report["records"]["truncated"] == 1
    assert report["records"]["skipped"] == 1
    assert report["records"]["deduplicated"] > 0
    (inputs / "no.fasta").unlink()
    (inputs / "a.fasta").write_text(SMALL + ">c\nMKT\n")
    embed_directory(inputs, out, unit_share=0.2, truncation_seq_length=100)
    report = assert_rebuilt(out)
    assert report["status"] == "complete"
    assert [entry["resumed"] for entry in report["files"]] == [False, True, True]
    assert report["launch"] == 2


def test_a_file_in_parts_is_reported_again(inputs, tmp_path):
    out = tmp_path / "out"
    embed_directory(inputs / "cut.fasta", out, max_proteins_per_output=500, unit_share=0.2)
    (entry,) = assert_rebuilt(out)["files"]
    assert len(entry["outputs"]) > 6


def test_a_run_that_is_stopped_is_reported_again_with_what_is_done_of_a_file(inputs, tmp_path):
    out = tmp_path / "out"
    poison = ["A" * 9]  # in the last unit but for the one behind it, too
    settings = {"unit_share": 0.2, "max_consecutive_failures": 1, "dedupe": False, "toks_per_batch": 2000}
    embed_directory(inputs / "cut.fasta", out, poison=poison, **settings)
    report = assert_rebuilt(out)
    assert report["status"] == "aborted"
    assert report["reason"].startswith("1 files in a row failed on rank 0")


def test_an_output_that_is_gone_since_is_a_failure(inputs, tmp_path):
    out = tmp_path / "out"
    embed_directory(inputs / "a.fasta", out)
    (out / "a_ESM.pt").unlink()
    rebuild_report(out)
    report = checked_report(out)
    assert (report["status"], report["failed"][0]["error_type"]) == ("partial", "FileNotFoundError")
    assert (out / "failed_files.txt").read_text().count("\n") == 1


def test_a_run_that_is_under_way_says_so(inputs, tmp_path):
    out = tmp_path / "out"
    seen = []

    def look() -> None:
        seen.append(checked_report(out))
        rebuild_report(out)
        seen.append(checked_report(out))

    embed_directory(inputs / "a.fasta", out, after_plan=look)
    assert [report["status"] for report in seen] == ["running", "running"]
    assert [report["not_attempted"] for report in seen] == [[str(inputs / "a.fasta")]] * 2
    assert checked_report(out)["status"] == "complete"


def test_a_run_that_was_killed_is_reported_as_its_journal_has_it(inputs, tmp_path):
    """Rank 0 dies without a word when all units of the cut file are there, and the file is not."""
    out = tmp_path / "out"
    line = [
        f"input=[{','.join(str(inputs / name) for name in ('a.fasta', 'cut.fasta', 'no.fasta'))}]",
        f"output_dir={out}",
        MODEL,
        "model.weights=random",
        "device=cpu",
        "toks_per_batch=2000",
        "unit_share=0.2",
        "report=json",
    ]
    place = ["dist_esm.jobs.embed:join_file", "SIGKILL", "0"]
    done = run_ranks(None, *place, *line, script=HELPERS / "faulty.py")
    assert done.returncode == -signal.SIGKILL
    assert checked_report(out)["status"] == "running"
    (out / "report.json").unlink()
    again = run_ranks(None, "job=report", f"output_dir={out}")
    assert again.returncode == 0, again.stderr
    report = checked_report(out)
    assert report["status"] == "aborted"
    assert "killed" in report["reason"]
    assert report["unfinished"]["files"] == 1
    assert 0 < report["unfinished"]["sequences"] <= 3000
    assert f"{report['unfinished']['sequences']} proteins" in again.stdout
    assert "WEIGHTS ARE RANDOM" in again.stdout
    assert report["ranks"][0]["status"] == "FAILED"
    assert [failure["error_type"] for failure in report["failed"]] == ["FastaError"]
    loaded = load(out)
    assert len(loaded) == sum(entry["sequences"] for entry in report["files"]) == 2
    (command,) = (text.strip() for text in again.stdout.splitlines() if "-m dist_esm" in text)
    words = shlex.split(command)
    assert words[:3] == ["python", "-m", "dist_esm"]
    assert set(words[3:]) == set(line)


def test_a_directory_without_a_run_is_refused_in_one_line(tmp_path):
    refused = run_ranks(None, "job=report", f"output_dir={tmp_path}")
    assert (refused.returncode, refused.stdout) == (1, "")
    assert refused.stderr == (
        f"dist_esm: error: output_dir={tmp_path} holds no run to report on: "
        "name the output_dir of a run that has begun to embed\n"
    )
    assert not list(tmp_path.iterdir())


def test_a_launch_of_an_earlier_version_is_refused_with_what_to_do(inputs, tmp_path):
    out = tmp_path / "out"
    embed_directory(inputs / "a.fasta", out)
    (path,) = (out / ".dist_esm" / "launches").iterdir()
    content = json.loads(path.read_text())
    path.write_text(json.dumps({key: content[key] for key in ("format", "launch", "dist_esm", "inputs")}))
    with pytest.raises(ValueError, match="start the same command again, which writes a report"):
        rebuild_report(out)
    embed_directory(inputs / "a.fasta", out)
    assert assert_rebuilt(out)["files"][0]["resumed"]
