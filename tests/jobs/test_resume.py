"""The journal: what is done is skipped, what is damaged is done again, and settings are never mixed."""

from __future__ import annotations

import fcntl
import os
import shutil
from pathlib import Path

import pytest

from helpers.command import MODEL, read_report, run_ranks
from helpers.compare import digests
from helpers.data import PROTEINS
from helpers.fasta import write_fasta


@pytest.fixture(scope="module")
def finished(tmp_path_factory, checkpoint_8m):
    """A finished run over a copy of the test proteins."""
    folder = tmp_path_factory.mktemp("finished")
    shutil.copytree(PROTEINS, folder / "in")
    result = run(folder, checkpoint_8m)
    assert result.returncode == 0, result.stderr
    return folder


def run(folder: Path, checkpoint: Path, *overrides: str, num_ranks: int | None = None):
    return run_ranks(
        num_ranks,
        f"input={folder / 'in'}",
        f"output_dir={folder / 'out'}",
        MODEL,
        f"model.weights={checkpoint}",
        *overrides,
    )


@pytest.fixture
def folder(finished, tmp_path):
    """A copy of the finished run to break."""
    return Path(shutil.copytree(finished, tmp_path / "copy"))


def resumed(folder: Path) -> dict[str, bool]:
    return {entry["output"]: entry["resumed"] for entry in read_report(folder / "out")["files"]}


