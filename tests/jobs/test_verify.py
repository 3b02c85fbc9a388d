"""job=verify on a directory that is well, and on one where everything that can be wrong is."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch

from dist_esm import load
from dist_esm.config import Format, Include
from dist_esm.jobs.verify import check_file
from dist_esm.planning.inputs import find_files
from helpers.command import MODEL, run_ranks
from helpers.data import PROTEINS
from helpers.fasta import write_fasta
from helpers.outputs import EVERYTHING, embed_text
from helpers.standin import embed_directory, finished_of, make_config


def verify(inputs: Path | str, out: Path, num_ranks: int | None = None):
    return run_ranks(num_ranks, f"input={inputs}", f"output_dir={out}", "job=verify")


@pytest.mark.distributed
def test_a_finished_directory_is_well_until_something_is_wrong(tmp_path, checkpoint_8m):
    shutil.copytree(PROTEINS, tmp_path / "in")
    (tmp_path / "in" / "bad.fasta").write_text("no header\n")
    out = tmp_path / "out"
    settings = [
        MODEL,
        f"model.weights={checkpoint_8m}",
        "include=[mean,per_tok]",
        "truncation_seq_length=50",
        "residues.unknown=skip",
    ]
    assert run_ranks(None, f"input={tmp_path / 'in'}", f"output_dir={out}", *settings).returncode == 2
    (tmp_path / "in" / "bad.fasta").unlink()
    well = verify(tmp_path / "in", out)
    assert (well.returncode, well.stdout) == (0, "ok: 4 files, 28 proteins checked, 0 findings\n")

    shutil.move(tmp_path / "in", tmp_path / "moved")
    assert verify(tmp_path / "moved", out).stdout == well.stdout
    shutil.move(tmp_path / "moved", tmp_path / "in")

    (tmp_path / "in" / "late.fasta").write_text(">a\nMKT\n")
    (tmp_path / "in" / "bad.fasta").write_text("no header\n")
    (out / "large_ESM.pt").unlink()
    with open(out / "medium_ESM.pt", "ab") as file:
        file.write(b"x")
    with open(tmp_path / "in" / "viruses" / "tiny.fas", "a") as file:
        file.write("\n>one_more\nMKT\n")
    wrong = verify(tmp_path / "in", out, num_ranks=2)
    assert wrong.returncode == 1
    assert "exitcode  : 2" in wrong.stderr
    findings = {
        Path(finding["path"]).name: finding["problem"]
        for finding in json.loads((out / "verify.json").read_text())["findings"]
    }
    assert set(findings) == {"bad.fasta", "late.fasta", "large.fasta", "medium.faa", "tiny.fas"}
    assert findings["bad.fasta"].startswith("failed: FastaError: line 1")
    assert findings["late.fasta"] == "not in the journal: no run has finished it"
    assert findings["large.fasta"] == "large_ESM.pt is missing"
    assert "with another checksum than" in findings["medium.faa"]
    assert findings["tiny.fas"] == "2 proteins, 3 are expected"
    (tmp_path / "in" / "late.fasta").unlink()
    (out / ".dist_esm" / "config.json").write_text('{"mood": "good"}')
    refused = verify(tmp_path / "in", out)
    assert refused.returncode == 1
    assert "config.json is no configuration of this version (ConfigKeyError: Key 'mood'" in refused.stderr
    assert "Traceback" not in refused.stderr


def test_two_runs_into_one_directory_are_read_back_both_and_each_is_verified_alone(tmp_path, checkpoint_8m):
    """Whatever a report says: the second run's knows nothing of the first, and may be gone or old."""
    out = tmp_path / "out"
    settings = [MODEL, f"model.weights={checkpoint_8m}"]
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.fasta").write_text(f">{name}\nMKTAY\n")
        assert run_ranks(None, f"input={tmp_path / name}", f"output_dir={out}", *settings).returncode == 0
    assert load(out).ids == ["one", "two"]
    assert load(out, run="last").ids == ["two"]
    assert verify(tmp_path / "two", out).stdout == (
        "not checked: 1 files of other runs, which input does not name: one.fasta\n"
        "ok: 1 files, 1 proteins checked, 0 findings\n"
    )
    assert json.loads((out / "verify.json").read_text())["other_runs"] == ["one.fasta"]
    both = verify(f"[{tmp_path / 'one'},{tmp_path / 'two'}]", out)
    assert (both.returncode, both.stdout) == (0, "ok: 2 files, 2 proteins checked, 0 findings\n")
    (out / "report.json").unlink()
    alone = verify(tmp_path / "one" / "one.fasta", out)
    assert alone.returncode == 0, "as after the death of rank 0, which writes the report"
    assert load(out).ids == ["one", "two"]


