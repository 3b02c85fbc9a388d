"""HDF5 as UniProt has it: a flat root with a dataset for each protein. The only door to h5py."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray

from dist_esm.atomic import SummedFile
from dist_esm.outputs.embeddings import ChunkedTensor, OutputTable, little_endian
from dist_esm.outputs.formats.base import About, Codec, ContentSize, Names, escape
from dist_esm.types import Row

if TYPE_CHECKING:
    import h5py

BLOCK_BYTES = 1 << 20
SAMPLE, SAMPLE_BYTES = 32, 1 << 17
"""Proteins that `output_bytes` writes into memory, and about the most bytes of one's matrix of residues."""

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
    skeleton = path.with_name(f"{path.name}.skeleton")
    try:
        offsets = write_skeleton(table, skeleton)
        with open(skeleton, "rb") as source, SummedFile(path) as file:
            start = 0
            for offset, place in sorted((offset, place) for place, offset in enumerate(offsets)):
                copy_bytes(source, file, offset - start)
                values = root_value(table, place)
                file.write(values.data)
                start = offset + values.nbytes
                source.seek(start)
            copy_bytes(source, file, skeleton.stat().st_size - start)
    finally:
        skeleton.unlink(missing_ok=True)
    return file.sha256()


def root_kind(table: OutputTable) -> str:
    """Return the kind that the datasets hold."""
    return "per_tok" if table.per_tok else "mean" if "mean" in table.include else "bos"


def value_of(table: OutputTable, kind: str, layer: int, place: int) -> NDArray[Any]:
    """Return the numbers of a protein, of shape (L, D) or (D,)."""
    rows = getattr(table, kind)[layer]
    return little_endian(rows[slice(*table.span(place))] if kind == "per_tok" else rows[place])


def root_value(table: OutputTable, place: int) -> NDArray[Any]:
    """Return the numbers of a protein that its dataset holds."""
    return value_of(table, root_kind(table), table.main_layer, place)


def copy_bytes(source: IO[bytes], file: IO[bytes], count: int) -> None:
    """Copy so many bytes from one open file to another.

    Raises
    ------
    EOFError
        If there are fewer.
    """
    while count:
        block = source.read(min(count, BLOCK_BYTES))
        if not block:
            raise EOFError("the skeleton of an HDF5 file ends early")
        file.write(block)
        count -= len(block)


def write_skeleton(table: OutputTable, path: Path) -> list[int]:
    """Write the whole file but for the numbers of the datasets, which have their places and no content.

    HDF5 writes these numbers in an order of its own, and no checksum can be taken on the way. So they are
    filled in afterwards, while the file is copied from its first byte to its last. Where they belong there is
    a hole, which takes no room on disk.

    Returns
    -------
    list of int
        Offset of each protein's numbers in the file.
    """
    with create(path) as file:
        return write_into(file, table)


def write_into(file: h5py.File, table: OutputTable) -> list[int]:
    """Write what `write_skeleton` says into an open file."""
    import h5py

    about = About.of(table)
    main = table.main_layer
    attributes = [
        (kind, layer)
        for kind, layers in about.kinds.items()
        for layer in layers
        if (kind, layer) != (root_kind(table), main)
    ]
    names = Names(dataset_name)
    text = h5py.h5t.py_create(h5py.string_dtype(), logical=True)
    scalar = h5py.h5s.create(h5py.h5s.SCALAR)
    unfilled = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    unfilled.set_obj_track_times(False)
    unfilled.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    unfilled.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    offsets = []

    # h5py's high-level calls take twice as long, and a dataset and three attributes for each protein add up.
    def attach(dataset: Any, name: str, value: NDArray[Any]) -> None:
        hdf5_type = text if value.dtype == object else h5py.h5t.py_create(value.dtype)
        space = h5py.h5s.create_simple(value.shape) if value.shape else scalar
        h5py.h5a.create(dataset, name.encode(), hdf5_type, space).write(value)

    records = {
        "ids": table.ids,
        "headers": [row.header for row in table.rows],
        "lengths": table.lengths,
    }
    root_attributes = {**about.to_text(), "kind": root_kind(table), "records": json.dumps(records)}
    for key, text_of in root_attributes.items():
        file.attrs[key] = text_of
    file.attrs["layer"] = main
    for place, row in enumerate(table.rows):
        value = root_value(table, place)
        dataset = h5py.h5d.create(
            file.id,
            names.take(row.id).encode(),
            h5py.h5t.py_create(value.dtype),
            h5py.h5s.create_simple(value.shape),
            unfilled,
        )
        attach(dataset, "original_id", np.array(row.id, dtype=h5py.string_dtype()))
        attach(dataset, "index", np.array(row.number))
        attach(dataset, "length", np.array(row.embedded))
        for kind, layer in attributes:
            attach(dataset, f"{kind}_layer_{layer}", value_of(table, kind, layer, place))
        offsets.append(dataset.get_offset())
    return offsets


@contextmanager
def create(path: Path, is_kept: bool = True) -> Iterator[h5py.File]:
    """Make a new file whose root keeps the order of its names and takes attributes of any size.

    One that is not kept is in memory alone.

    There is no time stamp in it, so that its bytes depend on its content alone.
    """
    import h5py

    root = h5py.h5p.create(h5py.h5p.FILE_CREATE)
    root.set_link_creation_order(h5py.h5p.CRT_ORDER_TRACKED | h5py.h5p.CRT_ORDER_INDEXED)
    root.set_obj_track_times(False)
    access = h5py.h5p.create(h5py.h5p.FILE_ACCESS)
    # HDF5 1.8 (2008) and later can read it; before, attributes ended at 64 KiB.
    access.set_libver_bounds(h5py.h5f.LIBVER_V18, h5py.h5f.LIBVER_LATEST)
    # This process alone knows the file, and some network file systems refuse locks.
    access.set_file_locking(False, True)
    if not is_kept:
        access.set_fapl_core(1, False)  # it grows by so many bytes
    with h5py.File(h5py.h5f.create(os.fsencode(path), h5py.h5f.ACC_EXCL, root, access)) as file:
        yield file


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
    """Return the bytes of an output, which is written into memory and forgotten."""
    with create(Path("in memory"), is_kept=False) as file:
        write_into(file, table)
        file.flush()
        return int(file.id.get_filesize())


CODEC = Codec(write_h5, OpenedH5, output_bytes=output_bytes)