@pytest.mark.distributed
def test_only_what_is_missing_or_damaged_is_done_again_by_any_number_of_ranks(
    folder, finished, checkpoint_8m
):
    out = folder / "out"
    damaged = bytearray((out / "large_ESM.pt").read_bytes())
    damaged[len(damaged) // 2] ^= 1
    (out / "large_ESM.pt").write_bytes(damaged)
    (out / "medium_ESM.pt").unlink()
    (journal,) = (out / ".dist_esm" / "journal").glob("*.jsonl")
    lines = journal.read_bytes().splitlines(keepends=True)
    torn = next(line for line in lines if b"tiny_ESM" in line)
    journal.write_bytes(b"".join(line for line in lines if line != torn) + torn[: len(torn) // 2])
    leftover = out / ".dist_esm" / "scratch" / "00000000000000000001.00000" / "7"
    leftover.parent.mkdir(parents=True)
    leftover.write_bytes(b"half")
    of_others = [out / "viruses" / ".tiny_ESM.pt.123.tmp", out / ".notes.456.tmp"]
    for path in of_others:
        path.write_bytes(b"an editor's")
    result = run(folder, checkpoint_8m, num_ranks=3)
    assert result.returncode == 0, result.stderr
    assert resumed(folder) == {
        "large_ESM.pt": False,
        "medium_ESM.pt": False,
        "viruses/small_ESM.pt": True,
        "viruses/tiny_ESM.pt": False,
    }
    assert digests(out) == digests(finished / "out")
    assert not leftover.exists()
    launches = {path.name.split(".")[0] for path in (out / ".dist_esm" / "journal").iterdir()}
    assert launches == {f"{number:020d}" for number in (1, 2)}, "all ranks of a launch have its number"
    assert all(path.exists() for path in of_others)
    again = run(folder, checkpoint_8m)
    assert set(resumed(folder).values()) == {True}
    assert "4 by earlier launches" in again.stdout
    assert read_report(out)["records"] == read_report(finished / "out")["records"]


def test_an_input_with_other_content_is_done_again_even_with_the_same_size_and_time(folder, checkpoint_8m):
    path = folder / "in" / "medium.faa"
    stat = path.stat()
    text = path.read_text()
    path.write_text(text[:-2] + ("A" if text[-2] != "A" else "G") + text[-1:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    before = digests(folder / "out")
    assert run(folder, checkpoint_8m).returncode == 0
    after = digests(folder / "out")
    assert {name for name in after if after[name] != before[name]} == {"medium_ESM.pt"}
    assert resumed(folder)["medium_ESM.pt"] is False


@pytest.mark.parametrize(
    ("suffix", "shares"), [("fasta", (0.01, 1)), ("fasta.gz", (1, 0.01)), ("fasta.gz", (0.01, 0.5))]
)
def test_a_finished_file_stays_finished_however_it_would_be_cut_now(tmp_path, checkpoint_8m, suffix, shares):
    """As when inputs were added, and a file is another share of them."""
    records = [f">r{i}\n{'MKTAYIAKQR' * 20}\n" for i in range(1500)]
    path = tmp_path / "in" / f"a.{suffix}"
    path.parent.mkdir()
    write_fasta(path, "".join(records))
    before, now = (f"unit_share={share}" for share in shares)
    assert run(tmp_path, checkpoint_8m, before).returncode == 0
    first = read_report(tmp_path / "out")
    assert run(tmp_path, checkpoint_8m, now).returncode == 0
    again = read_report(tmp_path / "out")
    assert again["files"][0]["units"] != first["files"][0]["units"], "it would be cut alike"
    assert resumed(tmp_path) == {"a_ESM.pt": True}
    assert again["records"] == first["records"]
    assert again["records"]["in"] == 1500
    write_fasta(path, "".join(records) + ">one_more\nMKT\n")
    assert run(tmp_path, checkpoint_8m, now).returncode == 0
    assert resumed(tmp_path) == {"a_ESM.pt": False}
    assert read_report(tmp_path / "out")["records"]["ok"] == 1501


def test_an_input_that_only_got_a_new_time_is_not_done_again(folder, checkpoint_8m):
    os.utime(folder / "in" / "large.fasta")
    assert run(folder, checkpoint_8m).returncode == 0
    assert set(resumed(folder).values()) == {True}


def test_other_settings_are_refused_in_one_line_that_says_what_changed(folder, finished, checkpoint_8m):
    result = run(folder, checkpoint_8m, "truncation_seq_length=50", "include=[mean,bos]")
    assert result.returncode == 1
    (line,) = [line for line in result.stderr.splitlines() if "error" in line]
    assert "truncation_seq_length=1022 before, 50 now" in line
    assert "include=['mean'] before, ['mean', 'bos'] now" in line
    assert "resume=false" in line
    assert digests(folder / "out") == digests(finished / "out")
    other = run(folder, Path("random"))
    assert other.returncode == 1
    assert "weights=" in other.stderr


def test_starting_over_says_what_it_removes_and_does_all_again(folder, checkpoint_8m):
    (folder / "in" / "medium.faa").unlink()
    result = run(folder, checkpoint_8m, "truncation_seq_length=50", "resume=false")
    assert result.returncode == 0
    assert "starting over, 4 finished outputs in" in result.stderr
    assert set(resumed(folder).values()) == {False}
    assert not (folder / "out" / "medium_ESM.pt").exists(), "an output of other settings must not stay"
    assert (folder / "out" / "large_ESM.records.tsv").exists()
    assert run(folder, checkpoint_8m, "resume=false").returncode == 0
    assert not list((folder / "out").rglob("*.records.tsv")), "nor what was noted of it"


def test_a_failed_file_is_tried_again(folder, checkpoint_8m):
    bad = folder / "in" / "bad.fasta"
    bad.write_text("no header\n")
    assert run(folder, checkpoint_8m).returncode == 2
    bad.write_text(">a\nMKT\n")
    assert run(folder, checkpoint_8m).returncode == 0
    assert resumed(folder)["bad_ESM.pt"] is False
    assert not (folder / "out" / "failed_files.txt").exists()


def test_a_second_run_in_the_same_directory_is_refused(folder, checkpoint_8m):
    with open(folder / "out" / ".dist_esm" / "lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        result = run(folder, checkpoint_8m)
    assert result.returncode == 1
    assert "is in use by another run" in result.stderr
