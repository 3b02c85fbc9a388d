"""One output in the making: its rows gather in any order, and when all are there it is written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_esm.atomic import Staged, discard, require_scratch
from dist_esm.config import Format, Include
from dist_esm.fasta.blocks import CHANGED, FastaError
from dist_esm.names import part_ending
from dist_esm.outputs.embeddings import ChunkedTensor, OutputTable
from dist_esm.outputs.formats.base import Place
from dist_esm.outputs.formats.registry import FORMATS
from dist_esm.outputs.formats.write import stage_output, write_output
from dist_esm.outputs.loose import EarlyFiles, write_loose_output
from dist_esm.outputs.placed import (
    RowsInPages,
    Target,
    checksum_of_output,
    in_place,
    link_output,
    shapes,
    write_placed_shard,
    write_unit,
)
from dist_esm.outputs.region import OutsideError, Region, WrittenRegion
from dist_esm.outputs.row_buffer import Memory, NamelessFile, RowBuffer, RowFile, torch_dtype
from dist_esm.outputs.shards import write_shard
from dist_esm.outputs.work import Work
from dist_esm.types import Extent, FastaFile, ProteinEmbedding, Row, Unit

MAX_PLACES = 8
SHARDS = Path(".dist_esm") / "shards"
"""Folder of the shards in an output directory."""


@dataclass(frozen=True)
class OutputSettings:
    """What to write, and where."""

    output_dir: Path
    scratch: Path
    """Folder of this rank's temporary files."""
    format: Format
    include: Sequence[Include]
    main_layer: int
    """The last layer requested, whose mean is always written."""
    representations: Sequence[tuple[Include, int]]
    """Kinds and layers to write."""
    width: int
    """D."""
    dtype: np.dtype[Any]
    """float32 or float16."""
    max_proteins_per_output: int
    """Records of one numbered part."""
    provenance: dict[str, Any]
    """Goes into every output."""
    is_compressed: bool = False
    """Compress the numbers."""
    places: dict[str, dict[tuple[str, int], Place]] = field(default_factory=dict)
    """Where the numbers of cut files belong, of the last `MAX_PLACES`: some formats take long for it."""

    @property
    def residue_bytes(self) -> int:
        """Bytes that the representations of one residue take."""
        num_layers = sum(kind is Include.per_tok for kind, _ in self.representations)
        return self.width * self.dtype.itemsize * num_layers

    def table(
        self,
        file: FastaFile,
        rows: Sequence[Row] = (),
        tsv_lines: Sequence[str] = (),
        numbers: Mapping[str, Any] | None = None,
    ) -> OutputTable:
        """Return the table of an output. Given no tensors, by kind and layer, it has some without numbers."""
        if numbers is None:
            keys = [(kind.name, layer) for kind, layer in self.representations]
            numbers = shapes(keys, rows, self.dtype, self.width)
        return OutputTable(
            source=file.source,
            provenance=self.provenance,
            include=[kind.name for kind in self.include],
            main_layer=self.main_layer,
            rows=list(rows),
            tsv_lines=list(tsv_lines),
            **numbers,
        )

    @property
    def is_loose(self) -> bool:
        """An output has a file for each protein."""
        return FORMATS[self.format.name].codec.loose is not None

    def table_of_one(self, file: FastaFile, row: Row, embedding: ProteinEmbedding) -> OutputTable:
        """Return the table of one protein."""
        numbers = no_numbers()
        for (kind, layer), rows in embedding.items():
            vectors = torch.from_numpy(np.ascontiguousarray(rows, dtype=self.dtype).reshape(-1, self.width))
            numbers[kind.name][layer] = as_numbers(kind, vectors)
        return self.table(file, [row], numbers=numbers)

    def target(self, file: FastaFile, unit: Unit, part: int) -> Target | None:
        """Return where the numbers of an output of a unit belong, if they can be written to their places."""
        codec = in_place(self.format, self.is_compressed)
        if codec is None:
            return None
        if unit.layout is not None:
            stem = self.output_dir / SHARDS / shards_name(file)
            name = f"{unit.layout.digest} {file.output}"
            if name not in self.places:
                while len(self.places) >= MAX_PLACES:
                    del self.places[next(iter(self.places))]
                lengths = unit.layout.lengths
                self.places[name] = codec.places(self.table(file), unit.layout.total, self.dtype, lengths)
            return Target.of_cut_file(stem, codec, self.places[name], self.width, self.dtype, unit.layout)
        if part < len(unit.parts):
            path = self.scratch / f"{shards_name(file)}.{unit.ordinal}.{part}"
            return Target.of_output(path, codec, self.table(file), self.dtype, unit.parts[part])
        return None


def no_numbers() -> dict[str, dict[int, Any]]:
    """Return the numbers of a table that has none yet: a dict of layers for each kind."""
    return {kind.name: {} for kind in Include}


def as_numbers(kind: Include, tensor: Tensor) -> Tensor | ChunkedTensor:
    """Return all rows of a kind and layer, shape (n, D), as a table holds them."""
    return ChunkedTensor([tensor]) if kind is Include.per_tok else tensor


