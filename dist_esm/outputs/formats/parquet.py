"""Parquet: a row for each protein. The only door to pyarrow."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_esm.atomic import SummedFile
from dist_esm.outputs.embeddings import OutputTable, little_endian
from dist_esm.outputs.formats.base import About, Codec, ContentSize
from dist_esm.outputs.formats.parquet_mapped import MappedColumn, map_column
from dist_esm.outputs.formats.parquet_pages import NumberColumn, ParquetFile
from dist_esm.types import Row

GROUP_BYTES = 32 << 20
"""Numbers in a row group, about: it is what a reader of one row reads."""
GROUP_ROWS = 1 << 16
COUNTS = (
    "embedded",
    "upper_cased",
    "stops_removed",
    "gaps_removed",
    "replaced",
    "blanks_removed",
    "digits_removed",
)


def write_parquet(table: OutputTable, path: Path, is_compressed: bool = False) -> str:
    """Write a row for each protein, in file order.

    Columns: ``id``, ``header``, ``source`` (path of the input relative to the common root), ``index`` (of the
    record in its input, from 0), ``length`` (residues before truncation), ``embedded`` (residues that the
    numbers are of), ``outcome`` (ok, truncated or windowed), ``upper_cased``, ``stops_removed``,
    ``gaps_removed``, ``replaced``, ``blanks_removed``, ``digits_removed`` (letters changed), and for each
    kind and layer ``mean_layer_33`` and ``bos_layer_33``, fixed-size lists of D numbers, and
    ``per_tok_layer_33``, a list of these. The mean of the last requested layer is always there. The metadata
    of the schema has ``model_name`` and the fields of `About`, ``provenance`` as JSON.

    Numbers are written as they are or, if `is_compressed`, with zstd; all else always is.
    """
    import pyarrow as pa

    about = About.of(table)
    schema = schema_of(table, about)
    compress = pa.Codec("zstd").compress if is_compressed else None
    with SummedFile(path) as file:
        parquet = ParquetFile(file, compress and partial(compress, asbytes=True))
        for first, last, start, stop in row_groups(table):
            rows = table.rows[first:last]
            numbers: dict[str, NumberColumn] = {}
            for kind, layers in about.kinds.items():
                for layer in layers:
                    span = slice(start, stop) if kind == "per_tok" else slice(first, last)
                    values = little_endian(getattr(table, kind)[layer][span])
                    lengths = [row.embedded for row in rows] if kind == "per_tok" else None
                    numbers[f"{kind}_layer_{layer}"] = NumberColumn(values, lengths)
            parquet.add_group(without_numbers(schema, rows, about.source, is_compressed), numbers)
        parquet.finish(without_numbers(schema, [], about.source, is_compressed))
    return file.sha256()


def schema_of(table: OutputTable, about: About) -> Any:
    """Return the Arrow schema of an output, with its metadata."""
    import pyarrow as pa

    number_type = pa.from_numpy_dtype(table.mean[table.main_layer].numpy().dtype)
    vector = pa.list_(number_type, about.width)
    return pa.schema(
        [
            *((name, pa.string()) for name in ("id", "header", "source")),
            *((name, pa.int64()) for name in ("index", "length", "embedded")),
            ("outcome", pa.string()),
            *((name, pa.int64()) for name in COUNTS[1:]),
            *(
                (f"{kind}_layer_{layer}", pa.list_(vector) if kind == "per_tok" else vector)
                for kind, layers in about.kinds.items()
                for layer in layers
            ),
        ],
        metadata=about.to_text(),
    )


def without_numbers(schema: Any, rows: Sequence[Row], source: str, is_compressed: bool) -> bytes:
    """Return a Parquet file of these proteins, in one row group, with nulls in place of their numbers."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    values = {
        "id": [row.id for row in rows],
        "header": [row.header for row in rows],
        "source": [source] * len(rows),
        "index": [row.number for row in rows],
        "length": [row.length for row in rows],
        "outcome": [row.outcome for row in rows],
        **{name: [getattr(row, name) for row in rows] for name in COUNTS},
    }
    arrays = [
        pa.array(values[field.name], field.type) if field.name in values else pa.nulls(len(rows), field.type)
        for field in schema
    ]
    # embeddings are as good as random digits: zstd makes them 7% smaller
    codecs = {name: "zstd" if name in values or is_compressed else "none" for name in pq_leaves(schema)}
    sink = pa.BufferOutputStream()
    with pq.ParquetWriter(
        sink,
        schema,
        compression=codecs,
        use_dictionary=["source", "outcome"],
        write_statistics=["id", "index", "length", *COUNTS],
    ) as writer:
        if rows:
            writer.write_batch(pa.record_batch(arrays, schema=schema), row_group_size=len(rows))
    written: bytes = sink.getvalue().to_pybytes()
    return written


