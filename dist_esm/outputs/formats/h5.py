"""HDF5 as UniProt has it: a flat root with a dataset for each protein. The only door to h5py."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from functools import cache, cached_property, lru_cache
from pathlib import Path
from tempfile import SpooledTemporaryFile, gettempdir
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
from dist_esm.outputs.formats.base import About, Codec, ContentSize, InPlace, Names, Place, escape
from dist_esm.types import Extent, Row

if TYPE_CHECKING:
    import h5py

BLOCK_BYTES = 1 << 20
SAMPLE, SAMPLE_BYTES = 32, 1 << 17
"""Proteins that `output_bytes` writes into memory, and about the most bytes of one's matrix of residues."""
RESERVED, BEHIND = b"%reserved", b"%behind"
"""Names of datasets that are there for a while; no protein's is such."""
SPOOL_BYTES = 1 << 28
"""Bytes of a file without its numbers that are kept in memory."""
CACHE_BYTES = 1 << 25
"""HDF5's own memory for what it has written: with less it reads back what it changes once more."""
MAX_KEPT = 10_000
"""Datasets that stay open until they get their attributes; each takes 12 kB, and 20 us to open again."""

# A `/` would make a group and a lone `.` is the root itself; `~` marks the second of a name, `%` what is
# escaped.
_UNSAFE = re.compile(r"[/%~\x00-\x1f\x7f\ud800-\udfff]|^\.(?=\.?$)")


def dataset_name(protein: str) -> str:
    """An id as the name of a dataset: itself, unless HDF5 would take it for something else."""
    return escape(protein, _UNSAFE) or "%"


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
    id is ``id~2``.
    """
    with Metadata(table, path.parent) as metadata, SummedFile(path) as file:
        for block in metadata.blocks(0, metadata.hole.start):
            file.write(block)
        if table.rows:
            for values in little_endian_blocks(getattr(table, root_kind(table))[table.main_layer]):
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


class FileWithHole:
    """All of a file but a range of it that nobody writes to, as an open file for HDF5.

    It is in memory, or in a nameless file if it is large: attributes may hold the residues of further layers.

    Parameters
    ----------
    folder
        Where the nameless file goes.
    """

    def __init__(self, folder: Path) -> None:
        self.hole = range(0)
        self._file = SpooledTemporaryFile(SPOOL_BYTES, dir=str(folder))  # noqa: SIM115 - closed by close()
        self._position = 0
        self._end = 0

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Go to a position."""
        self._position = offset + (0, self._position, self._end)[whence]
        return self._position

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def _go_to(self, position: int) -> None:
        """Go to where a byte outside the hole is."""
        self._file.seek(position - (len(self.hole) if position >= self.hole.stop else 0))

    def write(self, data: Any) -> int:
        """Write bytes.

        Raises
        ------
        ValueError
            If they are in the hole.
        """
        view = memoryview(data)
        start, stop = self._position, self._position + view.nbytes
        if start < self.hole.stop and stop > self.hole.start and self.hole:
            raise ValueError("HDF5 writes to where the numbers of datasets belong")
        self._go_to(start)
        self._file.write(view)
        self._position = stop
        self._end = max(self._end, stop)
        return view.nbytes

    def readinto(self, buffer: Any) -> int:
        """Read bytes; what was not written is zero, as is the hole: HDF5 reads on behind what it is after."""
        view = memoryview(buffer).cast("B")
        start, stop = self._position, self._position + view.nbytes
        view[:] = bytes(view.nbytes)
        for first, last in ((start, min(stop, self.hole.start)), (max(start, self.hole.stop), stop)):
            if first < last:
                self._go_to(first)
                found = self._file.read(last - first)
                view[first - start : first - start + len(found)] = found
        self._position = stop
        return view.nbytes

    def truncate(self, size: int) -> int:
        """Set the size of the whole file."""
        self._end = size
        self._file.truncate(size - (len(self.hole) if size >= self.hole.stop else 0))
        return size

    def flush(self) -> None:
        """Do nothing: nobody else sees the file."""

    @property
    def num_bytes(self) -> int:
        """Bytes without those of the hole."""
        return self._end - len(self.hole)

    def blocks(self, start: int, stop: int) -> Iterator[bytes]:
        """Give bytes from start up to stop, those of the hole not counted."""
        self._file.seek(start)
        for begin in range(start, stop, BLOCK_BYTES):
            size = min(BLOCK_BYTES, stop - begin)
            yield self._file.read(size).ljust(size, b"\0")

    def close(self) -> None:
        """Give it up."""
        self._file.close()


