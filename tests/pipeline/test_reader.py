"""Reading while the run is under way: identical sequences once, and files that changed since the plan."""

from __future__ import annotations

import random

import pytest

from dist_esm.config import Long
from dist_esm.pipeline import duplicates
from helpers.fasta import random_sequence, write
from helpers.intake import check_output, embed_beside_good, failure_of
from helpers.standin import ALL_KINDS, embed_directory


def test_a_file_that_is_gone_or_changed_since_the_plan_fails_alone(tmp_path):
    path = tmp_path / "in" / "a.fasta"
    for text in (">a\nMK\n>b\nMK\n", ">a\nMKV\n", ""):
        message = failure_of(tmp_path, ">a\nMK\n", after_plan=lambda text=text: write(path, text))
        assert "changed while the run was under way" in message
    assert "No such file" in failure_of(tmp_path, ">a\nMK\n", after_plan=path.unlink)


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"truncation_seq_length": 20},
        {"truncation_seq_length": 20, "long": Long.window, "window_overlap": 5},
    ],
)
def test_dedupe_changes_no_bit_and_its_saving_is_counted(tmp_path, overrides):
    for name, seed in (("a", 1), ("b", 2), ("c", 3)):
        rng = random.Random(seed)
        text = "".join(
            f">{name}{i}\n{random_sequence(rng.randrange(1, 45), rng.randrange(4))}\n" for i in range(150)
        )
        write(tmp_path / "in" / f"{name}.fasta", text)
    off = embed_directory(tmp_path / "in", tmp_path / "off", dedupe=False, include=ALL_KINDS, **overrides)
    on = embed_directory(tmp_path / "in", tmp_path / "on", dedupe=True, include=ALL_KINDS, **overrides)
    assert on.outputs() == off.outputs() == ["a_ESM", "b_ESM", "c_ESM"]
    for output in on.outputs():
        assert (on.output_dir / f"{output}.pt").read_bytes() == (off.output_dir / f"{output}.pt").read_bytes()
    kept = {key: value for key, value in on.report.records.items() if key != "deduplicated"}
    assert kept == {key: value for key, value in off.report.records.items() if key != "deduplicated"}
    assert off.report.records["deduplicated"] == 0
    saved = on.report.records["deduplicated"]
    distinct = {
        residues for path in (tmp_path / "in").iterdir() for residues in path.read_text().split("\n")[1::2]
    }
    if not overrides:
        assert saved == 450 - len(distinct) > 0
        assert on.engine.num_segments == len(distinct)
        assert off.engine.num_segments == 450
    assert on.engine.num_tokens < off.engine.num_tokens


def test_dedupe_forgets_old_answers_and_stays_right(tmp_path, monkeypatch):
    # room for 16 answers of one vector of 6 numbers
    monkeypatch.setattr(duplicates, "DEDUPE_BYTES", 16 * (duplicates.KEPT_BYTES + 24))
    rng = random.Random(0)
    records = [(f"r{i}", random_sequence(3 + rng.randrange(40))) for i in range(400)]
    done = embed_beside_good(tmp_path, "".join(f">{name}\n{residues}\n" for name, residues in records))
    check_output(done.load("a_ESM"), records)
    assert 0 < done.report.records["deduplicated"] < 400 - 40
    assert done.engine.num_segments == 401 - done.report.records["deduplicated"]
