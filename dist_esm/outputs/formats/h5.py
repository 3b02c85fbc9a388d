"""HDF5 as UniProt has it: a flat root with a dataset for each protein. The only door to h5py."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from dist_esm.atomic import SummedFile, write_at
from dist_esm.outputs.embeddings import (
    ChunkedTensor,
    OutputTable,
    little_endian,
    little_endian_blocks,
    numpy_dtype,
)
from dist_esm.outputs.formats.base import (
    About,
    Codec,
    ContentSize,
    InPlace,
    Names,
    Place,
    representation_name,
    safe_name,
)
from dist_esm.outputs.formats.h5_hole import AttributePages, FileWithHole
from dist_esm.types import Extent, Row

if TYPE_CHECKING:
    import h5py

SAMPLE, SAMPLE_BYTES = 32, 1 << 17
"""Proteins that `output_bytes` writes into memory, and about the most bytes of one's matrix of residues."""
RESERVED, BEHIND = b"%reserved", b"%behind"
"""Names of datasets that are there for a while; no protein's is such."""
TOGETHER = "this version of HDF5 does not keep numbers together: install another h5py"
CACHE_BYTES = 1 << 25
"""HDF5's own memory for what it has written: with less it reads back what it changes once more."""
MAX_KEPT = 10_000
"""Datasets that stay open until they get their attributes; each takes 12 kB, and 20 us to open again."""
MAX_NAME = 1 << 10
"""Bytes of the longest name; HDF5 would keep one of 4 KiB among the numbers of datasets."""
SMALL_BYTES = 1 << 12
"""Bytes of the largest attribute that HDF5 keeps among its descriptions, where it keeps all in a heap; a
larger one stands by itself, in one piece, among the numbers of datasets."""
MAX_SMALL, MAX_SMALL_SHARE = 500, 0.01
"""Small attributes with residues, and their share of all, beyond which no residues of further layers get
places: the room of each stays empty, and all attributes of a dataset take 2 kB more in a heap."""

# A `/` would make a group and a lone `.` is the root itself; `~` marks the second of a name, `%` what is
# escaped.
_UNSAFE = re.compile(r"[/%~\x00-\x1f\x7f\ud800-\udfff]|^\.(?=\.?$)")


def dataset_name(protein: str) -> str:
    """An id as the name of a dataset: itself, unless HDF5 would take it for something else.

    A name that is too long is cut, with a hash of the id behind it.
    """
    return safe_name(protein, _UNSAFE, MAX_NAME)


def write_h5(table: OutputTable, path: Path) -> str:
    """Write one dataset for each protein, under its id, in file order.

    Readers of such files (ProtSpace among them) go through the root and expect a dataset and nothing else
    under every name. So there are no groups: the datasets hold one kind of the last requested layer, and what
    else was asked for is with each dataset as attributes.

    - Dataset: per_tok (L, D) if included, else mean (D,) if included, else bos (D,); root attributes ``kind``
      and ``layer`` say which. ProtSpace wants vectors: leave per_tok out.
    - Its attributes: ``original_id``, ``index`` (of the record in its input, from 0), ``length`` (embedded
      residues), and for every other kind and layer an array ``mean_layer_33``, ``bos_layer_33``,
      ``per_tok_layer_33``; the mean of the last requested layer is always there.
    - Root attributes: ``model_name``, the fields of `About` (``provenance`` as JSON), and ``records``, a JSON
      table of ids, headers and lengths, since reading an attribute of each of 100,000 datasets takes a
      minute.

    An id with a ``/`` has it as ``%2F`` (``%``, ``~`` and control characters alike); the second protein of an
    id is ``id~2``; a name of more than 1,024 bytes is cut, with ``~h`` and a hash of the id behind it.
    """
    with Metadata(table, path.parent) as metadata, SummedFile(path) as file:
        for block in metadata.blocks(0, metadata.hole.start):
            file.write(block)
        if table.rows:
            for (kind, layer), place in metadata.places.items():
                for values in place.blocks(0, little_endian_blocks(getattr(table, kind)[layer])):
                    file.write(values.data)
        for block in metadata.blocks(metadata.hole.start, metadata.num_bytes):
            file.write(block)
    return file.checksum()


