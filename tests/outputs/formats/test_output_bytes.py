"""What is said of an output's size before it is written, held to what is written."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dist_esm.config import Format
from dist_esm.outputs.embeddings import ChunkedTensor, OutputTable
from dist_esm.outputs.formats.base import About, ContentSize
from dist_esm.outputs.formats.registry import FORMATS
from dist_esm.types import Row
from helpers.outputs import PROVENANCE, write_table

INCLUDED = [["mean"], ["bos"], ["mean", "bos"], ["mean", "per_tok"], ["mean", "bos", "per_tok"]]


def make_table(
    number: int,
    include: list[str],
    layers: list[int],
    width: int,
    dtype: torch.dtype,
    longest: int | None = None,
):
    """An output of proteins of many lengths, or of short ones, with headers as UniRef has them and random
    numbers."""
    rng = random.Random(number)
    rows = []
    for place in range(number):
        length = (
            max(1, min(1022, int(rng.lognormvariate(5, 0.6)))) if longest is None else rng.randint(1, longest)
        )
        name = f"UniRef90_A0A{rng.randrange(10**7):07d}"
        header = f"{name} Uncharacterized protein n={rng.randrange(99)} Tax=Virus {'x' * rng.randrange(30)}"
        rows.append(Row(name, header, place, length, length, "ok", 0, 0, 0, 0))
    total = sum(row.embedded for row in rows)

    def numbers(count: int) -> torch.Tensor:
        return torch.randn(count, width).to(dtype)

    mean = {layer: numbers(number) for layer in (layers if "mean" in include else layers[-1:])}
    bos = {layer: numbers(number) for layer in layers if "bos" in include}
    per_tok = {layer: ChunkedTensor([numbers(total)]) for layer in layers if "per_tok" in include}
    return OutputTable("a/b.fasta", PROVENANCE, include, layers[-1], rows, mean, bos, per_tok, [])


def size_of(table: OutputTable) -> ContentSize:
    """What a scan would say of a table."""
    return ContentSize(
        proteins=len(table.rows),
        residues=sum(table.lengths),
        id_bytes=sum(len(row.id) for row in table.rows),
        header_bytes=sum(len(row.header) for row in table.rows),
        include=table.include,
        kinds=About.of(table).kinds,
        width=table.mean[table.main_layer].shape[1],
        itemsize=table.mean[table.main_layer].dtype.itemsize,
    )


def paths_on_disk(path: Path) -> int:
    return len([path, *path.rglob("*")])


def bytes_on_disk(path: Path) -> int:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["float32", "float16"])
@pytest.mark.parametrize("include", INCLUDED, ids="+".join)
@pytest.mark.parametrize("kind", list(Format), ids=lambda kind: kind.name)
def test_the_bytes_of_an_output_are_known_before_it_is_written(tmp_path, kind, include, dtype):
    for name, number, width, layers in (("a", 150, 320, [6]), ("b", 150, 320, [3, 6]), ("c", 40, 1280, [33])):
        table = make_table(number, include, layers, width, dtype)
        codec, path = FORMATS[kind.name].codec, write_table(kind, table, tmp_path / name)
        told, written = codec.output_bytes(size_of(table)), bytes_on_disk(path)
        assert told == pytest.approx(written, rel=0.03), (name, told, written)
        assert codec.output_files(size_of(table)) == paths_on_disk(path)


@pytest.mark.parametrize("longest", [3, 9, 20, 60, 150])
def test_the_bytes_of_peptides_in_an_h5_are_known_before_it_is_written(tmp_path, longest):
    """Where HDF5 keeps residues of further layers depends on how many proteins are short."""
    table = make_table(400, ["mean", "per_tok"], [3, 6, 5], 320, torch.float16, longest)
    told = FORMATS["h5"].codec.output_bytes(size_of(table))
    assert told == pytest.approx(bytes_on_disk(write_table(Format.h5, table, tmp_path / "a")), rel=0.03)


@pytest.mark.parametrize("kind", list(Format), ids=lambda kind: kind.name)
@pytest.mark.parametrize("residues", [0, 1, 3])
def test_records_that_are_empty_are_counted_before_they_are_skipped(kind, residues):
    table = make_table(4, ["mean", "per_tok"], [3, 6], 320, torch.float32)
    size = replace(size_of(table), residues=residues)
    told = FORMATS[kind.name].codec.output_bytes(size)
    assert size.number_bytes < told < size.number_bytes + 60_000


@pytest.mark.parametrize("kind", list(Format), ids=lambda kind: kind.name)
def test_an_output_of_one_protein_or_none_is_known_to_a_few_kilobytes(tmp_path, kind):
    for number in (0, 1):
        table = make_table(number, ["mean"], [6], 320, torch.float32)
        told = FORMATS[kind.name].codec.output_bytes(size_of(table))
        written = bytes_on_disk(write_table(kind, table, tmp_path / str(number)))
        assert told == pytest.approx(written, abs=3000)
