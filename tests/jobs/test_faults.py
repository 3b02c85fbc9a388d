"""Real faults under a real run: full disks, and inputs and outputs that go away meanwhile."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import time
from pathlib import Path

import pytest
import torch

from helpers.command import MODEL, command, environment, read_report, run_meanwhile, run_ranks
from helpers.data import PROTEINS
from helpers.fasta import read_sequences
from helpers.standin import embed_directory, expected
from helpers.warm import WarmProcess


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one mebibyte."""
    place = tmp_path / "disk"
    place.mkdir()
    if shutil.which("mount") is None or os.geteuid() != 0:
        pytest.skip("mounting a small file system needs root")
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True, check=False
    ).returncode:
        pytest.skip("this machine does not let a small file system be mounted")
    yield place
    subprocess.run(["umount", "-l", place], check=True)


def test_a_full_disk_fails_the_files_that_do_not_fit_and_resumes_when_there_is_room(
    small_disk, tmp_path, checkpoint_8m
):
    """One file whose residues are larger than the disk among three that fit.

    When the run starts there is room for all, else it would not start; then others take it.
    """
    subprocess.run(["mount", "-o", "remount,size=16m", small_disk], check=True)
    (tmp_path / "in").mkdir()
    protein = next(iter(read_sequences(PROTEINS / "large.fasta").values()))
    (tmp_path / "in" / "big.fasta").write_text("".join(f">{i}\n{protein}\n" for i in range(20)))
    for i in range(3):
        (tmp_path / "in" / f"small{i}.fasta").write_text(f">a\n{protein[i:]}\n")
    settings = [
        f"input={tmp_path / 'in'}",
        f"output_dir={small_disk / 'out'}",
        MODEL,
        f"model.weights={checkpoint_8m}",
        "include=[per_tok]",
    ]
    result = run_meanwhile(
        "dist_esm.jobs.embed:embed_bin", f"mount -o remount,size=1m {small_disk}", *settings
    )
    assert result.returncode == 2, result.stderr
    report = read_report(small_disk / "out")
    failed = {Path(failure["path"]).name: failure["error_message"] for failure in report["failed"]}
    assert "big.fasta" in failed
    assert all("No space left on device" in message for message in failed.values())
    done = [entry["output"] for entry in report["files"]]
    assert done, "what fits is written, though a file that does not fit is written beside it"
    assert len(done) + len(failed) == 4
    assert not list((small_disk / "out").glob(".*.tmp"))
    subprocess.run(["mount", "-o", "remount,size=64m", small_disk], check=True)
    assert run_ranks(None, *settings).returncode == 0
    report = read_report(small_disk / "out")
    assert {entry["output"] for entry in report["files"]} == {
        "big_ESM.pt",
        *(f"small{i}_ESM.pt" for i in range(3)),
    }
    assert {entry["output"] for entry in report["files"] if entry["resumed"]} == set(done)


def test_a_disk_without_room_for_the_report_is_one_clear_line(small_disk, checkpoint_8m):
    """The disk is filled when all outputs are in place."""
    settings = [
        f"input={PROTEINS}",
        f"output_dir={small_disk / 'out'}",
        MODEL,
        f"model.weights={checkpoint_8m}",
    ]
    result = run_meanwhile(
        "dist_esm.jobs.embed:conclude", f"head -c 2M /dev/zero > {small_disk}/others", *settings
    )
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    assert (
        f"stopped: the report cannot be written to {small_disk / 'out'} (No space left on device)"
        in result.stdout
    )
    (small_disk / "others").unlink()
    again = run_ranks(None, *settings)
    assert again.returncode == 0
    assert "4 of 4 files embedded (4 by earlier launches)" in again.stdout


def test_a_read_only_output_directory_is_refused_before_any_work(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    result = run_ranks(
        None, f"input={PROTEINS}", f"output_dir={small_disk / 'out'}", MODEL, "model.weights=random"
    )
    assert result.returncode == 1
    assert (
        f"output_dir={small_disk / 'out'} cannot be written to (Read-only file system): "
        "name a directory that can" in result.stderr
    )


def test_an_output_path_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "taken").write_text("")
    result = run_ranks(
        None, f"input={PROTEINS}", f"output_dir={tmp_path / 'taken'}", MODEL, "model.weights=random"
    )
    assert result.returncode == 1
    assert "taken cannot be written to" in result.stderr


def test_an_output_directory_that_is_removed_leaves_no_file_called_done_that_is_not_there(
    tmp_path, checkpoint_8m
):
    (tmp_path / "in").mkdir()
    for i in range(30):
        text = "".join(
            f">{name}\n{sequence[i:]}{sequence}\n"
            for name, sequence in read_sequences(PROTEINS / "medium.faa").items()
        )
        (tmp_path / "in" / f"{i:02}.fasta").write_text(text)
    out = tmp_path / "out"
    settings = [
        f"input={tmp_path / 'in'}",
        f"output_dir={out}",
        MODEL,
        f"model.weights={checkpoint_8m}",
        "toks_per_batch=1000",
    ]
    process = WarmProcess(command(None, *settings), environment())
    deadline = time.monotonic() + 60
    while len(list(out.glob("*.pt"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    with contextlib.suppress(OSError):  # the run may write into it meanwhile
        shutil.rmtree(out)
    shutil.rmtree(out, ignore_errors=True)
    _, said = process.communicate(timeout=120)
    assert process.returncode in (1, 2)
    assert "Traceback" not in said
    report = read_report(out)
    assert all((out / entry["output"]).exists() for entry in report["files"])
    assert any("removed" in failure["error_message"] for failure in report["failed"])
    assert len(report["files"]) + len(report["failed"]) + len(report["not_attempted"]) == 30
    assert run_ranks(None, *settings).returncode == 0
    assert len(list(out.glob("*.pt"))) == 30


@pytest.mark.parametrize("fault", ["removed", "changed", "cut off"])
def test_an_input_that_goes_away_after_planning_fails_alone(tmp_path, fault):
    (tmp_path / "in").mkdir()
    for name in "abc":
        (tmp_path / "in" / f"{name}.fasta").write_text(f">{name}\nMKTAY{name.upper()}\n")
    victim = tmp_path / "in" / "b.fasta"

    def tamper():
        if fault == "removed":
            victim.unlink()
        elif fault == "changed":
            victim.write_text(">b\nWWWWWW\n>c\nGGG\n")
        else:
            os.truncate(victim, 1)

    run = embed_directory(tmp_path / "in", tmp_path / "out", after_plan=tamper)
    assert [Path(failure.path).name for failure in run.report.failed] == ["b.fasta"]
    assert {"removed": "No such file", "changed": "was changed while", "cut off": "was changed while"}[
        fault
    ] in run.report.failed[0].error_message
    for name in "ac":
        torch.testing.assert_close(
            run.load(f"{name}_ESM")["data"][0],
            torch.from_numpy(expected(f"MKTAY{name.upper()}").mean),
            rtol=0,
            atol=0,
        )
