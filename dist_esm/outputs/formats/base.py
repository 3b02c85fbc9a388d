"""The parts that formats share: the description in every output, how it is read back, and safe names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from dist_esm.atomic import SummedFolder
from dist_esm.names import cut
from dist_esm.outputs.embeddings import OutputTable
from dist_esm.types import Extent, Row, WrittenFile


@dataclass(frozen=True)
class About:
    """The description that every output carries, whatever its format."""

    source: str
    """Path of the input file, relative to the common root of the inputs."""
    main_layer: int
    """The layer whose mean is always there."""
    width: int
    """D."""
    kinds: dict[str, list[int]]
    """mean, bos and per_tok to the layers that are there."""
    provenance: dict[str, Any]
    """Model, weights and settings that the numbers depend on."""

    @classmethod
    def of(cls, table: OutputTable) -> About:
        """Describe the output of a table."""
        kinds = {
            "mean": list(table.mean),
            "bos": list(table.bos),
            "per_tok": list(table.per_tok),
        }
        # A path may have bytes that are not UTF-8; Arrow and HDF5 take only text that is.
        source = table.source.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        return cls(
            source,
            table.main_layer,
            table.mean[table.main_layer].shape[1],
            kinds,
            table.provenance,
        )

    def to_text(self) -> dict[str, str]:
        """For formats whose metadata is text: `model_name` and the fields, as JSON where they are not text
        already."""
        fields = {
            name: value if isinstance(value, str) else json.dumps(value) for name, value in vars(self).items()
        }
        return {"model_name": str(self.provenance.get("model", "")), **fields}

    @classmethod
    def from_text(cls, metadata: Mapping[str, str]) -> About:
        """The inverse of `to_text`."""
        others = {name: json.loads(metadata[name]) for name in ("main_layer", "width", "kinds", "provenance")}
        return cls(source=metadata["source"], **others)


class Opened(Protocol):
    """One output, opened for reading; positions count from 0 in file order. Numbers come in the dtype that
    they are saved in."""

    about: About

    @property
    def num_proteins(self) -> int:
        """N. Formats that can tell it without reading ids do so."""
        ...

    def ids(self) -> list[str]:
        """Read the ids of all proteins."""
        ...

    def headers(self) -> list[str]:
        """Read the headers of all proteins."""
        ...

    def lengths(self) -> list[int]:
        """Read the embedded residues of all proteins."""
        ...

    def vectors(self, kind: str, layer: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return a representation, `mean` or `bos`, of the proteins from `start` up to `stop`, shape (n, D);
        None: up to the last. What can be mapped is not read."""
        ...

    def vector(self, kind: str, layer: int, position: int) -> NDArray[Any]:
        """Return a representation of one protein, shape (D,)."""
        ...

    def residues(self, layer: int, position: int) -> NDArray[Any]:
        """Return the residues of one protein, shape (L, D)."""
        ...


class Pages(Protocol):
    """How rows are kept in pages, each behind a header."""

    @property
    def firsts(self) -> NDArray[np.int64]:
        """The first row of each page, and the number of all."""
        ...

    @property
    def header_bytes(self) -> NDArray[np.int64]:
        """Bytes in front of the rows of each page, and 0."""
        ...

    @property
    def offsets(self) -> NDArray[np.int64]:
        """Where each page begins, and where the last one ends."""
        ...

    def header(self, number: int) -> bytes:
        """Return what stands in front of the rows of a page."""
        ...

    def some(self, first: int, last: int) -> Pages:
        """Return the pages from number `first` to `last`, as if there were no others."""
        ...