class Metadata(FileWithHole):
    """The whole file but for the numbers that its datasets hold, which are a hole in it.

    HDF5 writes numbers in an order of its own, and no checksum can be taken on the way. So it is given none.
    The numbers of all datasets follow one another in file order, since they get the room of a dataset as
    large as all of them, which was there first and is deleted.

    As a context manager it closes the file.
    """

    def __init__(self, table: OutputTable, folder: Path) -> None:
        super().__init__(folder)
        with ExitStack() as undo:
            undo.callback(self.close)
            offsets = _write_metadata(table, self)
            num_rows = table.offsets if root_kind(table) == "per_tok" else range(len(table.rows) + 1)
            row_bytes = size_of_root(table) // max(1, num_rows[-1])
            starts = (self.hole.start + before * row_bytes for before in num_rows)
            if any(offset != start for offset, start in zip(offsets, starts, strict=False)):
                raise ValueError("this version of HDF5 does not keep numbers together: install another h5py")
            undo.pop_all()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _write_metadata(table: OutputTable, metadata: FileWithHole) -> list[int]:
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
    unfilled = _unfilled()
    offsets: list[int] = []
    kept: list[Any] = []

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

    with _create(metadata, size_of_root(table)) as file:
        # All datasets come first: texts and large attributes would take room among their numbers.
        taken = [names.take(row.id).encode() for row in table.rows]
        for name, row in zip(taken, table.rows, strict=True):
            shape = (row.embedded, about.width) if root == "per_tok" else (about.width,)
            space = h5py.h5s.create_simple(shape)
            dataset = h5py.h5d.create(file.id, name, number_type, space, unfilled)
            offsets.append(dataset.get_offset())
            if len(kept) < MAX_KEPT:
                kept.append(dataset)
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
            (b"%s_layer_%d" % (kind.encode(), layer), values_of(table, kind, layer))
            for kind, layer in attributes
        ]
        for place, (name, row) in enumerate(zip(taken, table.rows, strict=True)):
            dataset = kept[place] if place < len(kept) else h5py.h5d.open(file.id, name)
            attach(dataset, b"original_id", np.array(row.id, dtype=text_dtype))
            attach(dataset, b"index", np.array(row.number))
            attach(dataset, b"length", np.array(row.embedded))
            for attribute, numbers in values:
                attach(dataset, attribute, next(numbers))
    return offsets


def _unfilled() -> Any:
    """Return how datasets are made whose numbers have their place at once and are not written by HDF5."""
    import h5py

    unfilled = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    unfilled.set_obj_track_times(False)
    unfilled.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    unfilled.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
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
    """Return where the numbers of the datasets begin; those of attributes have no place."""
    start = _first_offset() if extent.proteins else 0
    return {(root_kind(table), table.main_layer): Place("", start)}


def finish_h5(table: OutputTable, path: Path, crcs: Mapping[tuple[str, int], int]) -> None:
    """Write all but the numbers of datasets, which have their places already."""
    with Metadata(table, path.parent) as metadata:
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
    def _names(self) -> list[str]:
        return list(self._file)

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
            dataset[()] if (kind, layer) == self._root else dataset.attrs[f"{kind}_layer_{layer}"]
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
    residues = few * min(longest, round(size.residues / max(1, size.proteins)))
    return replace(
        size,
        proteins=few,
        residues=residues,
        id_bytes=round(size.id_bytes * share),
        header_bytes=round(size.header_bytes * share),
    )


def table_like(size: ContentSize, num_proteins: int) -> OutputTable:
    """Return a table of so many of the proteins of a size, all alike, with zeros for their numbers."""
    all_of_them = max(1, size.proteins)
    length = size.residues // all_of_them
    header = "x" * (size.header_bytes // all_of_them)
    id_length = max(4, size.id_bytes // all_of_them)
    rows = [
        Row(f"{place:0{id_length}d}", header, place, length, length, "ok", 0, 0, 0, 0)
        for place in range(num_proteins)
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


CODEC = Codec(write_h5, OpenedH5, in_place=InPlace(places, finish_h5), output_bytes=output_bytes)