def root_kind(table: OutputTable) -> str:
    """Return the kind that the datasets hold."""
    return "per_tok" if table.per_tok else "mean" if "mean" in table.include else "bos"


def values_of(table: OutputTable, kind: str, layer: int) -> Iterator[NDArray[Any]]:
    """Give the numbers of each protein, of shape (L, D) or (D,)."""
    rows = getattr(table, kind)[layer]
    if kind == "per_tok":
        return (little_endian(rows[slice(*table.span(place))]) for place in range(len(table.rows)))
    return iter(little_endian(rows))


def size_of_root(table: OutputTable) -> int:
    """Return the bytes of the numbers that all datasets hold."""
    rows = getattr(table, root_kind(table))[table.main_layer]
    return int(math.prod(rows.shape) * numpy_dtype(rows.dtype).itemsize)


class Metadata(FileWithHole):
    """The whole file but for the numbers that have places, which are a hole in it.

    HDF5 writes numbers in an order of its own, and no checksum can be taken on the way. So it is given none.
    The numbers of all datasets follow one another in file order, since they get the room of a dataset as
    large as all of them, which was there first and is deleted. Behind them and from the same room come the
    attributes with residues, of one further layer after the other.

    As a context manager it closes the file.

    Parameters
    ----------
    table
        The output. Numbers that have places need none there, if they are in `written`.
    folder
        Where what is large goes.
    written
        The file, if numbers are in their places already.
    """

    def __init__(self, table: OutputTable, folder: Path, written: Path | None = None) -> None:
        super().__init__(folder)
        self._written = written
        dtype = numpy_dtype(table.mean[table.main_layer].dtype)
        self.places = places(table, Extent(len(table.rows), sum(table.lengths)), dtype, table.lengths)
        self.pages = {
            layer: (place.offset, place.pages)
            for (_, layer), place in self.places.items()
            if isinstance(place.pages, AttributePages)
        }
        with ExitStack() as undo:
            undo.callback(self.close)
            offsets = _write_metadata(table, self)
            num_rows = table.offsets if root_kind(table) == "per_tok" else range(len(table.rows) + 1)
            row_bytes = size_of_root(table) // max(1, num_rows[-1])
            starts = (self.hole.start + before * row_bytes for before in num_rows)
            if any(offset != start for offset, start in zip(offsets, starts, strict=False)):
                raise ValueError(TOGETHER)
            undo.pop_all()

    def values(self, table: OutputTable, kind: str, layer: int) -> Iterator[NDArray[Any] | None]:
        """Give the numbers of each protein, of shape (L, D) or (D,); None if HDF5 needs not know them."""
        if kind != "per_tok" or layer not in self.pages:
            yield from values_of(table, kind, layer)
            return
        first, pages = self.pages[layer]
        begins = first + pages.offsets[:-1] + pages.header_bytes[:-1]
        for number, size in enumerate(pages.sizes.tolist()):
            shape = int(pages.lengths[number]), pages.width
            if size > SMALL_BYTES:
                yield None
            elif self._written:
                found = np.fromfile(self._written, pages.dtype, math.prod(shape), offset=begins[number])
                yield found.reshape(shape)
            else:
                yield little_endian(table.per_tok[layer][slice(*table.span(number))])

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _write_metadata(table: OutputTable, metadata: Metadata) -> list[int]:
    """Write the file, and return the offset of each protein's numbers."""
    import h5py

    about = About.of(table)
    main, root = table.main_layer, root_kind(table)
    attributes = [
        (kind, layer)
        for kind, layers in about.kinds.items()
        for layer in layers
        if (kind, layer) != (root, main)
    ]
    names = Names(dataset_name)
    text_dtype = h5py.string_dtype()
    text = h5py.h5t.py_create(text_dtype, logical=True)
    scalar = h5py.h5s.create(h5py.h5s.SCALAR)
    number_type = h5py.h5t.py_create(numpy_dtype(getattr(table, root)[main].dtype))
    unfilled = _unfilled(in_heap=bool(metadata.pages))
    offsets: list[int] = []
    kept: list[Any] = []
    unused: list[Any] = []

    @lru_cache(maxsize=64)
    def kind_of(dtype: np.dtype[Any], shape: tuple[int, ...]) -> tuple[Any, Any, Any]:
        in_memory = h5py.h5t.py_create(dtype)
        hdf5_type = text if dtype.kind == "O" else in_memory
        return hdf5_type, h5py.h5s.create_simple(shape) if shape else scalar, in_memory

    # h5py's high-level calls take twice as long, and a dataset and three attributes for each protein add up.
    # So does the type in memory, which it works out again for each value unless it is told.
    def attach(owner: Any, name: bytes, value: NDArray[Any]) -> None:
        hdf5_type, space, in_memory = kind_of(value.dtype, value.shape)
        h5py.h5a.create(owner, name, hdf5_type, space).write(value, in_memory)

    def dataset_of(place: int) -> Any:
        return kept[place] if place < len(kept) else h5py.h5d.open(file.id, taken[place])

    num_bytes = size_of_root(table) + sum(int(pages.offsets[-1]) for _, pages in metadata.pages.values())
    with _create(metadata, num_bytes) as file:
        # All datasets come first: texts and large attributes would take room among their numbers.
        taken = [names.take(row.id).encode() for row in table.rows]
        for name, row in zip(taken, table.rows, strict=True):
            shape = (row.embedded, about.width) if root == "per_tok" else (about.width,)
            space = h5py.h5s.create_simple(shape)
            dataset = h5py.h5d.create(file.id, name, number_type, space, unfilled)
            offsets.append(dataset.get_offset())
            if len(kept) < MAX_KEPT:
                kept.append(dataset)
        # A small attribute has its room for nothing, since HDF5 wants to have it elsewhere.
        for layer, (first, pages) in metadata.pages.items():
            name = representation_name("per_tok", layer).encode()
            for place, (offset, size) in enumerate(zip(pages.offsets, pages.sizes.tolist(), strict=False)):
                if size > SMALL_BYTES:
                    space = h5py.h5s.create_simple((table.rows[place].embedded, about.width))
                    h5py.h5a.create(dataset_of(place), name, number_type, space)
                    found = metadata.last_page
                else:
                    space = h5py.h5s.create_simple((size,))
                    unused.append(h5py.h5d.create(file.id, None, h5py.h5t.STD_U8LE, space, unfilled))
                    found = unused[-1].get_offset()
                if found != first + offset:
                    raise ValueError(TOGETHER)
        records = {
            "ids": table.ids,
            "headers": [row.header for row in table.rows],
            "lengths": table.lengths,
        }
        root_attributes = {**about.to_text(), "kind": root, "records": json.dumps(records)}
        for key, text_of in root_attributes.items():
            attach(file.id, key.encode(), np.array(text_of, dtype=text_dtype))
        attach(file.id, b"layer", np.array(main))
        values = [
            (representation_name(kind, layer).encode(), metadata.values(table, kind, layer))
            for kind, layer in attributes
        ]
        for place, row in enumerate(table.rows):
            dataset = dataset_of(place)
            attach(dataset, b"original_id", np.array(row.id, dtype=text_dtype))
            attach(dataset, b"index", np.array(row.number))
            attach(dataset, b"length", np.array(row.embedded))
            for attribute, numbers in values:
                value = next(numbers)
                if value is not None:
                    attach(dataset, attribute, value)
        unused.clear()
    return offsets


