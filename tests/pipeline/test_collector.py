"""Failures find their own files: packs cross file borders, and copies share one forward."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from dist_esm.config import SaveDtype
from helpers.fasta import write_files
from helpers.standin import ALL_KINDS, StandIn, accounts_add_up, embed_directory, expected


def test_a_protein_whose_forward_fails_fails_its_own_file_and_its_twins(tmp_path):
    """Packs cross file borders: the others in a pack are right, and a copy in another file fails, too."""
    inputs = write_files(
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
    inputs = write_files(
        tmp_path / "in", a=">1\nWWWWW\n" + filler, b=filler.replace(">", ">b"), c=">z\nWWWWW\n"
    )
    run = embed_directory(inputs, tmp_path / "out", poison=["WWWWW"], toks_per_batch=60)
    assert sorted(Path(failure.path).name for failure in run.report.failed) == ["a.fasta", "c.fasta"]
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
    inputs = write_files(tmp_path / "in", a=">bad\nMKTAY\n", b=">good\nMKTAYI\n")
    settings = {"include": ALL_KINDS}
    run = embed_directory(inputs, tmp_path / "half", save_dtype=SaveDtype.float16, **settings)
    assert (
        run.failure("a.fasta")
        == "bad: save_dtype=float16 cannot hold a number of its embedding: use save_dtype=float32"
    )
    assert run.outputs() == ["b_ESM"]
    assert embed_directory(inputs, tmp_path / "single", **settings).outputs() == ["a_ESM", "b_ESM"]
