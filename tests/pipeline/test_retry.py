"""Packs that do not fit are split, and an embedding that is not finite is never written."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from dist_esm.pipeline.retry import embed_pack
from dist_esm.types import Pack, RankResult, Segment
from helpers.fasta import write_files
from helpers.standin import StandIn, embed_directory, expected, fair_esm_tokens


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


def segment_of(residues: str, number: int) -> Segment:
    return Segment(number, 0, fair_esm_tokens(residues).astype(np.uint8), (0, len(residues)))


def test_a_pack_that_does_not_fit_is_split_until_it_does_and_every_answer_keeps_its_place():
    engine = SmallDevice([1], False, 1000)
    sequences = ["MKTAYIAKQR" * n for n in (1, 2, 3, 1, 2, 1)]
    result = RankResult()
    answers = embed_pack(
        engine, Pack(tuple(segment_of(residues, i) for i, residues in enumerate(sequences))), result
    )
    assert result.num_split_packs > 0
    assert engine.num_freed == result.num_split_packs
    for residues, answer in zip(sequences, answers, strict=True):
        np.testing.assert_array_equal(answer.sums[1] / np.float32(len(residues)), expected(residues).mean)


def test_only_a_single_protein_that_does_not_fit_is_a_failure():
    engine = SmallDevice([1], False, 1000)
    answers = embed_pack(engine, Pack((segment_of("MKT", 0), segment_of("M" * 100, 1), segment_of("AYI", 2))))
    assert isinstance(answers[1], torch.OutOfMemoryError)
    np.testing.assert_array_equal(answers[0].sums[1], expected("MKT").rows.sum(0))
    np.testing.assert_array_equal(answers[2].sums[1], expected("AYI").rows.sum(0))


def test_a_number_that_is_not_finite_is_never_written(tmp_path, monkeypatch):
    run_pack = StandIn.run

    def with_nan(self, pack, num_rows=None):
        answers = run_pack(self, pack)
        for one, answer in zip(pack.segments, answers, strict=True):
            if len(one.tokens) == 7:
                answer.sums[1][2] = np.nan
        return answers

    monkeypatch.setattr(StandIn, "run", with_nan)
    run = embed_directory(
        write_files(tmp_path / "in", a=">bad\nMKTAY\n", b=">good\nMKTAYI\n"), tmp_path / "out"
    )
    assert [(Path(f.path).name, f.error_type) for f in run.report.failed] == [
        ("a.fasta", "FloatingPointError")
    ]
    assert run.report.failed[0].error_message.startswith("bad: its embedding is not finite")
    assert run.outputs() == ["b_ESM"]
