"""Numbers of a file that was cut, written once: by each unit to their places in the one output of the file.

The output in the making has a name of its own among the shards until all units are done. What a unit cannot
write yet is in its shard: its rows, and the bytes at the ends of its regions (see `region`). Whoever finishes
the output writes these and the format's own text around them, and gives it its name. The bytes are those of
the file written uncut.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_esm.atomic import Staged, require_scratch, sync
from dist_esm.checksum import checksum_of_files, summed
from dist_esm.config import Format
from dist_esm.names import readable_name
from dist_esm.outputs.embeddings import ChunkedTensor, OutputTable, little_endian_blocks
from dist_esm.outputs.formats.base import About, InPlace, Place
from dist_esm.outputs.formats.registry import FORMATS
from dist_esm.outputs.formats.write import stage_output
from dist_esm.outputs.pickling import stage
from dist_esm.outputs.region import OutsideError, Region, WrittenRegion, joined_crc32
from dist_esm.types import Extent, Layout, Row

log = logging.getLogger("dist_esm")

SUFFIX = ".output"
"""Of the name of an output in the making, a file or a folder."""

DIGEST_BYTES = hashlib.sha256().digest_size
Key = tuple[str, int]
"""A kind and a layer."""


def in_place(output_format: Format, is_compressed: bool) -> InPlace | None:
    """Return how a format is laid out in whose outputs numbers can be written to their places; None if they
    cannot."""
    return None if is_compressed else FORMATS[output_format.name].codec.in_place


@dataclass(frozen=True)
class Target:
    """The output in the making, and the part of it that is one unit's."""

    path: Path
    """A file, or a folder for a format whose outputs are folders."""
    places: dict[Key, Place]
    layout: Layout
    row_bytes: int
    has_crc: bool
    """The CRC-32 of numbers is wanted."""
    is_shared: bool
    """Other units have parts of it, too."""

    @classmethod
    def of_output(
        cls, path: Path, codec: InPlace, table: OutputTable, dtype: np.dtype[Any], layout: Layout
    ) -> Target:
        """Find the places in an output of one unit alone, which is made at a path."""
        places = codec.places(table, layout.total, dtype, layout.lengths)
        width = About.of(table).width
        return cls(path, places, layout, width * dtype.itemsize, codec.has_crc, is_shared=False)

    @classmethod
    def of_cut_file(
        cls,
        stem: Path,
        codec: InPlace,
        places: dict[Key, Place],
        width: int,
        dtype: np.dtype[Any],
        layout: Layout,
    ) -> Target:
        """Find the places of a unit.

        Parameters
        ----------
        stem
            Path of the output in the making, without what tells one layout from another.
        codec
            How the format is laid out.
        places
            Of the whole output.
        width, dtype
            Of its rows.
        layout
            Of the unit.
        """
        row_bytes = width * dtype.itemsize
        spans = sorted(
            [*key, place.file, *span(place, key, Extent(), layout.total, row_bytes)]
            for key, place in places.items()
        )
        text = json.dumps([layout.digest, width, dtype.name, spans])
        digest = hashlib.sha256(text.encode()).hexdigest()[:16]
        path = stem.with_name(f"{stem.name}.{digest}{SUFFIX}")
        return cls(path, places, layout, row_bytes, codec.has_crc, is_shared=True)

    @property
    def alone(self) -> Target:
        """What of it is needed for the unit's own numbers: it does not grow with the whole output."""
        places = {
            key: place.around(rows_in(key, self.layout.before), rows_in(key, self.layout.own))
            for key, place in self.places.items()
        }
        return replace(self, places=places, layout=replace(self.layout, lengths=()))

    def file(self, key: Key) -> Path:
        """Return the file in which the numbers of a kind and layer belong."""
        return file_of(self.path, self.places[key])

    def blocks(self, key: Key, rows: Iterable[NDArray[Any]]) -> Iterator[NDArray[Any]]:
        """Give what is to be written to the region of the unit, given all of its rows."""
        return self.places[key].blocks(rows_in(key, self.layout.before), rows)

    def pieces(self, key: Key) -> list[tuple[int, int]]:
        """Return of what the region of the unit consists: bytes of a header, and rows behind it."""
        return self.places[key].pieces(rows_in(key, self.layout.before), rows_in(key, self.layout.own))

    def shard(self, ordinal: int) -> Path:
        """Return the path of the shard of a unit, given its place among those of its file."""
        return self.path.with_name(f"{self.path.name.removesuffix(SUFFIX)}.{ordinal:06d}.pt")

    def region(self, key: Key) -> Region:
        """Return where the unit's numbers of a kind and layer belong."""
        place = self.places[key]
        start, stop = span(place, key, self.layout.before, self.layout.own, self.row_bytes)
        return Region(self.file(key), start, stop, self.has_crc)

    def write(self, key: Key, rows: Tensor | ChunkedTensor, scratch: Path) -> WrittenRegion:
        """Write all of the unit's rows of a kind and layer to their place.

        Raises
        ------
        OSError
            If they cannot be written, or `scratch` is gone, and with it the output directory.
        """
        require_scratch(scratch)
        with closing(self.region(key)) as region:
            return region.write_all(self.blocks(key, little_endian_blocks(rows)))

    def row_file(self, key: Key, region: Region) -> Region | RowsInPages:
        """Return what takes the unit's rows of a kind and layer in any order, and writes them to a region."""
        place = self.places[key]
        if place.pages is None:
            return region
        first, num_rows = rows_in(key, self.layout.before), rows_in(key, self.layout.own)
        return RowsInPages(region, place, range(first, first + num_rows), self.row_bytes)