class Place(NamedTuple):
    """Where the numbers of a kind and layer stand in an output, as rows in order."""

    file: str
    """Name of the file within the output; "" if the output is a file itself."""
    offset: int
    """Bytes in front of them."""
    pages: Pages | None = None
    """None: rows follow one another."""

    def begin(self, row: int, row_bytes: int) -> int:
        """Return where a row begins, with the header of its page if it is the first there; or where all of
        them end."""
        if self.pages is None:
            return self.offset + row * row_bytes
        number = int(np.searchsorted(self.pages.firsts, row, "right")) - 1
        behind = row - int(self.pages.firsts[number])
        header = int(self.pages.header_bytes[number]) if behind else 0
        return self.offset + int(self.pages.offsets[number]) + header + behind * row_bytes

    def around(self, first: int, num_rows: int) -> Place:
        """Return what of it is needed for rows of these alone: the same place, without other pages."""
        if self.pages is None or len(self.pages.firsts) < 2:
            return self
        numbers = np.searchsorted(self.pages.firsts, [first, first + max(0, num_rows - 1)], "right") - 1
        start, last = np.minimum(numbers, len(self.pages.firsts) - 2).tolist()
        offset = self.offset + int(self.pages.offsets[start])
        return Place(self.file, offset, self.pages.some(start, last))

    def pieces(self, first: int, num_rows: int) -> list[tuple[int, int]]:
        """Return what these rows and the headers between them are, piece by piece: bytes of a header, and the
        number of rows behind it."""
        if self.pages is None:
            return [(0, num_rows)]
        found, row, stop = [], first, first + num_rows
        while row < stop:
            number = int(np.searchsorted(self.pages.firsts, row, "right")) - 1
            header = int(self.pages.header_bytes[number]) if row == self.pages.firsts[number] else 0
            taken = min(stop, int(self.pages.firsts[number + 1])) - row
            found.append((header, taken))
            row += taken
        return found

    def blocks(self, first: int, rows: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
        """Give what is to be written from where row `first` begins: these rows and the headers between
        them."""
        if self.pages is None:
            yield from rows
            return
        row = first
        for block in rows:
            while len(block):
                number = int(np.searchsorted(self.pages.firsts, row, "right")) - 1
                if row == self.pages.firsts[number]:
                    yield np.frombuffer(self.pages.header(number), np.uint8)
                taken = min(len(block), int(self.pages.firsts[number + 1]) - row)
                yield block[:taken]
                block, row = block[taken:], row + taken


class InPlace(NamedTuple):
    """How a format is laid out whose numbers may be written to their places before its text is."""

    places: Callable[[OutputTable, Extent, np.dtype[Any], Sequence[int]], dict[tuple[str, int], Place]]
    """Kind and layer to the place of its numbers, in an output of this extent that is otherwise like the
    table, given the embedded residues of each protein if it `has_lengths`. Kinds and layers that are not
    named have no place, and are written at the end."""
    finish: Callable[[OutputTable, Path, Mapping[tuple[str, int], int]], None]
    """Writes all but what has a place to exactly this path, a file or folder. Numbers that have places are
    tensors without storage in the table; the last argument has their CRC-32 by kind and layer."""
    text_size: Callable[[Sequence[Row]], int] = lambda rows: 0
    """What these rows add to `Extent.text`."""
    has_crc: bool = False
    """`finish` looks at the CRC-32 of numbers."""
    has_lengths: bool = False
    """Places depend on the length of each protein, and rows do not follow one another."""


class Loose(NamedTuple):
    """How a format is laid out whose outputs are folders with a file for each protein."""

    names: Callable[[Sequence[Row]], list[str]]
    """Name of the file of each of these proteins, the first of which is the first in its output."""
    write_protein: Callable[[OutputTable, int, Path, bool], WrittenFile]
    """Writes the file of one protein, given its place in the table, to exactly this path; its name and place
    are not in it. Several threads may call it, unless the last argument says that it is alone, as of
    `SummedFile`."""
    write_tables: Callable[[OutputTable, Sequence[str], SummedFolder], None]
    """Writes all that stands beside these files, given their names. The table needs no numbers."""
    read_protein: Callable[[Path], dict[tuple[str, int], Tensor]]
    """Reads a protein's file: kind and layer to its numbers, of shape (L, D) or (D,)."""


@dataclass(frozen=True)
class ContentSize:
    """How much one output holds, as far as its bytes depend on it."""

    proteins: int
    residues: int
    """Of all proteins, as they are embedded."""
    id_bytes: int
    header_bytes: int
    include: list[str]
    """Kinds that were asked for."""
    kinds: dict[str, list[int]]
    """mean, bos and per_tok to the layers that are there, as in `About`."""
    width: int
    """D."""
    itemsize: int
    """Bytes of a number."""

    @property
    def num_matrices(self) -> int:
        """Kinds and layers."""
        return sum(map(len, self.kinds.values()))

    @property
    def number_bytes(self) -> int:
        """Bytes of all numbers."""
        vectors = self.proteins * (self.num_matrices - len(self.kinds["per_tok"]))
        return self.width * self.itemsize * (vectors + self.residues * len(self.kinds["per_tok"]))

    @property
    def text_bytes(self) -> int:
        """Bytes of ids and headers."""
        return self.id_bytes + self.header_bytes


def plain_bytes(size: ContentSize) -> int:
    """Return the bytes of the numbers and the text of an output, which any format has."""
    return size.number_bytes + size.text_bytes


class Codec(NamedTuple):
    """How a format is written and read back: the `CODEC` of its module."""

    write: Callable[[OutputTable, Path], str | None]
    """Writes an output to exactly this path, a new file or folder; returns its checksum if that was taken on
    the way."""
    open: Callable[[Path], Opened]
    """Opens an output for reading; raises whatever its library raises if it is damaged."""
    marks: tuple[str, ...] = ()
    """For a format whose output is a folder: names of the files that every such folder has."""
    write_compressed: Callable[[OutputTable, Path], str | None] | None = None
    """As `write`, with numbers compressed by zstd, for a format that can."""
    in_place: InPlace | None = None
    """For a format whose numbers have places that do not depend on its text."""
    loose: Loose | None = None
    """For a format with a file for each protein."""
    prepare: Callable[[], None] = lambda: None
    """Imports what writing takes, if that may take a second: it is called beside the loading of the model, so
    that no device waits for it."""
    output_bytes: Callable[[ContentSize], int] = plain_bytes
    """Returns about how many bytes an output will have; within a few percent of what `write` writes."""
    output_files: Callable[[ContentSize], int] = lambda size: 1
    """Returns how many files and folders an output is."""


def representation_name(kind: str, layer: int) -> str:
    """Return what a kind and layer is called where users see it."""
    return f"{kind}_layer_{layer}"


def safe_name(text: str, unsafe: re.Pattern[str], max_bytes: int) -> str:
    """Return a text as a name: escaped, never empty, and if it is too long cut, with a hash of the text
    behind it; `unsafe` as of `escape`."""
    name = escape(text, unsafe) or "%"
    if len(name.encode()) <= max_bytes:
        return name
    beginning, mark = cut(name, text, max_bytes)
    return re.sub("%.?$", "", beginning) + mark  # no half of an escaped byte


def escape(text: str, unsafe: re.Pattern[str]) -> str:
    """Write every unsafe character as ``%XX`` for each byte of its UTF-8; `unsafe` must match a ``%`` that
    would read as such."""
    return unsafe.sub(
        lambda match: "".join(f"%{byte:02X}" for byte in match[0].encode("utf-8", "surrogatepass")), text
    )


class Names:
    """Names for ids that come one after another: escaped, and different from all before.

    The second protein whose name would be the same gets ``~2`` behind it, the third ``~3``. No escaped name
    ends in such a mark of its own, so what stands before it is always the escaped id.

    Parameters
    ----------
    escaped
        An id to its name; different ids may have the same.
    same
        A name to what must differ between names.
    """

    def __init__(self, escaped: Callable[[str], str], same: Callable[[str], str] = str) -> None:
        self._escaped = escaped
        self._same = same
        self._seen: dict[str, int] = {}

    def take(self, protein: str) -> str:
        """The name for the next protein, given its id."""
        name = self._escaped(protein)
        key = self._same(name)
        self._seen[key] = count = self._seen.get(key, 0) + 1
        return name if count == 1 else f"{name}~{count}"
