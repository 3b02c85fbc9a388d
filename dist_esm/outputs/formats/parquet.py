"""Parquet: a row for each protein. The only door to pyarrow."""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_esm.atomic import SummedFile, write_at
from dist_esm.outputs.embeddings import OutputTable, little_endian, numpy_dtype
from dist_esm.outputs.formats.base import About, Codec, ContentSize, InPlace, Place, representation_name
from dist_esm.outputs.formats.parquet_mapped import MappedColumn, map_column
from dist_esm.outputs.formats.parquet_pages import MAGIC, Chunk, Page, ParquetFile, page_header, pages
from dist_esm.types import Extent, Row

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
    dtype = numpy_dtype(table.mean[table.main_layer].dtype)
    compress = pa.Codec("zstd").compress if is_compressed else None
    with SummedFile(path) as file:
        parquet = ParquetFile(file, compress and partial(compress, asbytes=True))
        for (kind, layer), groups in numbers_of(about, table.lengths, dtype).items():
            rows = getattr(table, kind)[layer]
            for group in groups:
                content = ((page, little_endian(rows[page.first : page.stop])) for page in group)
                parquet.add_numbers(representation_name(kind, layer), content, about.width)
        _write_rest(parquet, table, about, is_compressed)
    return file.checksum()


def _write_rest(parquet: ParquetFile, table: OutputTable, about: About, is_compressed: bool) -> None:
    """Write all that stands behind the numbers."""
    schema, dtype = schema_of(table, about), numpy_dtype(table.mean[table.main_layer].dtype)
    borders = [(first, last) for first, last, _, _ in row_groups(about, table.lengths, dtype)]
    for first, last in borders or [(0, 0)]:
        parquet.add_group(without_numbers(schema, table.rows[first:last], about.source, is_compressed))
    parquet.finish()


def numbers_of(
    about: About, lengths: Sequence[int], dtype: np.dtype[Any]
) -> dict[tuple[str, int], list[list[Page]]]:
    """Return the pages of each row group, by kind and layer, in the order in which they stand."""
    groups, vector_bytes = list(row_groups(about, lengths, dtype)), about.width * dtype.itemsize
    single = [pages(None, first, last, vector_bytes) for first, last, _, _ in groups]
    lists = (
        [pages(lengths[first:last], start, stop, vector_bytes) for first, last, start, stop in groups]
        if about.kinds["per_tok"]
        else []
    )
    return {
        (kind, layer): lists if kind == "per_tok" else single
        for kind, layers in about.kinds.items()
        for layer in layers
    }