class RowsInPages:
    """A region whose rows stand in pages: takes them as if they followed one another.

    The header of a page is written with its first row.

    Parameters
    ----------
    region
        Where they and the headers between them go.
    place
        Of all rows of the output.
    rows
        Those of the region.
    row_bytes
        Bytes of a row.
    """

    def __init__(self, region: Region, place: Place, rows: range, row_bytes: int) -> None:
        self._region = region
        self._place = place
        self._rows = rows
        self._row_bytes = row_bytes

    def write(self, offset: int, data: Any) -> None:
        """Write whole rows, at an offset that counts from the first one and passes over headers.

        Raises
        ------
        OSError
            If the file cannot be written.
        OutsideError
            If they are not all in the region.
        """
        values = np.frombuffer(data, np.uint8).reshape(-1, self._row_bytes)
        first = self._rows.start + offset // self._row_bytes
        if first + len(values) > self._rows.stop:
            raise OutsideError(f"{first + len(values)} rows do not fit where {self._rows.stop} belong")
        position = self._place.begin(first, self._row_bytes) - self._region.start
        for block in self._place.blocks(first, [values]):
            self._region.write(position, block)
            position += block.nbytes

    def close(self) -> None:
        """Give the region up."""
        self._region.close()


def file_of(path: Path, place: Place) -> Path:
    """Return the file of a place in an output."""
    return path / place.file if place.file else path


def span(place: Place, key: Key, before: Extent, own: Extent, row_bytes: int) -> tuple[int, int]:
    """Return the first byte, and one past the last, of the numbers of some records."""
    first, num_rows = rows_in(key, before), rows_in(key, own)
    return place.begin(first, row_bytes), place.begin(first + num_rows, row_bytes)


def rows_in(key: Key, extent: Extent) -> int:
    """Return the rows that records have among the numbers of a kind and layer."""
    kind, _ = key
    return extent.residues if kind == "per_tok" else extent.proteins


def output_in_making(shard: Path) -> Path:
    """Return the path of the output in the making that a shard is a part of, if its numbers are there."""
    return shard.with_name(f"{shard.name.rpartition('.')[0].rpartition('.')[0]}{SUFFIX}")


