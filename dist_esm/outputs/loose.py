"""Formats with a file for each protein, which gets its name in the output at the end.

A protein's file is the same whatever its name and its place in the output, so it is written once: also in a
shard, which is a folder of such files, and when its numbers find no room in memory.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_esm.atomic import Staged, SummedFolder, discard, temporary_path
from dist_esm.config import Format
from dist_esm.outputs.embeddings import ChunkedTensor, OutputTable, numpy_dtype
from dist_esm.outputs.formats.base import Loose
from dist_esm.outputs.formats.registry import FORMATS
from dist_esm.outputs.formats.write import stage_output
from dist_esm.outputs.pickling import torch_save
from dist_esm.outputs.placed import link_output, packed, shapes, unpacked
from dist_esm.outputs.trust import LOOSE
from dist_esm.types import Row, WrittenFile

ROWS = "rows"
"""The file in it that holds all but the proteins' files."""


class EarlyFiles:
    """Files of proteins that found no room in memory, in a folder of their own.

    Parameters
    ----------
    output_format
        The format of the output.
    scratch
        A folder of this process alone, on the same file system as the output.
    """

    def __init__(self, output_format: Format, scratch: Path) -> None:
        self._loose = layout_of(output_format.name)
        self._folder = temporary_path(scratch)
        self._written: dict[int, WrittenFile] = {}

    def write(self, place: int, table: OutputTable) -> None:
        """Write the file of the protein at a place in its output, given a table of it alone.

        Raises
        ------
        OSError
            If it cannot be written.
        """
        self._folder.mkdir(exist_ok=True)
        path = self._folder / protein_file(place)
        self._written[place] = self._loose.write_protein(table, 0, path, True)

    def link(self, place: int, path: Path) -> WrittenFile | None:
        """Give the file of the protein at a place a second name; None if it is not here."""
        written = self._written.get(place)
        if written is None:
            return None
        link_output(self._folder / written.path, path)
        return replace(written, path=path.name)

    def close(self) -> None:
        """Remove the folder: what has a second name stays."""
        discard(self._folder)


def write_files(
    table: OutputTable, loose: Loose, names: Sequence[str], folder: SummedFolder, early: EarlyFiles | None
) -> None:
    """Write the files of proteins, but for those that are there already, which get second names.

    Raises
    ------
    OSError
        If one cannot be written.
    """

    def write(place: int) -> WrittenFile:
        path = folder.path / names[place]
        linked = early.link(place, path) if early is not None else None
        return linked or loose.write_protein(table, place, path, False)

    folder.add_files(write, len(names))


def write_loose_output(
    table: OutputTable, output_format: Format, stem: Path, scratch: Path, part: str, early: EarlyFiles
) -> Staged:
    """Write an output of which some proteins have their files already.

    Parameters
    ----------
    table
        All proteins; the numbers of those may be missing in it.
    output_format, stem, scratch, part
        As of `stage_output`.
    early
        What was written already.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    loose = layout_of(output_format.name)

    def write(path: Path) -> str:
        names = loose.names(table.rows)
        with SummedFolder(path) as folder:
            write_files(table, loose, names, folder, early)
            loose.write_tables(table, names, folder)
        return folder.checksum()

    return stage_output(output_format, table.tsv_lines, stem, scratch, write, part)


def write_loose_shard(
    table: OutputTable, output_format: Format, path: Path, scratch: Path, early: EarlyFiles | None = None
) -> Staged:
    """Write the shard of a unit, a file for each protein and one for all else, under a temporary name.

    Parameters
    ----------
    table
        The unit's proteins.
    output_format
        The format of its output.
    path
        The shard's final path.
    scratch
        A folder of this process alone, on the same file system.
    early
        Files that are there already; the numbers of their proteins may be missing in the table.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    loose, temporary = layout_of(output_format.name), temporary_path(scratch)
    with ExitStack() as undo:
        undo.callback(discard, temporary)
        with SummedFolder(temporary) as folder:
            names = list(map(protein_file, range(len(table.rows))))
            write_files(table, loose, names, folder, early)
            content = {
                "format": output_format.name,
                **{name: getattr(table, name) for name in ("source", "provenance", "include", "main_layer")},
                "layers": {kind: list(getattr(table, kind)) for kind in ("mean", "bos", "per_tok")},
                "width": table.mean[table.main_layer].shape[1],
                "dtype": numpy_dtype(table.mean[table.main_layer].dtype).name,
                "rows": packed(json.dumps(table.rows)),
                "tsv_lines": packed(json.dumps(table.tsv_lines)),
                "files": packed(json.dumps([vars(written) for written in folder.written])),
            }
            with folder.file(ROWS) as file:
                torch_save(content, file)
        staged = Staged(path, folder.checksum(), [(temporary, path)], marks=(ROWS,))
        undo.pop_all()
    return staged


