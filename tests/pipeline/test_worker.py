"""One rank's work with a stand-in engine whose answer names its input: packs that do not fit, failures, and their order."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import numpy as np
import pytest
import torch

from dist_esm.config import Include, SaveDtype
from dist_esm.pipeline import writer_pool as outputs
from dist_esm.pipeline.failures import run_around
from dist_esm.pipeline.retry import embed_pack
from dist_esm.types import Pack, RankResult, Segment
from standin import StandIn, accounts_add_up, embed_directory, expected, fair_esm_tokens


class SmallDevice(StandIn):
    """A device that holds `room` tokens at a time."""

    room = 60
    num_freed = 0

    def run(self, pack, num_rows=None):
        if pack.num_tokens > self.room:
            raise torch.OutOfMemoryError(f"{pack.num_tokens} tokens do not fit")
        return super().run(pack)

    def free_memory(self):
        self.num_freed += 1


def segment(residues: str, number: int) -> Segment:
    return Segment(number, 0, fair_esm_tokens(residues).astype(np.uint8), (0, len(residues)))


def test_a_pack_that_does_not_fit_is_split_until_it_does_and_every_answer_keeps_its_place():
    engine = SmallDevice([1], False, 1000)
    sequences = ["MKTAYIAKQR" * n for n in (1, 2, 3, 1, 2, 1)]
    result = RankResult()
    answers = embed_pack(
        engine, Pack(tuple(segment(residues, i) for i, residues in enumerate(sequences))), result
    )
    assert result.num_split_packs > 0
    assert engine.num_freed == result.num_split_packs
    for residues, answer in zip(sequences, answers, strict=True):
        np.testing.assert_array_equal(answer.sums[1] / np.float32(len(residues)), expected(residues).mean)


def test_only_a_single_protein_that_does_not_fit_is_a_failure():
    engine = SmallDevice([1], False, 1000)
    answers = embed_pack(engine, Pack((segment("MKT", 0), segment("M" * 100, 1), segment("AYI", 2))))
    assert isinstance(answers[1], torch.OutOfMemoryError)
    np.testing.assert_array_equal(answers[0].sums[1], expected("MKT").rows.sum(0))
    np.testing.assert_array_equal(answers[2].sums[1], expected("AYI").rows.sum(0))


def write(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / f"{name}.fasta").write_text(text)
    return folder


def test_a_protein_whose_forward_fails_fails_its_own_file_and_its_twins(tmp_path):
    """Packs cross file borders: the others in the pack are none the worse, and an identical sequence elsewhere fails the same way."""
    inputs = write(
        tmp_path / "in",
        a=">1\nMKTAY\n>2\nIAKQR\n",
        b=">3\nWWWWW\n>4\nMKTAY\n",
        c=">5\nGGGGG\n",
        d=">6\nWWWWW\n",
    )
    run = embed_directory(inputs, tmp_path / "out", poison=["WWWWW"])
    assert sorted(Path(failure.path).name for failure in run.report.failed) == ["b.fasta", "d.fasta"]
    assert {failure.error_message for failure in run.report.failed} == {
        "3: poisoned segment",
        "6: poisoned segment",
    }
    assert run.outputs() == ["a_ESM", "c_ESM"]
    for output, sequences in (("a_ESM", ["MKTAY", "IAKQR"]), ("c_ESM", ["GGGGG"])):
        for vector, residues in zip(run.load(output)["data"], sequences, strict=True):
            np.testing.assert_array_equal(vector.numpy(), expected(residues).mean)
    assert accounts_add_up(run.report)


def test_a_copy_that_comes_after_the_failure_of_its_first_fails_too(tmp_path):
    filler = "".join(f">{i}\n{'ACDEFGHIKL'[i % 10] * (20 + i)}\n" for i in range(40))
    inputs = write(tmp_path / "in", a=">1\nWWWWW\n" + filler, b=filler.replace(">", ">b"), c=">z\nWWWWW\n")
    run = embed_directory(inputs, tmp_path / "out", poison=["WWWWW"], toks_per_batch=60)
    assert sorted(Path(failure.path).name for failure in run.report.failed) == ["a.fasta", "c.fasta"]
    assert run.outputs() == ["b_ESM"]


def test_a_number_that_is_not_finite_is_never_written(tmp_path, monkeypatch):
    run_pack = StandIn.run

    def with_nan(self, pack, num_rows=None):
        answers = run_pack(self, pack)
        for one, answer in zip(pack.segments, answers, strict=True):
            if len(one.tokens) == 7:
                answer.sums[1][2] = np.nan
        return answers

    monkeypatch.setattr(StandIn, "run", with_nan)
    run = embed_directory(write(tmp_path / "in", a=">bad\nMKTAY\n", b=">good\nMKTAYI\n"), tmp_path / "out")
    assert [(Path(f.path).name, f.error_type) for f in run.report.failed] == [
        ("a.fasta", "FloatingPointError")
    ]
    assert run.report.failed[0].error_message.startswith("bad: its embedding is not finite")
    assert run.outputs() == ["b_ESM"]


@pytest.mark.parametrize("kind", ["sums", "bos", "rows"])
def test_a_number_that_float16_cannot_hold_fails_its_file(tmp_path, monkeypatch, kind):
    run_pack = StandIn.run

    def with_large(self, pack, num_rows=None):
        answers = run_pack(self, pack)
        for one, answer in zip(pack.segments, answers, strict=True):
            if len(one.tokens) == 7:
                getattr(answer, kind)[1][..., 2] = 1e6
        return answers

    monkeypatch.setattr(StandIn, "run", with_large)
    inputs = write(tmp_path / "in", a=">bad\nMKTAY\n", b=">good\nMKTAYI\n")
    settings = {"include": [Include.mean, Include.bos, Include.per_tok]}
    run = embed_directory(inputs, tmp_path / "half", save_dtype=SaveDtype.float16, **settings)
    assert (
        run.failure("a.fasta")
        == "bad: save_dtype=float16 cannot hold a number of its embedding: use save_dtype=float32"
    )
    assert run.outputs() == ["b_ESM"]
    assert embed_directory(inputs, tmp_path / "single", **settings).outputs() == ["a_ESM", "b_ESM"]


def test_a_disk_that_is_full_fails_the_file_with_the_reason_and_leaves_nothing_half_written(
    tmp_path, monkeypatch
):
    write_output = outputs.write_output

    def full(kind, table, stem, scratch):
        if stem.name == "a_ESM":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_output(kind, table, stem, scratch)

    monkeypatch.setattr(outputs, "write_output", full)
    run = embed_directory(write(tmp_path / "in", a=">1\nMKTAY\n", b=">2\nMKTAYI\n"), tmp_path / "out")
    assert run.failure("a.fasta") == "[Errno 28] No space left on device"
    assert run.outputs() == ["b_ESM"]
    assert not list((tmp_path / "out" / ".dist_esm" / "scratch").rglob("*.*/*"))


@pytest.mark.parametrize(
    ("names", "is_aborted"), [("bbb", True), ("bgbb", False), ("bbgbbb", True), ("bbgbb", False)]
)
def test_only_failures_in_a_row_abort(tmp_path, names, is_aborted):
    """In the order of the bin, though good files end later than bad ones: b bad, g good, each with fewer records than the last."""
    inputs = tmp_path / "in"
    inputs.mkdir()
    for i, kind in enumerate(names):
        text = ">x\nMKTAY\n" * (20 - i)
        (inputs / f"{i}.fasta").write_text(text + (">y\nMK\x02\n" if kind == "b" else ">y\nMK\n"))
    run = embed_directory(inputs, tmp_path / "out", max_consecutive_failures=3)
    assert (run.report.status == "aborted") is is_aborted
    assert accounts_add_up(run.report)
    assert len(run.report.failed) == names.count("b")


def test_units_of_one_broken_file_are_one_failure(tmp_path, monkeypatch):
    """A large file that is cut and has a fault in every slice counts once towards the failures in a row."""
    monkeypatch.setattr("dist_esm.planning.units.MIN_UNIT_BYTES", 64)
    inputs = write(tmp_path / "in", broken=">a\nMKT\n>b\nMK\x02T\n" * 40, good=">c\nMKT\n")
    run = embed_directory(inputs, tmp_path / "out", max_consecutive_failures=2, unit_share=0.1)
    assert len(run.plan.units) > 5
    assert (run.report.status, len(run.report.failed), run.outputs()) == ("partial", 1, ["good_ESM"])


def test_neighbouring_failures_are_found_on_both_sides():
    assert run_around({1, 2, 4, 5, 6, 9}, 5) == range(4, 7)
    assert run_around({3}, 3) == range(3, 4)


def test_every_wanted_representation_of_an_empty_file_has_its_shape(tmp_path):
    run = embed_directory(
        write(tmp_path / "in", empty=""),
        tmp_path / "out",
        include=[Include.mean, Include.bos, Include.per_tok],
        repr_layers=[0, 1],
    )
    content = run.load("empty_ESM")
    assert content["proteins"] == content["data"] == []
    assert {layer: tensor.shape for layer, tensor in content["mean_representations"].items()} == {
        0: (0, 6),
        1: (0, 6),
    }
    assert content["representations"] == {0: [], 1: []}


def test_tensors_of_a_kind_share_one_storage_no_larger_than_its_numbers(tmp_path):
    inputs = write(tmp_path / "in", a="".join(f">{i}\n{'MKTAYIAKQR' * (i % 7 + 1)}\n" for i in range(300)))
    run = embed_directory(inputs, tmp_path / "out", include=[Include.mean, Include.per_tok])
    content = run.load("a_ESM")
    assert len({tensor.untyped_storage().data_ptr() for tensor in content["data"]}) == 1
    assert content["data"][0].untyped_storage().nbytes() == 300 * 6 * 4
    rows = sum(content["lengths"])
    assert content["representations"][1][0].untyped_storage().nbytes() == rows * 6 * 4