def _unfilled(in_heap: bool = False) -> Any:
    """Return how datasets are made whose numbers have their place at once and are not written by HDF5, and
    whose attributes are all in a heap, if this is wanted: a large one stands by itself then."""
    import h5py

    unfilled = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    unfilled.set_obj_track_times(False)
    unfilled.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    unfilled.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    if in_heap:
        unfilled.set_attr_phase_change(0, 0)
    return unfilled


@contextmanager
def _create(metadata: FileWithHole, num_bytes: int) -> Iterator[h5py.File]:
    """Make a new file whose root keeps the order of its names and takes attributes of any size.

    The next `num_bytes` of numbers go into one hole. There is no time stamp in the file, so that its bytes
    depend on its content alone.
    """
    import h5py

    root = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    root.set_link_creation_order(h5py.h5p.CRT_ORDER_TRACKED | h5py.h5p.CRT_ORDER_INDEXED)
    root.set_obj_track_times(False)
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    # HDF5 1.8 (2008) and later can read it; before, attributes ended at 64 KiB.
    access.set_libver_bounds(h5py.h5f.LIBVER_V18, h5py.h5f.LIBVER_LATEST)
    cache = access.get_mdc_config()
    cache.set_initial_size = True
    cache.initial_size = cache.max_size = CACHE_BYTES
    access.set_mdc_config(cache)
    access.set_fileobj_driver(h5py.h5fd.fileobj_driver, metadata)
    with h5py.File(h5py.h5f.create(b"output", h5py.h5f.ACC_TRUNC, root, access)) as file:
        if num_bytes:
            # With something behind it, it is not given back as the end of the file, nor taken for metadata.
            reserved, behind = (
                h5py.h5d.create(
                    file.id, name, h5py.h5t.STD_U8LE, h5py.h5s.create_simple((size,)), _unfilled()
                )
                for name, size in ((RESERVED, num_bytes), (BEHIND, 1))
            )
            start = reserved.get_offset()
            metadata.hole = range(start, start + num_bytes)
            del reserved, behind
            file.id.unlink(RESERVED)
        yield file
        if num_bytes:
            file.id.unlink(BEHIND)