def write_unit(table: OutputTable, target: Target, ordinal: int, scratch: Path) -> Staged:
    """Write the numbers of a unit to their places, and all else to a shard under a temporary name.

    Parameters
    ----------
    table
        The unit's proteins, with all numbers.
    target, ordinal, scratch
        As of `write_placed_shard`.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    regions = {
        (kind, layer): target.write((kind, layer), getattr(table, kind)[layer], scratch)
        for kind, layer in target.places
    }
    return write_placed_shard(table, regions, target, ordinal, scratch)


def write_placed_shard(
    table: OutputTable,
    regions: dict[Key, WrittenRegion],
    target: Target,
    ordinal: int,
    scratch: Path,
) -> Staged:
    """Write the shard of a unit whose numbers are in their places, under a temporary name.

    Parameters
    ----------
    table
        The unit's proteins. The shard keeps the numbers that have no places; of others it needs the shape.
    regions
        Where all other numbers are.
    target
        The output in the making.
    ordinal
        Of the unit in its file.
    scratch
        A folder of this process alone, on the same file system.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    for file in map(target.file, target.places):
        if file.parent != target.path.parent and file.parent.exists():
            sync(file.parent)
    content = {
        **{name: getattr(table, name) for name in ("source", "provenance", "include", "main_layer")},
        "keys": [(kind, layer) for kind, layers in About.of(table).kinds.items() for layer in layers],
        "width": table.mean[table.main_layer].shape[1],
        "dtype": str(table.mean[table.main_layer].dtype).removeprefix("torch."),
        "rows": packed(json.dumps(table.rows)),
        "tsv_lines": packed(json.dumps(table.tsv_lines)),
        "regions": [
            [*key, target.places[key].file, target.pieces(key), region.start, region.stop, region.crc32]
            for key, region in regions.items()
        ],
        "others": {
            f"{kind}.{layer}": rows[0 : rows.shape[0]] if isinstance(rows, ChunkedTensor) else rows
            for kind in ("mean", "bos", "per_tok")
            for layer, rows in getattr(table, kind).items()
            if (kind, layer) not in regions
        },
        "ends": {
            f"{kind}.{layer}": list(map(as_tensor, (region.head, region.tail, b"".join(region.digests))))
            for (kind, layer), region in regions.items()
        },
    }
    return stage(content, target.shard(ordinal), scratch)