def shards_name(file: FastaFile) -> str:
    """Return what the names of a file's shards begin with: a hash in place of the output's name, to which a
    number would add more than a file system takes."""
    return hashlib.sha256(os.fsencode(file.output)).hexdigest()[:32]


@dataclass
class OutputBuilder:
    """Gathers the rows of one output: of a whole file, of a numbered part of one, or of one shard."""

    part: int
    """0, 1, ... among the outputs of its unit."""
    target: Target | None = None
    """Where its numbers belong, if they are written to their places in the output of a file that was cut."""
    rows: list[Row] = field(default_factory=list)
    tsv_lines: list[str] = field(default_factory=list)
    buffers: dict[tuple[Include, int], RowBuffer] = field(default_factory=dict)
    regions: dict[tuple[Include, int], Region] = field(default_factory=dict)
    early: EarlyFiles | None = None
    """Files of proteins that found no room in memory, in a format with a file for each. From the first one on
    all go there."""
    num_residues: int = 0
    num_embedded: int = 0
    """Proteins whose embedding is in its place."""
    is_closed: bool = False
    """No further record will come."""
    is_submitted: bool = False
    """It was handed over to be written."""
    is_wanted: bool = True
    """Its unit has not failed."""

    @property
    def is_complete(self) -> bool:
        """All records are known, and all embeddings are in their places."""
        return self.is_closed and self.num_embedded == len(self.rows)

    @property
    def num_bytes(self) -> int:
        """Size of its numbers."""
        return sum(buffer.num_bytes for buffer in self.buffers.values())

    def put(
        self,
        index: int,
        first_row: int,
        embedding: ProteinEmbedding,
        settings: OutputSettings,
        memory: Memory,
        file: FastaFile,
        unit: Unit,
    ) -> None:
        """Put the embedding of protein `index`, whose residues begin at `first_row`, in its place.

        Raises
        ------
        FastaError
            If there is no such place, because the file was changed.
        OSError
            If there is no room for it.
        """
        if settings.is_loose and not self._has_room(index, first_row, embedding, settings, memory):
            self.early = self.early or EarlyFiles(settings.format, settings.scratch)
            self.early.write(index, settings.table_of_one(file, self.rows[index], embedding))
            self.num_embedded += 1
            return
        for (kind, layer), rows in embedding.items():
            buffer = self.buffers.get((kind, layer))
            if buffer is None:
                buffer = self.buffers[kind, layer] = self._buffer(kind, layer, settings, memory, unit)
            try:
                buffer.write(first_row if kind is Include.per_tok else index, rows)
            except OutsideError:
                raise FastaError(CHANGED) from None
        self.num_embedded += 1

    def _has_room(
        self,
        index: int,
        first_row: int,
        embedding: ProteinEmbedding,
        settings: OutputSettings,
        memory: Memory,
    ) -> bool:
        """Tell if an embedding finds room in memory, where those before it did."""
        if self.early is not None:
            return False
        num_bytes = missing = 0
        for key, rows in embedding.items():
            kind, _ = key
            num_rows = first_row + len(rows) if kind is Include.per_tok else index + 1
            of_all = num_rows * settings.width * settings.dtype.itemsize
            num_bytes += of_all
            missing += self.buffers[key].missing(num_rows) if key in self.buffers else of_all
        return memory.has_room(missing, num_bytes)

    def _buffer(
        self, kind: Include, layer: int, settings: OutputSettings, memory: Memory, unit: Unit
    ) -> RowBuffer:
        make_file: Callable[[], RowFile] = partial(NamelessFile, settings.scratch)
        count = unit.count.residues if kind is Include.per_tok else unit.count.sequences
        if unit.first_part is not None and unit.count.sequences:  # it is one of several outputs of the unit
            size = min(unit.part_size or settings.max_proteins_per_output, unit.count.sequences)
            count = -(-count * size // unit.count.sequences)
        if self.target is not None:
            own = self.target.layout.own
            count = own.residues if kind is Include.per_tok else own.proteins
            if (kind.name, layer) in self.target.places:
                make_file = partial(self._row_file, kind, layer, self.target, settings.scratch)
        return RowBuffer(settings.width, settings.dtype, make_file, memory, count)

    def _row_file(self, kind: Include, layer: int, target: Target, scratch: Path) -> Region | RowsInPages:
        return target.row_file((kind.name, layer), self._region(kind, layer, target, scratch))

    def _region(self, kind: Include, layer: int, target: Target, scratch: Path) -> Region:
        require_scratch(scratch)
        if (kind, layer) not in self.regions:
            self.regions[kind, layer] = target.region((kind.name, layer))
        return self.regions[kind, layer]

    def close(self) -> None:
        """Give its rows up."""
        for buffer in self.buffers.values():
            buffer.close()
        for region in self.regions.values():
            region.close()
        if self.early is not None:
            self.early.close()
        if self.target is not None and not self.target.is_shared:
            discard(self.target.path)

    def work(self, settings: OutputSettings, file: FastaFile, unit: Unit) -> Work:
        """Return what writes it under temporary names: a whole output, a numbered part of one, or a shard.

        Raises
        ------
        FastaError
            If its numbers have places, and its proteins are not those that the plan has.
        """
        is_in_place = any(buffer.is_in_place for buffer in self.buffers.values())
        if unit.is_shard and self.target is not None:
            self._require_planned(settings, self.target)
            if is_in_place:
                return Work(partial(self._write_placed_shard, settings, file, unit, self.target))
            whole_unit = self._table(settings, file), self.target.alone, unit.ordinal, settings.scratch
            return Work(partial(write_unit, *whole_unit), is_movable=True)
        if unit.is_shard:
            # With the slice: a launch that cuts otherwise must not write over a unit that it takes as done.
            name = f"{shards_name(file)}.{unit.slice.start}-{unit.slice.stop or 'end'}.{unit.ordinal:06d}"
            path = settings.output_dir / SHARDS / name
            table = self._table(settings, file)
            write = partial(write_shard, table, settings.format, path, settings.scratch, self.early)
            return Work(write, is_movable=self.early is None)
        stem = settings.output_dir / file.output
        part = "" if unit.first_part is None else part_ending(unit.first_part + self.part + 1)
        if self.target is not None and is_in_place:
            self._require_planned(settings, self.target)
            return Work(partial(self._write_around, settings, file, stem, part, self.target))
        table = self._table(settings, file)
        if self.early is not None:
            early = table, settings.format, stem, settings.scratch, part, self.early
            return Work(partial(write_loose_output, *early))
        whole = settings.format, table, stem, settings.scratch, part, settings.is_compressed
        return Work(partial(write_output, *whole), is_movable=True)

    def _write_placed_shard(
        self, settings: OutputSettings, file: FastaFile, unit: Unit, target: Target
    ) -> Staged:
        """Write what is left of the numbers of a unit to their places, and all else to a shard."""
        table, regions = self._write_numbers(settings, file, target)
        return write_placed_shard(table, regions, target, unit.ordinal, settings.scratch)

    def _write_around(
        self, settings: OutputSettings, file: FastaFile, stem: Path, part: str, target: Target
    ) -> Staged:
        """Complete an output of which some numbers are in their places already, and give it a second name.

        The first goes with the builder: until then the output can be completed again, if the disk turns out
        to be full. Where files have one name alone it is moved, since a copy would write all of it again.
        """
        table, regions = self._write_numbers(settings, file, target)
        codec = in_place(settings.format, settings.is_compressed)
        assert codec is not None
        for key, region in regions.items():
            region.write_ends(target.file(key))
        codec.finish(table, target.path, {key: region.crc32 for key, region in regions.items()})
        known: dict[str, dict[int, bytes]] = {}
        for key, region in regions.items():
            known.setdefault(target.places[key].file, {}).update(region.whole_blocks())

        def name(path: Path) -> str:
            link_output(target.path, path, otherwise=os.rename)
            return checksum_of_output(path, known)

        return stage_output(settings.format, table.tsv_lines, stem, settings.scratch, name, part)

    def _require_planned(self, settings: OutputSettings, target: Target) -> None:
        """Raise FastaError if its proteins are not those that the plan has: they would not fit into their
        places."""
        codec = in_place(settings.format, settings.is_compressed)
        assert codec is not None
        own = Extent(len(self.rows), self.num_residues, codec.text_size(self.rows))
        lengths = [row.embedded for row in self.rows] if codec.has_lengths else []
        if own != target.layout.own or lengths != target.layout.own_lengths:
            raise FastaError(CHANGED)

    def _write_numbers(
        self, settings: OutputSettings, file: FastaFile, target: Target
    ) -> tuple[OutputTable, dict[tuple[str, int], WrittenRegion]]:
        """Write numbers that have places to these, and return the table with all others."""
        regions = {}
        table = settings.table(file, self.rows, self.tsv_lines)
        for kind, layer in settings.representations:
            key, buffer = (kind.name, layer), self.buffers.get((kind, layer))
            if key not in target.places:
                numbers = as_numbers(kind, self._tensor(kind, layer, settings))
                getattr(table, kind.name)[layer] = numbers
            elif buffer is not None and buffer.is_in_place:
                regions[key] = self._region(kind, layer, target, settings.scratch).read_back()
            else:
                regions[key] = target.write(key, self._tensor(kind, layer, settings), settings.scratch)
        return table, regions

    def _tensor(self, kind: Include, layer: int, settings: OutputSettings) -> Tensor:
        """Return all numbers of a kind and layer, shape (n, D)."""
        buffer = self.buffers.get((kind, layer))
        empty = torch.empty(0, settings.width, dtype=torch_dtype(settings.dtype))
        return buffer.tensor() if buffer is not None else empty

    def _table(self, settings: OutputSettings, file: FastaFile) -> OutputTable:
        numbers = no_numbers()
        for kind, layer in settings.representations:
            numbers[kind.name][layer] = as_numbers(kind, self._tensor(kind, layer, settings))
        return settings.table(file, self.rows, self.tsv_lines, numbers)
