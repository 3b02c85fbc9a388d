"""Columns of numbers in Parquet, whose pages are laid out here, beside columns that pyarrow writes.

Parquet keeps two small numbers beside each value of a list: how deep in the list it begins, and how much of
it is there. Arrow works them out one value at a time, 80 million a second, which is 0.16 GB of float16. Here
all lists of a column have D numbers, so the two follow a pattern that is known without looking at any value,
and the values are written as they lie in memory.

pyarrow still writes the rest: each row group is written by it once with nothing in the columns of numbers,
and its bytes and its part of the footer are taken over, with offsets moved and the columns of numbers in
their places. The footer is Thrift's compact protocol.

The numbers of all row groups come first, so that their places depend on the lengths of proteins alone.
"""

from __future__ import annotations

import io
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import IO, Any

from numpy.typing import NDArray

MAGIC = b"PAR1"
PAGE_BYTES = 1 << 20
"""Numbers of a page, about; it holds whole proteins, unless one is larger than `MAX_PAGE_BYTES`."""
MAX_PAGE_BYTES = 1 << 30
"""A page ends below 2 GiB."""

BOOL_TRUE, BOOL_FALSE, BYTE, I16, I32, I64, DOUBLE, BINARY, LIST, SET, MAP, STRUCT = range(1, 13)
"""Types of Thrift's compact protocol."""
DATA_PAGE, PLAIN, RLE = 0, 0, 3
"""Parquet's numbers for the page and the encodings that are used here."""


@dataclass
class Struct:
    """A struct of Thrift: field number to its type and value."""

    fields: dict[int, tuple[int, Any]]

    def __getitem__(self, field: int) -> Any:
        return self.fields[field][1]

    def __setitem__(self, field: int, value: Any) -> None:
        self.fields[field] = (self.fields[field][0], value)


@dataclass(frozen=True)
class Raw:
    """The bytes of a value that is taken over as it is."""

    data: bytes


def read_varint(file: IO[bytes]) -> int:
    """Read a whole number from 0, seven bits a byte."""
    number = shift = 0
    while (byte := file.read(1)[0]) & 0x80:
        number |= (byte & 0x7F) << shift
        shift += 7
    return number | byte << shift


def varint(number: int) -> bytes:
    """Return the bytes of `read_varint`."""
    digits = bytearray()
    while number >= 0x80:
        digits.append(number & 0x7F | 0x80)
        number >>= 7
    digits.append(number)
    return bytes(digits)


def read_value(file: IO[bytes], kind: int) -> Any:
    """Read a value of a type of Thrift; of a list its type of items and its items."""
    if kind in (BOOL_TRUE, BOOL_FALSE):
        return kind == BOOL_TRUE
    if kind in (I16, I32, I64):
        number = read_varint(file)
        return number >> 1 ^ -(number & 1)
    if kind == BINARY:
        return file.read(read_varint(file))
    if kind in (LIST, SET):
        head = file.read(1)[0]
        count = read_varint(file) if head >> 4 == 15 else head >> 4
        items = head & 15
        if items in (BOOL_TRUE, BOOL_FALSE):
            return items, [file.read(1) for _ in range(count)]
        return items, [read_value(file, items) for _ in range(count)]
    if kind == STRUCT:
        return Struct({field: (inner, read_value(file, inner)) for field, inner in field_heads(file)})
    return file.read({BYTE: 1, DOUBLE: 8}[kind])


def field_heads(file: IO[bytes]) -> Iterator[tuple[int, int]]:
    """Give number and type of each field of a struct; the caller reads its value before the next."""
    field = 0
    while head := file.read(1)[0]:
        field = field + (head >> 4) if head >> 4 else read_value(file, I16)
        yield field, head & 15


def value_bytes(kind: int, value: Any) -> bytes:
    """Return the bytes of `read_value`."""
    if isinstance(value, Raw):
        return value.data
    if kind in (BOOL_TRUE, BOOL_FALSE):
        return b""
    if kind in (I16, I32, I64):
        return varint(value << 1 if value >= 0 else (-value << 1) - 1)
    if kind == BINARY:
        return varint(len(value)) + bytes(value)
    if kind in (LIST, SET):
        items, values = value
        head = bytes([len(values) << 4 | items]) if len(values) < 15 else bytes([0xF0 | items])
        size = b"" if len(values) < 15 else varint(len(values))
        return head + size + b"".join(item_bytes(items, item) for item in values)
    if kind == STRUCT:
        parts, last = [], 0
        for field, (field_kind, field_value) in sorted(value.fields.items()):
            delta = field - last
            is_near = 0 < delta < 16
            parts.append(bytes([(delta << 4 if is_near else 0) | field_kind]))
            parts.append(b"" if is_near else value_bytes(I16, field))
            parts.append(value_bytes(field_kind, field_value))
            last = field
        return b"".join([*parts, b"\0"])
    return bytes(value)


