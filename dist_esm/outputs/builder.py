"""One output in the making: its rows gather in any order, and when all are there it is written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_esm.atomic import Staged
from dist_esm.config import Format, Include
from dist_esm.outputs.embeddings import ChunkedTensor, OutputTable
from dist_esm.outputs.formats.write import write_output
from dist_esm.outputs.row_buffer import Memory, RowBuffer, torch_dtype
from dist_esm.outputs.shards import write_shard
from dist_esm.types import FastaFile, ProteinEmbedding, Row, Unit

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

    @property
    def residue_bytes(self) -> int:
        """Bytes that the representations of one residue take."""
        num_layers = sum(kind is Include.per_tok for kind, _ in self.representations)
        return self.width * self.dtype.itemsize * num_layers


@dataclass
class OutputBuilder:
    """Gathers the rows of one output: of a whole file, of a numbered part of one, or of one shard."""

    part: int
    """0, 1, ... among the outputs of its unit."""
    rows: list[Row] = field(default_factory=list)
    tsv_lines: list[str] = field(default_factory=list)
    buffers: dict[tuple[Include, int], RowBuffer] = field(default_factory=dict)
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
        unit: Unit,
    ) -> None:
        """Put the embedding of protein `index`, whose residues begin at `first_row`, in its place."""
        for (kind, layer), rows in embedding.items():
            buffer = self.buffers.get((kind, layer))
            if buffer is None:
                expected = unit.count.residues if kind is Include.per_tok else unit.count.sequences
                buffer = RowBuffer(rows.shape[-1], settings.dtype, settings.scratch, memory, expected)
                self.buffers[kind, layer] = buffer
            buffer.write(first_row if kind is Include.per_tok else index, rows)
        self.num_embedded += 1

    def close(self) -> None:
        """Give its rows up."""
        for buffer in self.buffers.values():
            buffer.close()

    def write(self, settings: OutputSettings, file: FastaFile, unit: Unit) -> Staged:
        """Write it under temporary names: a whole output, a numbered part of one, or a shard."""
        table = self._table(settings, file)
        stem = settings.output_dir / file.output
        if unit.first_part is not None:
            part = f".part{unit.first_part + self.part + 1:05d}"
            return write_output(settings.format, table, stem, settings.scratch, part, settings.is_compressed)
        if unit.is_whole:
            return write_output(
                settings.format, table, stem, settings.scratch, is_compressed=settings.is_compressed
            )
        # A hash in place of the output's name, to which a number would add more than a file system takes.
        name = hashlib.sha256(os.fsencode(file.output)).hexdigest()[:32]
        path = settings.output_dir / SHARDS / f"{name}.{unit.ordinal:06d}.pt"
        return write_shard(table, path, settings.scratch)

    def _table(self, settings: OutputSettings, file: FastaFile) -> OutputTable:
        tensors: dict[Include, dict[int, Tensor]] = {kind: {} for kind in Include}
        for kind, layer in settings.representations:
            buffer = self.buffers.get((kind, layer))
            empty = torch.empty(0, settings.width, dtype=torch_dtype(settings.dtype))
            tensors[kind][layer] = buffer.tensor() if buffer else empty
        return OutputTable(
            source=file.source,
            provenance=settings.provenance,
            include=[kind.name for kind in settings.include],
            main_layer=settings.main_layer,
            rows=self.rows,
            mean=tensors[Include.mean],
            bos=tensors[Include.bos],
            per_tok={layer: ChunkedTensor([tensor]) for layer, tensor in tensors[Include.per_tok].items()},
            tsv_lines=self.tsv_lines,
        )
