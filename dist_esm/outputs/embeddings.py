"""The content of one output: a table of proteins and their representations."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_esm.types import Row

BLOCK_ROWS = 1 << 12


class ChunkedTensor:
    """Tensors of one width and dtype that follow one another, read as if they were one.

    Nothing is copied to make it: the whole may be larger than memory.

    Parameters
    ----------
    chunks
        One at least, each of shape (rows, width).
    """

    def __init__(self, chunks: Sequence[Tensor]) -> None:
        self.chunks = list(chunks)
        self._ends = list(accumulate(map(len, self.chunks)))

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and width of the whole."""
        return self._ends[-1], self.chunks[0].shape[1]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of all chunks."""
        return self.chunks[0].dtype

    def __getitem__(self, span: slice) -> Tensor:
        """Rows from start up to stop: a view if one chunk has them all, as it has all of a protein's."""
        first = min(bisect_right(self._ends, span.start), len(self.chunks) - 1)
        parts = []
        for chunk, end in zip(self.chunks[first:], self._ends[first:], strict=True):
            before = end - len(chunk)
            parts.append(chunk[max(0, span.start - before) : span.stop - before])
            if span.stop <= end:
                break
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def numpy_dtype(dtype: torch.dtype) -> np.dtype[Any]:
    """Return numpy's little-endian float32 or float16 for torch's."""
    return np.dtype(str(dtype).removeprefix("torch.")).newbyteorder("<")


def little_endian(rows: Tensor) -> NDArray[Any]:
    """Return rows as they are written: C-contiguous and little-endian; without a copy if they are so."""
    values = np.ascontiguousarray(rows.numpy())
    return values.astype(values.dtype.newbyteorder("<"), copy=False)


def little_endian_blocks(rows: Tensor | ChunkedTensor) -> Iterator[NDArray[Any]]:
    """Give the rows of a matrix as they are written, at most `BLOCK_ROWS` at a time that are next to each
    other in memory."""
    for chunk in rows.chunks if isinstance(rows, ChunkedTensor) else [rows]:
        yield from map(little_endian, torch.split(chunk, BLOCK_ROWS))


@dataclass(frozen=True)
class OutputTable:
    """The content of one output: N proteins in file order, in fp32 or fp16."""

    source: str
    """The input file, relative to the common root of the inputs."""
    provenance: dict[str, Any]
    """Model, weights and settings that the numbers depend on."""
    include: list[str]
    """Kinds that were asked for: mean, bos, per_tok."""
    main_layer: int
    """The layer of `data`: the last one requested."""
    rows: list[Row]
    mean: dict[int, Tensor]
    """Layer to Tensor, shape (N, D); the main layer is always there."""
    bos: dict[int, Tensor]
    """Layer to Tensor, shape (N, D)."""
    per_tok: dict[int, ChunkedTensor]
    """Layer to `ChunkedTensor`, shape (sum of embedded residues, D)."""
    tsv_lines: list[str]
    """Lines of records.tsv: one for each record that was truncated, windowed, skipped, changed or given an
    id."""

    @property
    def ids(self) -> list[str]:
        """Ids in file order, duplicates included."""
        return [row.id for row in self.rows]

    @property
    def lengths(self) -> list[int]:
        """Embedded residues of each protein."""
        return [row.embedded for row in self.rows]

    @cached_property
    def offsets(self) -> list[int]:
        """Row of each protein's first residue in `per_tok`, and the number of all rows."""
        return [0, *accumulate(self.lengths)]

    def span(self, place: int) -> tuple[int, int]:
        """Return the rows of a protein's residues in `per_tok`, as (first, one past the last)."""
        return self.offsets[place], self.offsets[place + 1]