@pytest.mark.parametrize(
    ("suffix", "unit_share"),
    [("fasta", 0.01), ("fasta.gz", 1.0)],
    ids=["pieces that were joined", "numbered parts"],
)
def test_an_input_that_was_changed_since_is_found_though_ids_and_lengths_are_the_same(
    tmp_path, checkpoint_8m, suffix, unit_share
):
    records = [f">r{i}\n{'MKTAYIAKQR' * 20}\n" for i in range(700)]
    path = tmp_path / f"a.{suffix}"
    write_fasta(path, "".join(records))
    out = tmp_path / "out"
    parts = 300 if unit_share == 1 else 100_000
    settings = [
        MODEL,
        f"model.weights={checkpoint_8m}",
        f"unit_share={unit_share}",
        f"max_proteins_per_output={parts}",
        "include=[bos]",
    ]
    assert run_ranks(None, f"input={path}", f"output_dir={out}", *settings).returncode == 0
    assert verify(path, out).stdout == "ok: 1 files, 700 proteins checked, 0 findings\n"
    records[650] = records[650].replace("MKTAY", "MKTAW", 1)
    write_fasta(path, "".join(records))
    wrong = verify(path, out)
    assert wrong.returncode == 2
    assert wrong.stdout.startswith(f"{path}: its text is not what was embedded: it was changed since")


def test_a_directory_without_a_run_is_refused(tmp_path):
    result = verify(PROTEINS, tmp_path)
    assert result.returncode == 1
    assert "there is no finished run to verify" in result.stderr


def break_ids(content):
    content["proteins"][0], content["proteins"][1] = content["proteins"][1], content["proteins"][0]


def break_lengths(content):
    content["lengths"][0] -= 1
    content["lengths"][1] += 1


def break_value(content):
    content["mean_representations"][1][1, 2] = float("nan")


def break_shape(content):
    content["mean_representations"][1] = content["mean_representations"][1][:, :3].clone()


CASES = {
    break_ids: "protein 1 is 2, 1 is expected",
    break_lengths: "protein 1 (1) has 4 embedded residues, 5 are expected",
    break_value: "a_ESM.pt: mean of layer 1 has values that are not finite",
    break_shape: "a_ESM.pt: mean of layer 1 cannot be read: a_ESM.pt is damaged: mean of layer 1 has shape "
    "(2, 3), (2, 6) is expected: embed its input again",
}


@pytest.mark.parametrize("fault", CASES, ids=lambda fault: fault.__name__)
def test_an_output_that_was_wrong_when_it_was_written_is_found(tmp_path, fault):
    """Faults under a checksum that agrees with the journal: what a bug of the writer would leave."""
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.fasta").write_text(">1\nMKTAY\n>2\nIAKQRQI\n")
    run = embed_directory(tmp_path / "in", tmp_path / "out", include=[Include.mean, Include.per_tok])
    path = tmp_path / "out" / "a_ESM.pt"

    def findings() -> list[str]:
        config = make_config(str(tmp_path / "in"), tmp_path / "out", include=[Include.mean, Include.per_tok])
        return list(check_file(run.plan.files[0], finished_of(tmp_path / "in" / "a.fasta", path), config))

    assert findings() == []
    content = torch.load(path, weights_only=True)
    fault(content)
    torch.save(content, path)
    assert CASES[fault] in [finding.replace(str(path), path.name) for finding in findings()]


@pytest.mark.parametrize("kind", Format)
def test_verify_finds_every_record_in_its_place(tmp_path, kind):
    """Verify looks for ids, however an output makes names of them."""
    path = embed_text(tmp_path, kind, **EVERYTHING)
    config = make_config(str(tmp_path / "in"), tmp_path / "out", format=kind, **EVERYTHING)
    assert (
        list(
            check_file(
                find_files(config.input_list())[0],
                finished_of(tmp_path / "in" / "a.fasta", path),
                config,
            )
        )
        == []
    )
