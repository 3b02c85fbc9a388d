"""The main job with real ranks: the same bits from any number of them, and failures of files and runs."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from esm.data import Alphabet

from helpers.checkpoints import A8M, fair_esm_model, random_state
from helpers.command import HELPERS, MODEL, environment, read_report, run_ranks
from helpers.compare import digests, relative_error
from helpers.data import PROTEINS
from helpers.fasta import read_sequences

OUTPUTS = ["large_ESM.pt", "medium_ESM.pt", "viruses/small_ESM.pt", "viruses/tiny_ESM.pt"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory, checkpoint_8m):
    """The test proteins, embedded without torchrun, with every kind of representation."""
    output_dir = tmp_path_factory.mktemp("alone") / "out"
    result = run_ranks(None, *overrides(output_dir, checkpoint_8m))
    assert result.returncode == 0, result.stderr
    return output_dir, result


def overrides(output_dir: Path, checkpoint: Path, source: Path = PROTEINS) -> list[str]:
    layers = "repr_layers=[0,3,-1]", "include=[mean,bos,per_tok]"
    return [f"input={source}", f"output_dir={output_dir}", MODEL, f"model.weights={checkpoint}", *layers]


def test_every_number_is_fair_esms(alone):
    """Ids, means, BOS and residues of every layer asked for, held to fair-esm's own fp32 model."""
    output_dir, _ = alone
    oracle = fair_esm_model(A8M, random_state(A8M))
    convert = Alphabet.from_architecture("ESM-1b").get_batch_converter()
    num_checked = 0
    for output, source in zip(
        OUTPUTS, ("large.fasta", "medium.faa", "viruses/small.fa.gz", "viruses/tiny.fas"), strict=True
    ):
        content = torch.load(output_dir / output, weights_only=True)
        expected = read_sequences(PROTEINS / source)
        assert content["proteins"] == list(expected)
        assert content["lengths"] == [len(sequence) for sequence in expected.values()]
        for i, (name, sequence) in enumerate(expected.items()):
            with torch.inference_mode():
                hidden = oracle(convert([(name, sequence)])[2], repr_layers=[0, 3, 6])["representations"]
            for layer in (0, 3, 6):
                rows = hidden[layer][0, 1 : len(sequence) + 1]
                assert relative_error(content["mean_representations"][layer][i], rows.mean(0)) <= 1e-5
                assert relative_error(content["bos_representations"][layer][i], hidden[layer][0, 0]) <= 1e-5
                assert relative_error(content["representations"][layer][i], rows) <= 1e-5
            assert torch.equal(content["data"][i], content["mean_representations"][6][i])
            assert content["data"][i].dtype == torch.float32
            num_checked += 1
    assert num_checked == 28


@pytest.mark.distributed
@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_any_number_of_ranks_gives_identical_files(alone, num_ranks, tmp_path, checkpoint_8m):
    result = run_ranks(num_ranks, *overrides(tmp_path / "out", checkpoint_8m), "toks_per_batch=300")
    assert result.returncode == 0, result.stderr
    assert digests(tmp_path / "out") == digests(alone[0])
    assert sorted(digests(tmp_path / "out")) == OUTPUTS
    report = read_report(tmp_path / "out")
    assert report["status"] == "complete"
    assert [rank["status"] for rank in report["ranks"]] == ["COMPLETED"] * num_ranks
    assert sum(rank["sequences"] for rank in report["ranks"]) == 28
    assert {"Traceback", "Warning", "WARNING"}.isdisjoint(re.findall(r"\w+", result.stderr)), result.stderr
    said = re.findall(r"rank (\d+) INFO bin: \d+ units of \d+ files, \d+ proteins", result.stderr)
    assert said == ["0"], "INFO is for rank 0 alone"