def schema_of(table: OutputTable, about: About) -> Any:
    """Return the Arrow schema of an output, with its metadata."""
    import pyarrow as pa

    number_type = pa.from_numpy_dtype(numpy_dtype(table.mean[table.main_layer].dtype))
    vector = pa.list_(number_type, about.width)
    return pa.schema(
        [
            *((name, pa.string()) for name in ("id", "header", "source")),
            *((name, pa.int64()) for name in ("index", "length", "embedded")),
            ("outcome", pa.string()),
            *((name, pa.int64()) for name in COUNTS[1:]),
            *(
                (representation_name(kind, layer), pa.list_(vector) if kind == "per_tok" else vector)
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


def row_groups(
    about: About, lengths: Sequence[int], dtype: np.dtype[Any]
) -> Iterator[tuple[int, int, int, int]]:
    """Proteins of each row group as (first, one past the last) and their residues likewise."""
    vector_bytes = about.width * dtype.itemsize
    for_each = vector_bytes * (len(about.kinds["mean"]) + len(about.kinds["bos"]))
    for_residue = vector_bytes * len(about.kinds["per_tok"])
    first = start = stop = num_bytes = 0
    for position, length in enumerate(lengths):
        size = for_each + length * for_residue
        if position > first and (num_bytes + size > GROUP_BYTES or position - first == GROUP_ROWS):
            yield first, position, start, stop
            first, start, num_bytes = position, stop, 0
        stop += length
        num_bytes += size
    if lengths:
        yield first, len(lengths), start, stop


@dataclass(frozen=True)
class PagesInPlace:
    """The pages of a kind and layer, one behind the other, as `Pages` of `base`."""

    pages: list[Page]
    width: int
    itemsize: int

    def _parts(self, number: int) -> tuple[bytes, bytes]:
        page = self.pages[number]
        page_levels, num_values = page.levels(self.width), (page.stop - page.first) * self.width
        num_bytes = len(page_levels) + num_values * self.itemsize
        return page_header(num_bytes, num_bytes, num_values), page_levels

    def header(self, number: int) -> bytes:
        """Return what stands in front of the values of a page."""
        return b"".join(self._parts(number))

    def some(self, first: int, last: int) -> PagesInPlace:
        """Return the pages from number `first` to `last`, as if there were no others."""
        return PagesInPlace(self.pages[first : last + 1], self.width, self.itemsize)

    @cached_property
    def firsts(self) -> NDArray[np.int64]:
        """The first vector of each page, and the number of all."""
        stop = self.pages[-1].stop if self.pages else 0
        return np.array([*(page.first for page in self.pages), stop], np.int64)

    @cached_property
    def header_bytes(self) -> NDArray[np.int64]:
        """Bytes in front of the values of each page, and 0."""
        return np.array([*(len(self.header(number)) for number in range(len(self.pages))), 0], np.int64)

    @cached_property
    def offsets(self) -> NDArray[np.int64]:
        """Where each page begins, and where the last one ends."""
        sizes = self.header_bytes[:-1] + np.diff(self.firsts) * self.width * self.itemsize
        return np.concatenate([[0], np.cumsum(sizes)])


def places(
    table: OutputTable, extent: Extent, dtype: np.dtype[Any], lengths: Sequence[int]
) -> dict[tuple[str, int], Place]:
    """Return where the pages of each kind and layer begin."""
    about, offset = About.of(table), len(MAGIC)
    found: dict[tuple[str, int], Place] = {}
    for key, groups in numbers_of(about, lengths, dtype).items():
        all_pages = PagesInPlace([page for group in groups for page in group], about.width, dtype.itemsize)
        found[key] = Place("", offset, all_pages)
        offset += int(all_pages.offsets[-1])
    return found


def finish_parquet(table: OutputTable, path: Path, crcs: Mapping[tuple[str, int], int]) -> None:
    """Write all but the numbers, which have their places already."""
    about, dtype = About.of(table), numpy_dtype(table.mean[table.main_layer].dtype)
    chunks: dict[str, list[Chunk]] = {}
    position = len(MAGIC)
    for (kind, layer), groups in numbers_of(about, table.lengths, dtype).items():
        for group in groups:
            size = int(PagesInPlace(group, about.width, dtype.itemsize).offsets[-1])
            num_values = (group[-1].stop - group[0].first) * about.width
            chunks.setdefault(representation_name(kind, layer), []).append(
                Chunk(position, size, size, num_values)
            )
            position += size
    rest = io.BytesIO()
    _write_rest(ParquetFile(rest, None, chunks, position), table, about, is_compressed=False)
    write_at(path, 0, MAGIC)
    write_at(path, position, rest.getbuffer())


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
            self._vectors(
                group, representation_name(kind, layer), max(0, start - first), min(stop, end) - first
            )
            for group, (first, end) in enumerate(pairwise(self._starts))
            if first < stop and start < end
        ]
        if not parts:
            return np.empty((0, self.about.width), np.float32)
        return parts[0] if len(parts) == 1 else np.concatenate(parts)

    def vector(self, kind: str, layer: int, position: int) -> NDArray[Any]:
        """Return one representation of one protein, shape (D,)."""
        group, row = self._find(position)
        return np.asarray(self._vectors(group, representation_name(kind, layer), row, row + 1)[0])

    def residues(self, layer: int, position: int) -> NDArray[Any]:
        """Return the residues of one protein, shape (L, D)."""
        group, row = self._find(position)
        name = representation_name("per_tok", layer)
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


def prepare() -> None:
    """Import what writing takes. pyarrow looks for pandas when it is first given a list, which takes longer
    than all else at the end of a file: so it is given one here."""
    import pyarrow as pa

    without_numbers(pa.schema([("id", pa.string())]), [], "", is_compressed=False)


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
    in_place=InPlace(places, finish_parquet, has_lengths=True),
    prepare=prepare,
    output_bytes=output_bytes,
)
