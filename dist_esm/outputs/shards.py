"""Shards: what the units of a file that was cut contribute to its one output."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from dist_esm.atomic import Staged
from dist_esm.config import Format
from dist_esm.names import readable_name
from dist_esm.outputs.embeddings import ChunkedTensor, OutputTable
from dist_esm.outputs.formats.registry import FORMATS
from dist_esm.outputs.formats.write import write_output
from dist_esm.outputs.loose import EarlyFiles, finish_loose, is_loose, read_numbers, write_loose_shard
from dist_esm.outputs.pickling import stage
from dist_esm.outputs.placed import finish_placed, read_placed_shard
from dist_esm.outputs.row_buffer import Memory, NamelessFile, RowBuffer
from dist_esm.outputs.trust import LOOSE
from dist_esm.types import Row

CHUNK_ROWS = 1 << 12


def write_shard(
    table: OutputTable, output_format: Format, stem: Path, scratch: Path, early: EarlyFiles | None = None
) -> Staged:
    """Write what one unit of a cut file contributes, its numbers with it, under a temporary name.

    Parameters
    ----------
    table
        The unit's proteins.
    output_format
        The format of its output.
    stem
        The shard's final path without suffix.
    scratch
        A folder of this process alone, on the same file system.
    early
        Files of proteins that are there already, for a format that has them.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    if FORMATS[output_format.name].codec.loose is not None:
        return write_loose_shard(table, output_format, stem.with_name(f"{stem.name}{LOOSE}"), scratch, early)
    per_tok = {layer: rows[0 : rows.shape[0]] for layer, rows in table.per_tok.items()}
    # Rows go as one text: torch's unpickler takes microseconds for each string.
    content = {**vars(table), "rows": json.dumps(table.rows), "per_tok": per_tok}
    return stage(content, stem.with_name(f"{stem.name}.pt"), scratch)


def read_shard(path: Path) -> OutputTable:
    """Read the shard of a unit. Numbers are mapped, and read from disk when they are used."""
    if is_loose(path):
        return read_numbers(path)
    if (placed := read_placed_shard(path)) is not None:
        return placed.mapped()
    with readable_name(path) as name:
        content = torch.load(name, weights_only=True, mmap=True)
    # Until its second format version the package had another name for these lines.
    content["tsv_lines"] = content.pop("notes", content.get("tsv_lines"))
    rows = list(map(Row._make, json.loads(content["rows"])))
    per_tok = {layer: ChunkedTensor([tensor]) for layer, tensor in content["per_tok"].items()}
    return OutputTable(**{**content, "rows": rows, "per_tok": per_tok})


def assemble_output(
    paths: Sequence[Path], output_format: Format, stem: Path, scratch: Path, is_compressed: bool
) -> tuple[Staged, list[str]]:
    """Write the one output of a file that was cut under temporary names, and return the ids in it.

    If all numbers are in their places in one output in the making, that is completed; files of proteins get
    other names. Else numbers are written again: the format has no places, or launches that laid the file out
    otherwise did a part of it.

    Parameters
    ----------
    paths
        Of the shards, in order.
    output_format, stem, scratch, is_compressed
        As of `write_output`.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    if all(map(is_loose, paths)):
        return finish_loose(paths, output_format, stem, scratch)
    others = [path for path in paths if not is_loose(path)]
    placed = [shard for path in others if (shard := read_placed_shard(path)) is not None]
    if len(placed) == len(paths):
        staged = finish_placed(placed, output_format, stem, scratch)
        if staged is not None:
            return staged, [protein for shard in placed for protein in shard.table.ids]
    with join_shards(paths, scratch) as table:
        return write_output(output_format, table, stem, scratch, is_compressed=is_compressed), table.ids


@contextmanager
def join_shards(paths: Sequence[Path], directory: Path) -> Iterator[OutputTable]:
    """Give the shards of a file as one table, for as long as the block runs.

    Residues stay where they are, and vectors are copied through buffers, so that memory grows with neither.

    Parameters
    ----------
    paths
        Of the shards, in order.
    directory
        Where buffers go that find no room in memory.
    """
    shards = [read_shard(path) for path in paths]
    memory, make_file = Memory(), partial(NamelessFile, directory)
    with ExitStack() as buffers:

        def joined(parts: list[Tensor]) -> Tensor:
            width, dtype = parts[0].shape[1], parts[0][:0].numpy().dtype
            buffer = RowBuffer(width, dtype, make_file, memory, expected=sum(map(len, parts)))
            buffers.enter_context(closing(buffer))
            first = 0
            for chunk in (chunk for part in parts for chunk in torch.split(part, CHUNK_ROWS)):
                buffer.write(first, chunk.numpy())
                first += len(chunk)
            return buffer.tensor()

        yield replace(
            shards[0],
            rows=[row for shard in shards for row in shard.rows],
            tsv_lines=[line for shard in shards for line in shard.tsv_lines],
            mean={layer: joined([shard.mean[layer] for shard in shards]) for layer in shards[0].mean},
            bos={layer: joined([shard.bos[layer] for shard in shards]) for layer in shards[0].bos},
            per_tok={
                layer: ChunkedTensor([chunk for shard in shards for chunk in shard.per_tok[layer].chunks])
                for layer in shards[0].per_tok
            },
        )