def test_a_good_run_leaves_only_what_it_promises(alone, tmp_path, checkpoint_8m):
    output_dir, result = alone
    ours = [
        ".dist_esm/events/00000000000000000001.00000.jsonl",
        ".dist_esm/journal/00000000000000000001.00000.jsonl",
        ".dist_esm/logs/00000000000000000001.00000.log",
        ".dist_esm/launches/00000000000000000001.json",
        *(f".dist_esm/{name}" for name in ("config.json", "lock", "progress.json", "settings.json")),
    ]
    left = sorted(str(path.relative_to(output_dir)) for path in output_dir.rglob("*") if path.is_file())
    assert left == sorted(map(str, [*OUTPUTS, *ours, "report.html", "report.json"]))
    assert result.stdout.startswith("complete: 4 of 4 files embedded")
    other = run_ranks(
        None,
        "input=" + str(PROTEINS / "viruses"),
        "output_dir=out",
        MODEL,
        f"model.weights={checkpoint_8m}",
        PWD=str(tmp_path),
    )
    assert other.returncode == 0
    shutil.rmtree("out")
    assert not Path("outputs").exists()
    report = read_report(output_dir)
    assert report["records"]["in"] == report["records"]["ok"] == 28
    assert report["files"][0]["path"] == str(PROTEINS / "large.fasta")
    assert (report["files"][0]["sequences"], report["files"][0]["output"]) == (14, "large_ESM.pt")
    assert set(report) >= {
        "status",
        "files",
        "failed",
        "not_attempted",
        "records",
        "ranks",
        "config",
        "model",
        "versions",
    }
    assert report["config"]["repr_layers"] == [0, 3, -1]


@pytest.mark.distributed
def test_a_file_of_garbage_ends_as_partial_with_the_others_done(alone, tmp_path, checkpoint_8m):
    shutil.copytree(PROTEINS, tmp_path / "in")
    (tmp_path / "in" / "garbage.fasta").write_bytes(b"%PDF-1.4\n\x00\xff\x8b")
    result = run_ranks(2, *overrides(tmp_path / "out", checkpoint_8m, tmp_path / "in"))
    assert result.returncode == 1  # torchrun's own; rank 0's is in its table
    assert re.search(r"exitcode\s*:\s*2", result.stderr)
    assert digests(tmp_path / "out") == digests(alone[0])
    report = read_report(tmp_path / "out")
    assert report["status"] == "partial"
    assert [(Path(f["path"]).name, f["error_type"]) for f in report["failed"]] == [
        ("garbage.fasta", "FastaError")
    ]
    assert "line 1" in report["failed"][0]["error_message"]
    assert (
        (tmp_path / "out" / "failed_files.txt")
        .read_text()
        .startswith(f"{tmp_path / 'in' / 'garbage.fasta'}|FastaError|line 1 ")
    )
    assert "dist_esm/" not in result.stderr, "a bad file shows no frame of ours"


def test_bad_files_in_a_row_stop_nobody(tmp_path, checkpoint_8m):
    """Each shows a fault of its own, and says nothing of the device."""
    (tmp_path / "in").mkdir()
    for i in range(4):
        (tmp_path / "in" / f"bad{i}.fasta").write_text(">a\nMKT\n" * 20 + ">b\nMK\x02T\n")
    (tmp_path / "in" / "good.fasta").write_text(">a\nMKT\n")
    result = run_ranks(None, *overrides(tmp_path / "out", checkpoint_8m, tmp_path / "in"))
    assert result.returncode == 2
    report = read_report(tmp_path / "out")
    assert (report["status"], report["not_attempted"], len(report["failed"])) == ("partial", [], 4)
    assert [entry["output"] for entry in report["files"]] == ["good_ESM.pt"]
    assert "Traceback" not in result.stderr


@pytest.mark.distributed
def test_a_device_that_fails_one_file_after_the_other_aborts_the_run_and_the_other_rank(
    tmp_path, checkpoint_8m
):
    (tmp_path / "in").mkdir()
    protein = "ACDEFGHIKLMNPQRSTVWY" * 20
    for i in range(8):  # the largest, so that they come first in the bins
        text = "".join(f">{j}\n{protein[j + i :]}\n" for j in range(9))
        (tmp_path / "in" / f"bad{i}.fasta").write_text(f"{text}>poison\nMWWWWWWWWK\n")
    for i in range(60):
        text = "".join(f">{j}\n{protein[j + i :]}\n" for j in range(8))
        (tmp_path / "in" / f"good{i:02}.fasta").write_text(text)
    poison = ["forward", "RuntimeError", "MWWWWWWWWK"]
    settings = [f"input={tmp_path / 'in'}", f"output_dir={tmp_path / 'out'}", MODEL, "toks_per_batch=1000"]
    settings += [f"model.weights={checkpoint_8m}", "dedupe=false"]
    result = run_ranks(2, *poison, *settings, script=HELPERS / "poisoned.py")
    assert result.returncode == 1
    report = read_report(tmp_path / "out")
    assert report["status"] == "aborted"
    assert re.search(
        r"3 files in a row failed on rank [01], the last, .*poison: a fault of the device", report["reason"]
    )
    assert len(report["not_attempted"]) > 20
    assert len(report["not_attempted"]) + len(report["failed"]) + len(report["files"]) == 68