def layout_of(format_name: str) -> Loose:
    """Return how a format with a file for each protein is laid out."""
    loose = FORMATS[format_name].codec.loose
    assert loose is not None, f"{format_name} has no file for each protein"
    return loose


def is_loose(shard: Path) -> bool:
    """Tell a folder of files from other shards, by its path."""
    return shard.suffix == LOOSE


def protein_file(place: int) -> str:
    """Return the name of a protein's file in a shard."""
    return f"{place}.protein"


def read_loose_shard(path: Path) -> tuple[Loose, OutputTable, list[WrittenFile]]:
    """Read what `write_loose_shard` wrote: its layout, its proteins without numbers, and their files.

    Raises
    ------
    OSError, RuntimeError
        If it cannot be read.
    """
    content = torch.load(path / ROWS, weights_only=True)
    rows = list(map(Row._make, unpacked(content["rows"])))
    keys = [(kind, layer) for kind, layers in content["layers"].items() for layer in layers]
    table = OutputTable(
        **{name: content[name] for name in ("source", "provenance", "include", "main_layer")},
        rows=rows,
        tsv_lines=unpacked(content["tsv_lines"]),
        **shapes(keys, rows, np.dtype(content["dtype"]), content["width"]),
    )
    return (
        layout_of(content["format"]),
        table,
        [WrittenFile(**written) for written in unpacked(content["files"])],
    )


def read_numbers(path: Path) -> OutputTable:
    """Read the shard with its numbers."""
    loose, table, files = read_loose_shard(path)
    proteins = [loose.read_protein(path / file.path) for file in files]
    numbers: dict[str, Any] = {}
    for kind in ("mean", "bos", "per_tok"):
        numbers[kind] = {}
        for layer, tensor in getattr(table, kind).items():
            chunks = [protein[kind, layer] for protein in proteins]
            empty = torch.empty(0, tensor.shape[1], dtype=tensor.dtype)
            if kind == "per_tok":
                numbers[kind][layer] = ChunkedTensor([empty, *chunks])
            else:
                numbers[kind][layer] = torch.stack(chunks) if chunks else empty
    return replace(table, **numbers)


def finish_loose(
    paths: Sequence[Path], output_format: Format, stem: Path, scratch: Path
) -> tuple[Staged, list[str]]:
    """Stage the output of a file's shards, whose files get second names, and return the ids in it.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    shards = [read_loose_shard(path) for path in paths]
    rows = [row for _, table, _ in shards for row in table.rows]
    tsv_lines = [line for _, table, _ in shards for line in table.tsv_lines]
    loose, first, _ = shards[0]
    table = replace(first, rows=rows, tsv_lines=tsv_lines)
    names = loose.names(rows)
    sources = [
        (path / file.path, file) for path, (_, _, files) in zip(paths, shards, strict=True) for file in files
    ]

    def write(path: Path) -> str:
        with SummedFolder(path) as folder:
            for name, (source, file) in zip(names, sources, strict=True):
                link_output(source, path / name)
                folder.add(replace(file, path=name))
            loose.write_tables(table, names, folder)
        return folder.checksum()

    return stage_output(output_format, tsv_lines, stem, scratch, write), [row.id for row in rows]