def item_bytes(kind: int, item: Any) -> bytes:
    """Return the bytes of an item of a list; a truth value is a byte there."""
    return bytes(item) if kind in (BOOL_TRUE, BOOL_FALSE) else value_bytes(kind, item)


@dataclass(frozen=True)
class Page:
    """Whole vectors of one column that are stored together."""

    first: int
    """First vector, counted over all row groups."""
    stop: int
    vectors_of_rows: tuple[int, ...]
    """Vectors of each row that begins in the page; less than 0: so many go on with a row of the page
    before."""
    is_list: bool
    """Each row is a list of vectors, otherwise one vector."""

    def levels(self, width: int) -> bytes:
        """Return what stands in front of the values."""
        return levels(self.vectors_of_rows, width, self.is_list)


@dataclass(frozen=True)
class Chunk:
    """The numbers of one column in one row group, in the file."""

    begun: int
    """Offset of its first page."""
    num_bytes: int
    """Of its pages with their headers, before compression."""
    stored_bytes: int
    num_values: int


class ParquetFile:
    """A Parquet file in the making: first the numbers of all row groups, column by column, then all else.

    Parameters
    ----------
    file
        Open for writing, at its beginning.
    compress
        Compresses the content of a page as the schema of the row groups says; None: it stays as it is.
    chunks
        The numbers of each column, row group by row group, if they are in the file already.
    position
        Bytes in front of what comes next.
    """

    def __init__(
        self,
        file: IO[bytes],
        compress: Any = None,
        chunks: Mapping[str, Sequence[Chunk]] | None = None,
        position: int = 0,
    ) -> None:
        self._file = file
        self._compress = compress
        self._position = position
        self._footer: Struct | None = None
        """The first that was added: schema and metadata are the same in all."""
        self._groups: list[Struct] = []
        self._chunks: dict[str, list[Chunk]] = {name: list(known) for name, known in (chunks or {}).items()}
        if not position:
            self._write(MAGIC)

    def add_numbers(self, name: str, content: Iterable[tuple[Page, NDArray[Any]]], width: int) -> None:
        """Add the pages of a column in the next row group, with their values, of shape (vectors, D)."""
        begun, num_bytes, num_values = self._position, 0, 0
        for page, values in content:
            num_bytes += self._write_page(page.levels(width), values)
            num_values += values.size
        chunk = Chunk(begun, num_bytes, self._position - begun, num_values)
        self._chunks.setdefault(name, []).append(chunk)

    def add_group(self, written: bytes) -> None:
        """Add all but the numbers of the next row group.

        Parameters
        ----------
        written
            A whole Parquet file by pyarrow of this one row group, in which the columns of numbers have only
            nulls; without a row it adds the schema and the metadata alone.
        """
        footer, number = footer_of(written), len(self._groups)
        self._footer = self._footer or footer
        _, groups = footer[4]
        if not groups:
            return
        (group,) = groups
        group.fields[5] = (I64, self._position)
        group.fields[7] = (I16, number)
        for chunk in group[1][1]:
            known = self._chunks.get(chunk[3][3][1][0].decode())
            if known is None:
                self._copy_chunk(chunk, written)
            else:
                describe_numbers(chunk, known[number])
        chunks = [chunk[3] for chunk in group[1][1]]
        group[2] = sum(chunk[6] for chunk in chunks)
        group.fields[6] = (I64, sum(chunk[7] for chunk in chunks))
        self._groups.append(group)

    def finish(self) -> None:
        """Write the footer, of schema and metadata as the first row group has them."""
        footer = self._footer
        assert footer is not None, "a file has one row group, if need be without a row"
        footer[3] = sum(group[3] for group in self._groups)
        footer[4] = (STRUCT, self._groups)
        text = value_bytes(STRUCT, footer)
        self._write(text)
        self._write(len(text).to_bytes(4, "little") + MAGIC)

    def _write(self, data: Any) -> None:
        self._position += memoryview(data).nbytes
        self._file.write(data)

    def _copy_chunk(self, chunk: Struct, written: bytes) -> None:
        about = chunk[3]
        first = min(about[field] for field in (9, 11) if field in about.fields)  # a dictionary comes first
        moved = self._position - first
        for field in (9, 11):
            if field in about.fields:
                about[field] += moved
        if chunk[2]:
            chunk[2] += moved
        self._write(memoryview(written)[first : first + about[7]])

    def _write_page(self, page_levels: bytes, values: NDArray[Any]) -> int:
        """Write a page; return its bytes before compression, with its header."""
        num_bytes = len(page_levels) + values.nbytes
        content: list[Any] = [page_levels, values.data]
        if self._compress is not None:
            content = [self._compress(b"".join(content))]
        header = page_header(num_bytes, sum(memoryview(part).nbytes for part in content), values.size)
        for part in (header, *content):
            self._write(part)
        return len(header) + num_bytes