def test_a_protein_that_does_not_fit_fails_its_file_alone(alone, tmp_path, checkpoint_8m):
    """Real allocation failures: one protein needs more address space than is left to the process."""
    shutil.copytree(PROTEINS, tmp_path / "in")
    (tmp_path / "in" / "huge.fasta").write_text(">huge\n" + "MKTAYIAK" * 100_000 + "\n")
    settings = [
        *overrides(tmp_path / "out", checkpoint_8m, tmp_path / "in"),
        "truncation_seq_length=null",
    ]
    line = [
        sys.executable,
        str(HELPERS / "limited.py"),
        str(512 << 20),
        *settings,
    ]
    result = subprocess.run(
        line, capture_output=True, text=True, timeout=100, env=environment(MALLOC_ARENA_MAX="2"), check=False
    )
    assert result.returncode == 2, result.stderr
    report = read_report(tmp_path / "out")
    assert [Path(failure["path"]).name for failure in report["failed"]] == ["huge.fasta"]
    assert "allocate" in report["failed"][0]["error_message"]
    for name in OUTPUTS:
        mine, theirs = (
            torch.load(folder / name, weights_only=True)["representations"]
            for folder in (tmp_path / "out", alone[0])
        )
        for layer, proteins in theirs.items():
            for one, other in zip(mine[layer], proteins, strict=True):
                assert torch.equal(one, other)


@pytest.mark.distributed
def test_a_missing_input_or_checkpoint_is_said_once(tmp_path):
    result = run_ranks(
        2,
        f"input={PROTEINS}",
        f"output_dir={tmp_path / 'out'}",
        MODEL,
        f"model.weights={tmp_path / 'none.pt'}",
        forks=False,
    )
    assert result.returncode == 1
    assert result.stderr.count("dist_esm: error:") == 1
    assert f"model.weights={tmp_path / 'none.pt'} is not a file" in result.stderr
    assert "dist_esm/" not in result.stderr


@pytest.mark.gpu
@pytest.mark.distributed
def test_more_ranks_than_gpus_is_one_clear_error(tmp_path):
    too_many = torch.cuda.device_count() + 1
    result = run_ranks(
        too_many,
        f"input={PROTEINS}",
        f"output_dir={tmp_path}",
        MODEL,
        "model.weights=random",
        is_warm=False,
        CUDA_VISIBLE_DEVICES=visible_gpus(),
    )
    assert result.returncode == 1
    assert result.stderr.count("dist_esm: error:") == 1
    assert f"start torchrun with --nproc_per_node={too_many - 1}" in result.stderr


@pytest.mark.gpu
@pytest.mark.distributed
@pytest.mark.parametrize("model", ["esm2_t6_8M_UR50D", "esm2_t33_650M_UR50D", "esm2_t36_3B_UR50D"])
def test_nccl_ranks_give_the_bits_of_one_gpu(model, tmp_path):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for num_ranks in (1, 2):
        settings = [
            f"input={PROTEINS}",
            f"output_dir={tmp_path / str(num_ranks)}",
            f"model={model}",
            "model.weights=random",
            "include=[mean,per_tok]",
        ]
        result = run_ranks(num_ranks, *settings, is_warm=False, CUDA_VISIBLE_DEVICES=visible_gpus())
        assert result.returncode == 0, result.stderr
        assert {rank["device"].split()[0] for rank in read_report(tmp_path / str(num_ranks))["ranks"]} == {
            f"cuda:{rank}" for rank in range(num_ranks)
        }
    assert digests(tmp_path / "1") == digests(tmp_path / "2")


def visible_gpus() -> str:
    return ",".join(str(number) for number in range(torch.cuda.device_count()))