@cache
def _first_offset() -> int:
    """Return where numbers begin in a file that has any: it does not depend on what else is in it."""
    metadata = FileWithHole(Path(gettempdir()))
    with closing(metadata), _create(metadata, 1):
        return metadata.hole.start


def places(
    table: OutputTable, extent: Extent, dtype: np.dtype[Any], lengths: Sequence[int]
) -> dict[tuple[str, int], Place]:
    """Return where the numbers of the datasets begin, and the residues of further layers; vectors that are
    attributes have no place."""
    root, width = root_kind(table), About.of(table).width
    offset = _first_offset() if extent.proteins else 0
    found = {(root, table.main_layer): Place("", offset)}
    offset += (extent.residues if root == "per_tok" else extent.proteins) * width * dtype.itemsize
    further = [
        AttributePages(layer, np.asarray(lengths, np.int64), width, dtype)
        for layer in table.per_tok
        if layer != table.main_layer
    ]
    num_small = sum(np.count_nonzero(pages.sizes <= SMALL_BYTES) for pages in further)
    if num_small <= min(MAX_SMALL, MAX_SMALL_SHARE * len(lengths) * len(further)):
        for pages in further:
            found["per_tok", pages.layer] = Place("", offset, pages)
            offset += int(pages.offsets[-1])
    return found


def finish_h5(table: OutputTable, path: Path, crcs: Mapping[tuple[str, int], int]) -> None:
    """Write all but the numbers that have their places already."""
    with Metadata(table, path.parent, path) as metadata:
        offset = 0
        for block in metadata.blocks(0, metadata.hole.start):
            write_at(path, offset, block)
            offset += len(block)
        offset = metadata.hole.stop
        for block in metadata.blocks(metadata.hole.start, metadata.num_bytes):
            write_at(path, offset, block)
            offset += len(block)


