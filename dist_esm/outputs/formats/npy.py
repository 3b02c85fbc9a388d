"""npy: a folder with one matrix for each kind and layer, which numpy maps, and a table of the proteins."""

from __future__ import annotations

import csv
import io
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import cached_property
from itertools import accumulate, islice
from pathlib import Path
from typing import Any, TextIO

import numpy as np
from numpy.lib import format as npy_format
from numpy.typing import NDArray
from torch import Tensor

from dist_esm.atomic import SummedFolder, write_at
from dist_esm.outputs.embeddings import ChunkedTensor, OutputTable, little_endian_blocks, numpy_dtype
from dist_esm.outputs.formats.base import (
    About,
    Codec,
    ContentSize,
    InPlace,
    Place,
    plain_bytes,
    representation_name,
)
from dist_esm.types import Extent

PROTEINS = "proteins.tsv"
COLUMNS = ("id", "index", "length", "offset", "header")
ABOUT = "provenance.json"


def file_name(kind: str, layer: int) -> str:
    """Return the name of the matrix of a kind and layer."""
    return f"{representation_name(kind, layer)}.npy"


def write_npy(table: OutputTable, path: Path) -> str:
    """Write ``mean_layer_33.npy`` and ``bos_layer_33.npy``, shape (N, D), and ``per_tok_layer_33.npy``, shape
    (sum of embedded residues, D), for each layer, and a table of the proteins.

    The matrices are C-contiguous float32 or float16. The mean of the last requested layer is always there.
    ``proteins.tsv`` has a line for each protein in file order: id, index (of the record in its input, from
    0), length (embedded residues), offset (its first row in the matrices of residues) and header. A field
    with a tab or a quotation mark stands in quotation marks, as `csv`, pandas and polars read it.
    ``provenance.json`` has the fields of `About`.
    """
    about = About.of(table)
    with SummedFolder(path) as folder:
        for kind, layers in about.kinds.items():
            for layer in layers:
                _write_matrix(folder, file_name(kind, layer), getattr(table, kind)[layer])
        with folder.text(PROTEINS) as file:
            _write_proteins(table, file)
        with folder.text(ABOUT) as file:
            _write_about(about, file)
    return folder.checksum()


def _write_matrix(folder: SummedFolder, name: str, rows: Tensor | ChunkedTensor) -> None:
    with folder.file(name) as file:
        file.write(_matrix_header(numpy_dtype(rows.dtype), rows.shape))
        for block in little_endian_blocks(rows):
            file.write(block.data)


def _matrix_header(dtype: np.dtype[Any], shape: Sequence[int]) -> bytes:
    text = io.BytesIO()
    descr = npy_format.dtype_to_descr(dtype.newbyteorder("<"))
    header = {"descr": descr, "fortran_order": False, "shape": tuple(shape)}
    npy_format.write_array_header_1_0(text, header)
    return text.getvalue()


def _write_proteins(table: OutputTable, file: TextIO) -> None:
    lines = csv.writer(file, "excel-tab", lineterminator="\n")
    lines.writerow(COLUMNS)
    lines.writerows(
        (row.id, row.number, row.embedded, offset, row.header)
        for row, offset in zip(table.rows, table.offsets, strict=False)
    )


def _write_about(about: About, file: TextIO) -> None:
    file.write(json.dumps(asdict(about), indent=1) + "\n")


def places(
    table: OutputTable, extent: Extent, dtype: np.dtype[Any], lengths: Sequence[int]
) -> dict[tuple[str, int], Place]:
    """Return where the rows of each kind and layer begin."""
    about = About.of(table)
    found: dict[tuple[str, int], Place] = {}
    for kind, layers in about.kinds.items():
        num_rows = extent.residues if kind == "per_tok" else extent.proteins
        header = _matrix_header(dtype, (num_rows, about.width))
        found |= {(kind, layer): Place(file_name(kind, layer), len(header)) for layer in layers}
    return found


def finish_npy(table: OutputTable, path: Path, crcs: Mapping[tuple[str, int], int]) -> None:
    """Write the headers of matrices whose rows have their places already, and the tables beside them."""
    about = About.of(table)
    path.mkdir(exist_ok=True)
    for kind, layers in about.kinds.items():
        for layer in layers:
            rows: Tensor | ChunkedTensor = getattr(table, kind)[layer]
            header = _matrix_header(numpy_dtype(rows.dtype), rows.shape)
            write_at(path / file_name(kind, layer), 0, header)
    with open(path / PROTEINS, "w", encoding="utf-8", newline="") as file:
        _write_proteins(table, file)
    with open(path / ABOUT, "w", encoding="utf-8", newline="") as file:
        _write_about(about, file)


@contextmanager
def fields_of_any_size() -> Iterator[None]:
    """Let `csv` read a field of more than 128 KiB: nothing limits a header."""
    limit = csv.field_size_limit(sys.maxsize)
    try:
        yield
    finally:
        csv.field_size_limit(limit)


class OpenedNpy:
    """An output opened for reading. Matrices are mapped, and read from disk when they are used."""

    def __init__(self, path: Path) -> None:
        self.about = About(**json.loads((path / ABOUT).read_text(encoding="utf-8")))
        self._path = path
        self._mapped: dict[str, NDArray[Any]] = {}
        self.num_proteins = len(self._matrix("mean", self.about.main_layer))

    def _column(self, name: str) -> list[str]:
        """Read a column of the table of proteins."""
        place = COLUMNS.index(name)
        with open(self._path / PROTEINS, encoding="utf-8", newline="") as file, fields_of_any_size():
            return [line[place] for line in islice(csv.reader(file, "excel-tab"), 1, None)]

    @cached_property
    def _starts(self) -> list[int]:
        """First row of each protein's residues, and the number of all."""
        return [0, *accumulate(self.lengths())]

    def ids(self) -> list[str]:
        """Read the ids of all proteins."""
        return self._column("id")

    def headers(self) -> list[str]:
        """Read the headers of all proteins."""
        return self._column("header")

    def lengths(self) -> list[int]:
        """Read the embedded residues of all proteins."""
        return list(map(int, self._column("length")))

    def vectors(self, kind: str, layer: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return one representation of proteins, shape (n, D)."""
        return self._matrix(kind, layer)[start:stop]

    def vector(self, kind: str, layer: int, position: int) -> NDArray[Any]:
        """Return one representation of one protein, shape (D,)."""
        return np.asarray(self._matrix(kind, layer)[position])

    def residues(self, layer: int, position: int) -> NDArray[Any]:
        """Return the residues of one protein, shape (L, D)."""
        start, stop = self._starts[position : position + 2]
        return self._matrix("per_tok", layer)[start:stop]

    def _matrix(self, kind: str, layer: int) -> NDArray[Any]:
        name = file_name(kind, layer)
        if name not in self._mapped:
            self._mapped[name] = np.asarray(np.load(self._path / name, mmap_mode="r"))
        return self._mapped[name]


def output_bytes(size: ContentSize) -> int:
    """Return about how many bytes an output will have: numbers, text, a head for each matrix, and three
    numbers in each line of the table."""
    return plain_bytes(size) + 530 + 136 * size.num_matrices + 14 * size.proteins


CODEC = Codec(
    write_npy,
    OpenedNpy,
    (PROTEINS, ABOUT),
    in_place=InPlace(places, finish_npy),
    output_bytes=output_bytes,
    output_files=lambda size: size.num_matrices + len((PROTEINS, ABOUT)) + 1,
)
