"""A file that was cut and joined is the file uncut."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from dist_esm.atomic import commit_together
from dist_esm.checksum import read_back
from dist_esm.config import Format
from dist_esm.outputs.embeddings import ChunkedTensor, OutputTable
from dist_esm.outputs.shards import read_shard, write_shard
from dist_esm.planning import units
from dist_esm.types import Row
from helpers.fasta import block_gzip, write
from helpers.intake import MANY, MANY_TEXT, check_output
from helpers.standin import ALL_KINDS, embed_directory


def same(one: object, other: object) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    return (
        torch.equal(one, other)
        if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)
        else one == other
    )


@pytest.mark.parametrize("share", [0.5, 0.1, 0.01])
@pytest.mark.parametrize("is_zipped", [False, True])
def test_a_file_that_was_cut_and_joined_is_the_file_uncut(tmp_path, monkeypatch, share, is_zipped):
    monkeypatch.setattr(units, "MIN_UNIT_BYTES", 50)
    content = block_gzip(MANY_TEXT.encode(), 90) if is_zipped else MANY_TEXT.encode()
    path = write(tmp_path / "a.fa.gz", content)
    uncut = embed_directory(path, tmp_path / "uncut", unit_share=1.0, include=ALL_KINDS)
    joined = embed_directory(path, tmp_path / "cut", unit_share=share, include=ALL_KINDS)
    assert len(uncut.plan.units_of(0)) == 1 < len(joined.plan.units_of(0))
    check_output(uncut.load("a_ESM"), MANY, has_all_kinds=True)
    assert same(uncut.load("a_ESM"), joined.load("a_ESM"))
    assert uncut.notes("a_ESM") == joined.notes("a_ESM") != []
    assert joined.report.files[0].sequences == 132
    assert joined.report.files[0].outputs == ["a_ESM.pt"]


@pytest.mark.parametrize("kind", list(Format))
def test_a_file_that_was_cut_and_joined_has_the_bytes_of_the_file_uncut(tmp_path, monkeypatch, kind):
    monkeypatch.setattr("dist_esm.planning.units.MIN_UNIT_BYTES", 64)
    monkeypatch.setattr(
        "dist_esm.outputs.formats.parquet.GROUP_BYTES", 1 << 14
    )  # groups begin and end within pieces
    (tmp_path / "a.fasta").write_text(
        "".join(f">p{i}\n{'ACDEFGHIKL' * (1 + i * 7 % 5)}\n" for i in range(40))
    )
    found = []
    for share in (1.0, 0.1):
        run = embed_directory(
            tmp_path / "a.fasta", tmp_path / str(share), format=kind, include=ALL_KINDS, unit_share=share
        )
        assert (run.report.files[0].units > 1) == (share < 1)
        (output,) = (tmp_path / str(share) / name for name in run.report.files[0].outputs)
        found.append(
            {path.name: path.read_bytes() for path in (output.iterdir() if output.is_dir() else [output])}
        )
    assert found[0] == found[1]


def test_a_shard_comes_back_as_it_was_also_one_of_version_1(tmp_path):
    rows = [Row("a", "a b", 0, 3, 3, "ok", 0, 0, 0, 0), Row("b", "b", 2, 5, 4, "truncated", 1, 0, 0, 0)]
    mean, per_tok = torch.arange(12.0).view(2, 6), torch.arange(42.0).view(7, 6)
    table = OutputTable(
        "a.fasta", {"model": "m"}, ["mean"], 1, rows, {1: mean}, {}, {1: ChunkedTensor([per_tok])}, ["a line"]
    )
    staged = write_shard(table, Format.parquet, tmp_path / "shards" / "a", tmp_path)
    (written,) = commit_together([staged], tmp_path)
    assert written == read_back(tmp_path, Path("shards/a.pt"))
    content = torch.load(tmp_path / "shards" / "a.pt", weights_only=True)
    content["notes"] = content.pop("tsv_lines")
    torch.save(content, tmp_path / "old.pt")
    for name in ("shards/a.pt", "old.pt"):
        shard = read_shard(tmp_path / name)
        assert (shard.source, shard.rows, shard.tsv_lines) == (table.source, rows, ["a line"])
        assert torch.equal(shard.mean[1], mean)
        assert torch.equal(shard.per_tok[1][0:7], per_tok)