class OpenedH5:
    """An output opened for reading. Each protein is read when it is asked for."""

    def __init__(self, path: Path) -> None:
        import h5py

        self._file = h5py.File(path, "r")
        self.about = About.from_text(self._file.attrs)
        self._root = (self._file.attrs["kind"], self._file.attrs["layer"])

    @cached_property
    def _names(self) -> list[bytes]:
        """In file order; h5py before 3.12 has them in alphabetical order, whatever the file says."""
        import h5py

        names: list[bytes] = []
        self._file.id.links.iterate(names.append, idx_type=h5py.h5.INDEX_CRT_ORDER)
        return names

    @property
    def num_proteins(self) -> int:
        """N."""
        return len(self._file)

    @cached_property
    def _records(self) -> dict[str, list[Any]]:
        table: dict[str, list[Any]] = json.loads(self._file.attrs["records"])
        return table

    def ids(self) -> list[str]:
        """Read the ids of all proteins."""
        return self._records["ids"]

    def headers(self) -> list[str]:
        """Read the headers of all proteins."""
        return self._records["headers"]

    def lengths(self) -> list[int]:
        """Read the embedded residues of all proteins."""
        return self._records["lengths"]

    def vectors(self, kind: str, layer: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Read one representation of proteins, shape (n, D)."""
        positions = range(self.num_proteins)[start:stop]
        rows = [self.vector(kind, layer, position) for position in positions]
        return np.stack(rows) if rows else np.empty((0, self.about.width), np.float32)

    def vector(self, kind: str, layer: int, position: int) -> NDArray[Any]:
        """Return one representation of one protein, shape (D,)."""
        dataset = self._file[self._names[position]]
        return np.asarray(
            dataset[()] if (kind, layer) == self._root else dataset.attrs[representation_name(kind, layer)]
        )

    def residues(self, layer: int, position: int) -> NDArray[Any]:
        """Return the residues of one protein, shape (L, D)."""
        return self.vector("per_tok", layer, position)


def output_bytes(size: ContentSize) -> int:
    """Return about how many bytes an output will have.

    HDF5 lays out attributes by rules of its own, which cost 400 to 17,000 bytes a protein. So a few proteins
    of the mean length are written into memory, and what they take beside their numbers is taken for all.
    """
    few = sample_of(size)
    empty, sample = bytes_in_memory(table_like(few, 0)), bytes_in_memory(table_like(few, few.proteins))
    of_protein = (sample - empty - few.number_bytes) / max(1, few.proteins)
    return size.number_bytes + empty + round(of_protein * size.proteins)


def sample_of(size: ContentSize) -> ContentSize:
    """Return the size of a few proteins of the mean length and the mean text.

    Attributes of residues are kept small; but HDF5 stores those of more than 64 KiB in another way, and these
    stay above it.
    """
    few = min(SAMPLE, size.proteins)
    share = few / max(1, size.proteins)
    longest = -(-SAMPLE_BYTES // (size.width * size.itemsize))
    residues = few * max(1, min(longest, round(size.residues / max(1, size.proteins))))
    return replace(
        size,
        proteins=few,
        residues=residues,
        id_bytes=round(size.id_bytes * share),
        header_bytes=round(size.header_bytes * share),
    )


def table_like(size: ContentSize, num_proteins: int) -> OutputTable:
    """Return a table of so many of the proteins of a size, with zeros for their numbers.

    All are alike, but that the second has most of the first's residues, too: whether proteins of an
    eighth of the mean length are small is taken for whether there are many small ones.
    """
    all_of_them = max(1, size.proteins)
    length = size.residues // all_of_them
    lengths = [length] * num_proteins
    if num_proteins > 1:
        lengths[0] = max(1, length // 8)
        lengths[1] += length - lengths[0]
    header = "x" * (size.header_bytes // all_of_them)
    id_length = max(4, size.id_bytes // all_of_them)
    rows = [
        Row(f"{place:0{id_length}d}", header, place, length, length, "ok", 0, 0, 0, 0)
        for place, length in enumerate(lengths)
    ]
    dtype = torch.float32 if size.itemsize == 4 else torch.float16
    zeros = torch.zeros(num_proteins * max(1, length), size.width, dtype=dtype)
    vectors = {kind: dict.fromkeys(size.kinds[kind], zeros[:num_proteins]) for kind in ("mean", "bos")}
    per_tok = dict.fromkeys(size.kinds["per_tok"], ChunkedTensor([zeros[: num_proteins * length]]))
    main_layer = size.kinds["mean"][-1]
    return OutputTable("", {}, size.include, main_layer, rows, vectors["mean"], vectors["bos"], per_tok, [])


def bytes_in_memory(table: OutputTable) -> int:
    """Return the bytes of an output, all of which but its numbers is written into memory and forgotten."""
    with Metadata(table, Path(gettempdir())) as metadata:
        return metadata.num_bytes + len(metadata.hole)


CODEC = Codec(
    write_h5, OpenedH5, in_place=InPlace(places, finish_h5, has_lengths=True), output_bytes=output_bytes
)
