"""A protein that kills its process is found out, named and set aside; everything else gets done."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest

from helpers.command import HELPERS, read_report, run_ranks

POISONED = HELPERS / "poisoned.py"
POISON = "MWWWWWWWWWWWWK"
PROTEIN = "ACDEFGHIKLMNPQRSTVWY" * 6
LIMIT_SECONDS = 200


@pytest.fixture
def inputs(tmp_path):
    """20 files of three proteins each; the tenth has the poison in its middle."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(20):
        sequences = [PROTEIN[number + i :] for i in range(3)]
        if number == 9:
            sequences[1] = POISON
        text = "".join(f">{number}_{i}\n{residues}\n" for i, residues in enumerate(sequences))
        (folder / f"{number:02}.fasta").write_text(text)
    return folder


def launch(
    num_ranks: int | None, where: str, ending: str, inputs: Path, out: Path, max_restarts: int = 0
) -> subprocess.CompletedProcess[str]:
    settings = [
        f"input={inputs}",
        f"output_dir={out}",
        "model=esm2_t6_8M_UR50D",
        "model.weights=random",
        "device=cpu",
        "toks_per_batch=500",
    ]
    words = [where, ending, POISON, *settings]
    torchrun = [f"--max-restarts={max_restarts}"]
    return run_ranks(num_ranks, *words, script=POISONED, torchrun=torchrun, timeout=LIMIT_SECONDS)


def assert_only_the_poison_failed(out: Path, protein: str) -> None:
    report = read_report(out)
    assert report["status"] == "partial"
    (failure,) = report["failed"]
    assert Path(failure["path"]).name == "09.fasta"
    assert failure["error_type"] == "QuarantinedError"
    assert failure["error_message"].startswith(protein), failure["error_message"]
    assert len(list(out.glob("*.pt"))) == 19
    records = report["records"]
    assert (records["in"], records["ok"], records["failed"]) == (60, 57, 3)


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("where", "ending", "protein"),
    [("forward", "SIGSEGV", "9_1: the process"), ("reader", "SIGKILL", "the process")],
)
def test_within_one_command_that_may_restart_all_but_the_poison_is_done(
    where, ending, protein, inputs, tmp_path
):
    out = tmp_path / "out"
    done = launch(2, where, ending, inputs, out, max_restarts=3)
    assert_only_the_poison_failed(out, protein)
    assert "09.fasta was in hand when a process died: it runs alone" in done.stderr


@pytest.mark.distributed
def test_over_launches_of_two_ranks_the_third_is_through(inputs, tmp_path):
    out = tmp_path / "out"
    assert launch(2, "forward", "exit_code_3", inputs, out).returncode == 1
    assert read_report(out)["status"] in ("aborted", "running"), "running: rank 0 is the one that died"
    assert launch(2, "forward", "exit_code_3", inputs, out).returncode == 1
    suspects = json.loads((out / ".dist_esm" / "suspects.json").read_text())["units"]
    assert any(name.endswith("09_ESM") for name in suspects)
    assert len(list(out.glob("*.pt"))) >= 20 - len(suspects), "suspects come last"
    launch(2, "forward", "exit_code_3", inputs, out)
    assert_only_the_poison_failed(out, "9_1: the process")
    (out / ".dist_esm" / "suspects.json").unlink()
    healthy = launch(2, "forward", "exit_code_0", inputs / "00.fasta", out)
    assert healthy.returncode == 0, healthy.stderr


@pytest.mark.distributed
def test_a_file_that_fails_restarts_nothing(inputs, tmp_path):
    (inputs / "no.fasta").write_text("this is no FASTA")
    done = launch(2, "forward", "exit_code_3", inputs / "no.fasta", tmp_path / "out", max_restarts=2)
    assert done.returncode == 0, "torchrun would start the ranks again for any other code"
    assert read_report(tmp_path / "out")["status"] == "partial"
    assert done.stdout.count("partial: 0 of 1 files embedded") == 1


@pytest.mark.slow
def test_over_launches_of_one_process_that_nobody_sees_die_the_fifth_is_through(inputs, tmp_path):
    """A process alone may have been killed by a person, so it takes more deaths to blame a protein."""
    out = tmp_path / "out"
    for _ in range(4):
        assert launch(None, "forward", "SIGKILL", inputs, out).returncode == -9
    launch(None, "forward", "SIGKILL", inputs, out)
    assert_only_the_poison_failed(out, "9_1: the process")