def pq_leaves(schema: Any) -> Iterator[str]:
    """Parquet's names of the columns that are stored: the fields, with the path to the numbers of lists."""
    import pyarrow as pa

    for field in schema:
        path, arrow_type = field.name, field.type
        while pa.types.is_list(arrow_type) or pa.types.is_fixed_size_list(arrow_type):
            path, arrow_type = f"{path}.list.element", arrow_type.value_type
        yield path


def row_groups(table: OutputTable) -> Iterator[tuple[int, int, int, int]]:
    """Proteins of each row group as (first, one past the last) and their residues likewise."""
    tensors = [*table.mean.values(), *table.bos.values()]
    for_each = sum(tensor.shape[1] * tensor.dtype.itemsize for tensor in tensors)
    for_residue = sum(rows.shape[1] * rows.dtype.itemsize for rows in table.per_tok.values())
    first = start = stop = num_bytes = 0

    def size(row: Row) -> int:
        return for_each + row.embedded * for_residue

    for position, row in enumerate(table.rows):
        if position > first and (num_bytes + size(row) > GROUP_BYTES or position - first == GROUP_ROWS):
            yield first, position, start, stop
            first, start, num_bytes = position, stop, 0
        stop += row.embedded
        num_bytes += size(row)
    if table.rows:
        yield first, len(table.rows), start, stop


