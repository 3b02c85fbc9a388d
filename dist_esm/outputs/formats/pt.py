"""`format=pt`: what VirNucPro reads, one file for each input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_esm.atomic import SummedFile, write_at
from dist_esm.outputs.archive import rest_of_archive, storage_members
from dist_esm.outputs.embeddings import OutputTable, little_endian_blocks, numpy_dtype
from dist_esm.outputs.formats.base import About, Codec, ContentSize, InPlace, Place, plain_bytes
from dist_esm.outputs.pickling import Storage
from dist_esm.types import Extent


def write_pt(table: OutputTable, path: Path) -> str:
    """Write VirNucPro's layout, with every representation beside it under fair-esm's names.

    ``proteins`` and ``data`` are lists in file order, ``data`` of the mean of the last requested layer, shape
    (D,); further ``headers``, ``lengths`` (embedded residues), the fields of `About`, and as included
    ``mean_representations[layer]`` and ``bos_representations[layer]``, shape (N, D), and
    ``representations[layer]``, a list of tensors of shape (L, D). Tensors of a kind and layer are views of
    one storage. Loading takes 35 us of a core for each tensor of a list, most of them in torch's unpickler.
    """
    storages = _storages(About.of(table), Extent(len(table.rows), sum(table.lengths)), _dtype(table))
    members, crcs = storage_members(list(storages.values())), []
    with SummedFile(path) as file:
        for (kind, layer), member in zip(storages, members, strict=True):
            file.write(member.header())
            crc = 0
            for block in little_endian_blocks(getattr(table, kind)[layer]):
                file.write(block.data)
                crc = crc32(block.data, crc)
            file.write(member.descriptor(crc))
            crcs.append(crc)
        file.write(rest_of_archive(members, crcs, _content(table, storages)))
    return file.checksum()


def _dtype(table: OutputTable) -> np.dtype[Any]:
    return numpy_dtype(table.mean[table.main_layer].dtype)


def _storages(about: About, extent: Extent, dtype: np.dtype[Any]) -> dict[tuple[str, int], Storage]:
    """Return the storage of each kind and layer, in the order in which they stand."""
    keys = [(kind, layer) for kind, layers in about.kinds.items() for layer in layers]
    num_rows = {"mean": extent.proteins, "bos": extent.proteins, "per_tok": extent.residues}
    return {
        key: Storage(str(number), dtype, (num_rows[key[0]], about.width)) for number, key in enumerate(keys)
    }


def _content(table: OutputTable, storages: Mapping[tuple[str, int], Storage]) -> dict[str, Any]:
    main = storages["mean", table.main_layer]
    content: dict[str, Any] = {
        "proteins": table.ids,
        "data": [main.row(place) for place in range(len(table.rows))],
        "headers": [row.header for row in table.rows],
        "lengths": table.lengths,
        **vars(About.of(table)),
    }
    for kind in ("mean", "bos"):
        if kind in table.include:
            content[f"{kind}_representations"] = {
                layer: storages[kind, layer].rows(0, len(table.rows)) for layer in getattr(table, kind)
            }
    if "per_tok" in table.include:
        content["representations"] = {
            layer: [storages["per_tok", layer].rows(*span) for span in pairwise(table.offsets)]
            for layer in table.per_tok
        }
    return content


def places(
    table: OutputTable, extent: Extent, dtype: np.dtype[Any], lengths: Sequence[int]
) -> dict[tuple[str, int], Place]:
    """Return where the rows of each kind and layer begin."""
    storages = _storages(About.of(table), extent, dtype)
    members = storage_members(list(storages.values()))
    return {key: Place("", member.start) for key, member in zip(storages, members, strict=True)}


def finish_pt(table: OutputTable, path: Path, crcs: Mapping[tuple[str, int], int]) -> None:
    """Write all of the archive but the numbers, which have their places already."""
    storages = _storages(About.of(table), Extent(len(table.rows), sum(table.lengths)), _dtype(table))
    members = storage_members(list(storages.values()))
    for key, member in zip(storages, members, strict=True):
        write_at(path, member.offset, member.header())
        write_at(path, member.start + member.num_bytes, member.descriptor(crcs[key]))
    in_order = [crcs[key] for key in storages]
    rest = rest_of_archive(members, in_order, _content(table, storages))
    write_at(path, members[-1].stop, rest)


class OpenedPt:
    """An output opened for reading. Numbers are mapped, and read from disk when they are used."""

    def __init__(self, path: Path) -> None:
        self._content: dict[str, Any] = torch.load(path, weights_only=True, mmap=True)
        self.about = About(**{name: self._content[name] for name in About.__dataclass_fields__})

    @property
    def num_proteins(self) -> int:
        """N."""
        return len(self._content["proteins"])

    def ids(self) -> list[str]:
        """Return the ids of all proteins."""
        return list(self._content["proteins"])

    def headers(self) -> list[str]:
        """Return the headers of all proteins."""
        return list(self._content["headers"])

    def lengths(self) -> list[int]:
        """Return the embedded residues of all proteins."""
        return list(self._content["lengths"])

    def vectors(self, kind: str, layer: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return one representation of proteins, shape (n, D)."""
        rows = self._rows(kind, layer)[start:stop]
        if isinstance(rows, Tensor):
            return np.asarray(rows.numpy())
        return np.asarray(torch.stack(rows).numpy()) if rows else np.empty((0, self.about.width), np.float32)

    def vector(self, kind: str, layer: int, position: int) -> NDArray[Any]:
        """Return one representation of one protein, shape (D,)."""
        return np.asarray(self._rows(kind, layer)[position].numpy())

    def residues(self, layer: int, position: int) -> NDArray[Any]:
        """Return the residues of one protein, shape (L, D)."""
        return np.asarray(self._content["representations"][layer][position].numpy())

    def _rows(self, kind: str, layer: int) -> Tensor | list[Tensor]:
        by_layer: dict[int, Tensor | list[Tensor]] = self._content.get(f"{kind}_representations", {})
        # Without `mean` in include, the main layer's is in `data` alone.
        return by_layer[layer] if layer in by_layer else self._content["data"]


def output_bytes(size: ContentSize) -> int:
    """Return about how many bytes an output will have: numbers, text, and what the pickle says of each
    protein's tensors; constants as measured."""
    of_protein = 42 + 33 * len(size.kinds["per_tok"])
    return plain_bytes(size) + 1800 + 200 * size.num_matrices + of_protein * size.proteins


CODEC = Codec(
    write_pt, OpenedPt, in_place=InPlace(places, finish_pt, has_crc=True), output_bytes=output_bytes
)