def describe_numbers(column: Struct, chunk: Chunk) -> None:
    """Put what a chunk is into the footer's part for it."""
    about = column[3]
    about.fields = {
        1: about.fields[1],
        2: (LIST, (I32, [PLAIN, RLE])),
        3: about.fields[3],
        4: about.fields[4],
        5: (I64, chunk.num_values),
        6: (I64, chunk.num_bytes),
        7: (I64, chunk.stored_bytes),
        9: (I64, chunk.begun),
    }
    column[2] = 0


def footer_of(written: bytes) -> Struct:
    """Read the footer of a whole Parquet file: rows, field 3, and row groups, field 4; all else stays raw."""
    size = int.from_bytes(written[-8:-4], "little")
    file = io.BytesIO(written[-8 - size : -8])
    footer = Struct({})
    for field, kind in field_heads(file):
        begun = file.tell()
        value = read_value(file, kind)
        footer.fields[field] = (kind, value if field in (3, 4) else Raw(file.getvalue()[begun : file.tell()]))
    return footer


def page_header(num_bytes: int, compressed_bytes: int, num_values: int) -> bytes:
    """Return the header of a page of plain values with run-length levels."""
    data_page = {1: (I32, num_values), 2: (I32, PLAIN), 3: (I32, RLE), 4: (I32, RLE)}
    fields = {
        1: (I32, DATA_PAGE),
        2: (I32, num_bytes),
        3: (I32, compressed_bytes),
        5: (STRUCT, Struct(data_page)),
    }
    return value_bytes(STRUCT, Struct(fields))


def pages(vectors_of_rows: Sequence[int] | None, first: int, stop: int, vector_bytes: int) -> list[Page]:
    """Cut the vectors of a column in one row group into pages.

    Parameters
    ----------
    vectors_of_rows
        Vectors of each row, for a list of vectors, 1 at least; None: each row is one vector.
    first, stop
        The vectors of the row group, counted over all.
    vector_bytes
        Bytes of a vector.
    """
    full, most = max(1, PAGE_BYTES // vector_bytes), max(1, MAX_PAGE_BYTES // vector_bytes)
    if vectors_of_rows is None:
        borders = [*range(first, stop, full), stop]
        return [Page(begin, end, (1,) * (end - begin), False) for begin, end in pairwise(borders)]
    cut: list[Page] = []
    begin = end = first
    rows: list[int] = []

    def end_page() -> None:
        nonlocal begin
        if rows:
            cut.append(Page(begin, end, tuple(rows), True))
            begin = end
            rows.clear()

    for num_vectors in vectors_of_rows:
        is_first = True
        while num_vectors:
            taken = min(num_vectors, most)
            if taken == most:
                end_page()
            rows.append(taken if is_first else -taken)
            end += taken
            num_vectors -= taken
            is_first = False
            if end - begin >= full:
                end_page()
    end_page()
    return cut


def levels(vectors_of_rows: Sequence[int], width: int, is_list: bool) -> bytes:
    """Return the levels of a page, both run-length encoded, each behind its length.

    Parameters
    ----------
    vectors_of_rows
        Vectors of each row that begins in the page; less than 0: so many go on with a row of the page before.
    width
        Numbers of a vector.
    is_list
        Each row is a list of vectors, otherwise one vector.
    """
    deepest = 2 if is_list else 1
    rest = run(deepest, width - 1)
    new_row, new_vector = run(0, 1) + rest, run(1, 1) + rest
    repetition = b"".join(
        new_row + new_vector * (count - 1) if count > 0 else new_vector * -count for count in vectors_of_rows
    )
    definition = run(2 * deepest + 1, width * sum(map(abs, vectors_of_rows)))
    return b"".join(len(encoded).to_bytes(4, "little") + encoded for encoded in (repetition, definition))


def run(level: int, count: int) -> bytes:
    """Return a run of one level, which is less than 256."""
    return varint(count << 1) + bytes([level]) if count else b""