class OpenedParquet:
    """An output opened for reading. Numbers are mapped, and read from disk when they are used. If they are
    compressed, the column of a row group is read when a row of it is asked for, and the last is kept."""

    def __init__(self, path: Path) -> None:
        import pyarrow.parquet as pq

        self._file = pq.ParquetFile(path)
        self._bytes: NDArray[np.uint8] = np.asarray(np.memmap(path, np.uint8, "r"))
        self._schema = self._file.schema_arrow
        metadata = {key.decode(): value.decode() for key, value in self._schema.metadata.items()}
        self.about = About.from_text(metadata)
        groups = range(self._file.num_row_groups)
        self._starts = [0, *accumulate(self._file.metadata.row_group(group).num_rows for group in groups)]
        self._mapped: dict[tuple[int, str], MappedColumn | None] = {}
        self._offsets: dict[int, list[int]] = {}
        """Of the residues of the proteins of a row group."""
        self._kept: tuple[tuple[int, str], Any] | None = None

    @property
    def num_proteins(self) -> int:
        """N."""
        return int(self._starts[-1])

    def ids(self) -> list[str]:
        """Read the ids of all proteins."""
        return self._column("id")

    def headers(self) -> list[str]:
        """Read the headers of all proteins."""
        return self._column("header")

    def lengths(self) -> list[int]:
        """Read the embedded residues of all proteins."""
        return self._column("embedded")

    def vectors(self, kind: str, layer: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return one representation of proteins, shape (n, D), from the row groups that have them."""
        start, stop, _ = slice(start, stop).indices(self.num_proteins)
        parts = [
            self._vectors(group, f"{kind}_layer_{layer}", max(0, start - first), min(stop, end) - first)
            for group, (first, end) in enumerate(pairwise(self._starts))
            if first < stop and start < end
        ]
        if not parts:
            return np.empty((0, self.about.width), np.float32)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def vector(self, kind: str, layer: int, position: int) -> NDArray[Any]:
        """Return one representation of one protein, shape (D,)."""
        group, row = self._find(position)
        return np.asarray(self._vectors(group, f"{kind}_layer_{layer}", row, row + 1)[0])

    def residues(self, layer: int, position: int) -> NDArray[Any]:
        """Return the residues of one protein, shape (L, D)."""
        group, row = self._find(position)
        name = f"per_tok_layer_{layer}"
        mapped = self._map(group, name)
        if mapped is None:
            return numbers(self._decoded(group, name).slice(row, 1).flatten(), self.about.width)
        if group not in self._offsets:
            lengths = self._file.read_row_group(group, ["embedded"])["embedded"].to_pylist()
            self._offsets[group] = [0, *accumulate(lengths)]
        return mapped.vectors(*self._offsets[group][row : row + 2])

    def _find(self, position: int) -> tuple[int, int]:
        group = bisect_right(self._starts, position) - 1
        return group, position - self._starts[group]

    def _column(self, name: str) -> list[Any]:
        values: list[Any] = self._file.read([name])[name].to_pylist()
        return values

    def _vectors(self, group: int, name: str, start: int, stop: int) -> NDArray[Any]:
        """Return rows of a column of vectors, from `start` up to `stop` in their row group."""
        mapped = self._map(group, name)
        if mapped is not None:
            return mapped.vectors(start, stop)
        return numbers(self._decoded(group, name).slice(start, stop - start), self.about.width)

    def _map(self, group: int, name: str) -> MappedColumn | None:
        """Map a column of numbers in a row group; None if it must be decoded."""
        if (group, name) not in self._mapped:
            self._mapped[group, name] = None
            row_group = self._file.metadata.row_group(group)
            chunks = (row_group.column(index) for index in range(row_group.num_columns))
            chunk = next(chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] == name)
            if chunk.compression == "UNCOMPRESSED" and not chunk.has_dictionary_page:
                value_type = self._schema.field(name).type
                while hasattr(value_type, "value_type"):
                    value_type = value_type.value_type
                start = chunk.data_page_offset
                dtype = np.dtype(value_type.to_pandas_dtype()).newbyteorder("<")
                stop = start + chunk.total_compressed_size
                self._mapped[group, name] = map_column(self._bytes, start, stop, dtype, self.about.width)
        return self._mapped[group, name]

    def _decoded(self, group: int, name: str) -> Any:
        """Read a column of a row group."""
        if self._kept is None or self._kept[0] != (group, name):
            self._kept = None  # not two at a time
            values = self._file.read_row_group(group, [name])[name].combine_chunks()
            self._kept = ((group, name), values)
        return self._kept[1]


def numbers(vectors: Any, width: int) -> NDArray[Any]:
    """An Arrow array of fixed-size lists as a matrix, without a copy."""
    return np.asarray(vectors.flatten().to_numpy(zero_copy_only=True)).reshape(-1, width)


def output_bytes(size: ContentSize) -> int:
    """Return about how many bytes an uncompressed output will have.

    Text is always compressed, to a third or so; each residue has five bytes of levels beside its numbers; a
    row group has a description of its columns. Constants as measured.
    """
    groups = -(-size.number_bytes // GROUP_BYTES)
    levels = 5 * size.residues * len(size.kinds["per_tok"])
    of_columns = (groups + 1) * (2500 + 100 * size.num_matrices)
    return size.number_bytes + levels + size.text_bytes // 3 + of_columns


CODEC = Codec(
    write_parquet,
    OpenedParquet,
    write_compressed=partial(write_parquet, is_compressed=True),
    output_bytes=output_bytes,
)