def as_tensor(data: bytes) -> Tensor:
    """Return bytes as what `torch.load` takes back."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def packed(text: str) -> Tensor:
    """Return text, compressed: much of it is in the output, too."""
    return as_tensor(zlib.compress(text.encode("utf-8", "surrogatepass"), 1))


def unpacked(tensor: Tensor) -> Any:
    """Return what the JSON in `packed` text says."""
    return json.loads(zlib.decompress(tensor.numpy().tobytes()).decode("utf-8", "surrogatepass"))


@dataclass(frozen=True)
class PlacedShard:
    """A shard whose numbers are in the output in the making, all or some of them."""

    output: Path
    table: OutputTable
    """Its tensors have shapes and no numbers, but for those that the shard keeps."""
    dtype: np.dtype[Any]
    width: int
    regions: dict[Key, WrittenRegion]
    files: dict[Key, str]
    """Names of the files that they are in, within the output; "" if the output is a file itself."""
    pieces: dict[Key, list[tuple[int, int]]]
    """Of what they consist: bytes of a header, and the number of rows behind it."""

    def file(self, key: Key) -> Path:
        """Return the file that a region is in."""
        return file_of(self.output, Place(self.files[key], 0))

    def is_intact(self) -> bool:
        """Tell if its numbers are in their places."""
        return all(region.is_intact(self.file(key)) for key, region in self.regions.items())

    def mapped(self) -> OutputTable:
        """Return it with its numbers, which are mapped, and read from disk when they are used."""
        kinds: dict[str, Any] = {kind: dict(getattr(self.table, kind)) for kind in ("mean", "bos", "per_tok")}
        for (kind, layer), region in self.regions.items():
            file, pieces = self.file((kind, layer)), self.pieces[kind, layer]
            matrices = region.rows(file, self.dtype, self.width, pieces)
            chunks = list(map(torch.from_numpy, matrices))
            kinds[kind][layer] = ChunkedTensor(chunks) if kind == "per_tok" else torch.cat(chunks)
        return replace(self.table, **kinds)

    @property
    def extent(self) -> Extent:
        """What it takes of the output, text aside."""
        return Extent(len(self.table.rows), sum(self.table.lengths))


def read_placed_shard(path: Path) -> PlacedShard | None:
    """Read what `write_placed_shard` wrote; None if the shard holds its numbers itself.

    Raises
    ------
    OSError, RuntimeError
        If it cannot be read.
    """
    with readable_name(path) as name:
        content = torch.load(name, weights_only=True, mmap=True)
    if "regions" not in content:
        return None
    rows = list(map(Row._make, unpacked(content["rows"])))
    ends = {key: [tensor.numpy().tobytes() for tensor in tensors] for key, tensors in content["ends"].items()}
    regions, files, pieces = {}, {}, {}
    for kind, layer, file, pieces[kind, layer], start, stop, crc32 in content["regions"]:
        head, tail, text = ends[f"{kind}.{layer}"]
        digests = tuple(text[at : at + DIGEST_BYTES] for at in range(0, len(text), DIGEST_BYTES))
        files[kind, layer] = file
        regions[kind, layer] = WrittenRegion(start, stop, head, tail, digests, crc32)
    dtype, width = np.dtype(content["dtype"]), content["width"]
    numbers = shapes([(kind, layer) for kind, layer in content["keys"]], rows, dtype, width)
    for kind, layer in content["keys"]:
        tensor = content["others"].get(f"{kind}.{layer}")
        if tensor is not None:
            numbers[kind][layer] = ChunkedTensor([tensor]) if kind == "per_tok" else tensor
    table = OutputTable(
        **{name: content[name] for name in ("source", "provenance", "include", "main_layer")},
        rows=rows,
        tsv_lines=unpacked(content["tsv_lines"]),
        **numbers,
    )
    return PlacedShard(output_in_making(path), table, dtype, width, regions, files, pieces)


def shapes(keys: Sequence[Key], rows: Sequence[Row], dtype: np.dtype[Any], width: int) -> dict[str, Any]:
    """Return the tensors of a table of these rows, without numbers."""
    tensors: dict[str, dict[int, Any]] = {"mean": {}, "bos": {}, "per_tok": {}}
    num_residues = sum(row.embedded for row in rows)
    for kind, layer in keys:
        num_rows = num_residues if kind == "per_tok" else len(rows)
        tensor = torch.empty(num_rows, width, dtype=getattr(torch, dtype.name), device="meta")
        tensors[kind][layer] = ChunkedTensor([tensor]) if kind == "per_tok" else tensor
    return tensors


def finish_placed(
    shards: Sequence[PlacedShard], output_format: Format, stem: Path, scratch: Path
) -> Staged | None:
    """Complete the output in the making, and stage it: nothing of its numbers is written again.

    What is in the making stays as it is, beside its new name, until the caller removes it: a kill may come in
    between.

    Parameters
    ----------
    shards
        Of all units, in order.
    output_format
        Its format.
    stem
        The output's path without suffix.
    scratch
        A folder of this process alone, on the same file system.

    Returns
    -------
    Staged or None
        None if the shards are not of one output in the making, or do not fill it: some may be of a launch
        that laid it out otherwise.

    Raises
    ------
    OSError
        If it cannot be written.
    """
    codec, first = FORMATS[output_format.name].codec.in_place, shards[0]
    if codec is None or {shard.output for shard in shards} != {first.output}:
        return None
    rows = [row for shard in shards for row in shard.table.rows]
    tsv_lines = [line for shard in shards for line in shard.table.tsv_lines]
    table = replace(first.table, rows=rows, tsv_lines=tsv_lines)
    extent = Extent(len(rows), sum(table.lengths), codec.text_size(rows))
    places = codec.places(table, extent, first.dtype, table.lengths)
    table = replace(table, **numbers_of(shards, places, rows))
    if not fill(shards, places):
        return None
    for shard in shards:
        for key, region in shard.regions.items():
            region.write_ends(shard.file(key))
    remove_text_behind(first, places, extent)
    crcs = {
        key: reduce(
            lambda crc, region: joined_crc32(crc, region.crc32, region.num_bytes),
            (shard.regions[key] for shard in shards),
            0,
        )
        for key in places
    }
    codec.finish(table, first.output, crcs)
    known: dict[str, dict[int, bytes]] = {}
    for shard in shards:
        for key, region in shard.regions.items():
            known.setdefault(shard.files[key], {}).update(region.whole_blocks())

    def name(path: Path) -> str:
        link_output(first.output, path)
        return checksum_of_output(path, known)

    return stage_output(output_format, tsv_lines, stem, scratch, name)


def remove_text_behind(shard: PlacedShard, places: Mapping[Key, Place], total: Extent) -> None:
    """Cut off what stands behind all numbers in the files of an output in the making.

    It is of a launch that was killed when it had completed the output but for its name; text may be shorter
    now.
    """
    ends: dict[Path, int] = {}
    for key, place in places.items():
        _, stop = span(place, key, Extent(), total, shard.width * shard.dtype.itemsize)
        file = shard.file(key)
        ends[file] = max(stop, ends.get(file, 0))
    for file in filter(Path.exists, ends):
        status = file.stat()
        # With a second name it is of this launch, and people may see it.
        if status.st_nlink == 1 and status.st_size > ends[file]:
            os.truncate(file, ends[file])


def checksum_of_output(output: Path, known: Mapping[str, Mapping[int, bytes]]) -> str:
    """Take the checksum of an output, and read only those blocks that are not known.

    Parameters
    ----------
    output
        A file, or a folder of files.
    known
        The sha256 of blocks by number, by the name of the file within the output, "" for a file.
    """
    if not output.is_dir():
        return summed(output, "", known.get("", {})).sha256
    files = (summed(file, file.name, known.get(file.name, {})) for file in files_in(output))
    return checksum_of_files(list(files))


def numbers_of(
    shards: Sequence[PlacedShard], places: dict[Key, Place], rows: Sequence[Row]
) -> dict[str, Any]:
    """Return the tensors of the whole output: without numbers if they have places, else those of the
    shards."""
    kinds = {kind: list(getattr(shards[0].table, kind)) for kind in ("mean", "bos", "per_tok")}
    keys = [(kind, layer) for kind, layers in kinds.items() for layer in layers]
    numbers = shapes(keys, rows, shards[0].dtype, shards[0].width)
    for kind, layer in keys:
        if (kind, layer) not in places:
            parts = [getattr(shard.table, kind)[layer] for shard in shards]
            chunks = [chunk for part in parts for chunk in (part.chunks if kind == "per_tok" else [part])]
            numbers[kind][layer] = ChunkedTensor(chunks) if kind == "per_tok" else torch.cat(chunks)
    return numbers


def fill(shards: Sequence[PlacedShard], places: dict[Key, Place]) -> bool:
    """Tell if the regions of shards fill these places, one behind the other."""
    before = Extent()
    for shard in shards:
        row_bytes = shard.width * shard.dtype.itemsize
        wanted = {
            key: (place.file, span(place, key, before, shard.extent, row_bytes))
            for key, place in places.items()
        }
        found = {
            key: (shard.files[key], (region.start, region.stop)) for key, region in shard.regions.items()
        }
        if found != wanted:
            return False
        before += shard.extent
    return True


def link_output(
    output: Path, path: Path, otherwise: Callable[[Path, Path], object] = shutil.copyfile
) -> None:
    """Give the files of an output second names; where the file system cannot, copy them or do otherwise."""
    if output.is_dir():
        path.mkdir()
        for file in output.iterdir():
            link_output(file, path / file.name, otherwise)
        return
    try:
        os.link(output, path)
    except OSError as error:
        log.info("%s cannot have a second name: %s", output, error.strerror)
        otherwise(output, path)


def files_in(output: Path) -> list[Path]:
    """Return the files of an output in the making."""
    return sorted(output.iterdir()) if output.is_dir() else [output]


def part_from_finished(output: Path) -> None:
    """Make sure that an output in the making shares no bytes with one that people see.

    They share them when a kill comes between the new name of a finished output and its line in the journal.
    """
    for file in files_in(output):
        if file.stat().st_nlink > 1:
            copy = output.with_name(f"{output.name}.copy")
            shutil.copyfile(file, copy)
            sync(copy)
            os.replace(copy, file)
