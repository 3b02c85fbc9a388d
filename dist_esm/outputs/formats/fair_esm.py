"""`format=fair_esm`: what fair-esm's own script leaves, a file for each protein."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_esm.atomic import SummedFile, SummedFolder
from dist_esm.outputs.embeddings import OutputTable
from dist_esm.outputs.formats.base import About, Codec, ContentSize, Loose, Names, plain_bytes, safe_name
from dist_esm.outputs.pickling import torch_save
from dist_esm.types import Row, WrittenFile

MAP = "ids.tsv"
MAP_COLUMNS = ("file", "id", "index", "length", "header")
ABOUT = "provenance.json"
MAX_NAME = 244
"""Bytes of the longest name, before the mark of a duplicate and `.pt`; file systems take 255."""


# Windows takes none of <>:"/\|?* and reads CON and the like as devices whatever their suffix. `|` stays:
# UniProt's headers and fair-esm's own examples have it. A dot in front hides a file. `%` and `~` stay unless
# they would read as an escaped byte or as a mark that is added here.
_DEVICES = r"con|prn|aux|nul|conin\$|conout\$|com[0-9]|lpt[0-9]"


_UNSAFE = re.compile(
    r'[<>:"/\\?*\x00-\x1f\x7f-\x9f\u2028\u2029\ud800-\udfff]|^\.|'
    r"%(?=[0-9a-f]{2})|~(?=(?:[0-9]+|h[0-9a-f]{16})$)|"
    rf"^(?=(?:{_DEVICES})(?:\.|$)).",
    re.IGNORECASE,
)


def label_of(row: Row) -> str:
    """Return a protein's label as fair-esm has it: the header without blanks around it, else the id."""
    return row.header.strip() or row.id


def file_name(label: str) -> str:
    """Return a name, without suffix, that is safe on any file system.

    Unsafe letters are escaped. A name that is too long is cut, with a hash of the label behind it.
    """
    return safe_name(label, _UNSAFE, MAX_NAME)


def same_file(name: str) -> str:
    """Return what two names share if a file system may take them for one.

    It may tell neither upper from lower case nor two spellings of a letter apart.
    """
    return unicodedata.normalize("NFD", unicodedata.normalize("NFD", name).casefold())


def alone(rows: Tensor) -> Tensor:
    """Return rows as a tensor whose storage has nothing else, without a copy: a storage is saved whole."""
    return torch.from_numpy(rows.numpy())


def write_fair_esm(table: OutputTable, path: Path) -> str:
    """Write what fair-esm's `esm-extract` leaves: a folder with a ``.pt`` for each protein, whose name is the
    protein's label.

    The label is the whole header. Each file holds ``label``, ``id`` (the header's first word) and, as
    included, ``representations``, shape (L, D), ``mean_representations`` and ``bos_representations``, shape
    (D,), dicts by layer of tensors with a storage of their own; the mean of the last requested layer is
    always there.

    In a name, what some file system does not take is ``%XX``; ``~2`` marks the second of a name, upper and
    lower case not told apart, and ``~h`` and a hash a name that was too long. ``ids.tsv`` lists the proteins
    in file order: file, id, index (of the record in its input, from 0), length (embedded residues) and
    header; ``provenance.json`` has the fields of `About`.
    """
    names = names_of(table.rows)
    with SummedFolder(path) as folder:
        folder.add_files(lambda place: write_protein(table, place, path / names[place]), len(names))
        write_tables(table, names, folder)
    return folder.checksum()


def names_of(rows: Sequence[Row]) -> list[str]:
    """Return the name of each protein's file, in order."""
    names = Names(file_name, same_file)
    return [f"{names.take(label_of(row))}.pt" for row in rows]


def write_protein(table: OutputTable, place: int, path: Path, is_alone: bool = False) -> WrittenFile:
    """Write the file of one protein."""
    row, span = table.rows[place], slice(*table.span(place))
    content: dict[str, object] = {"label": label_of(row), "id": row.id}
    if table.per_tok:
        content["representations"] = {layer: alone(rows[span]) for layer, rows in table.per_tok.items()}
    content["mean_representations"] = {layer: alone(rows[place]) for layer, rows in table.mean.items()}
    if table.bos:
        content["bos_representations"] = {layer: alone(rows[place]) for layer, rows in table.bos.items()}
    with SummedFile(path, is_alone) as file:
        torch_save(content, file)
    return file.written(path.name)


def write_tables(table: OutputTable, names: Sequence[str], folder: SummedFolder) -> None:
    """Write what stands beside the files of the proteins, given their names."""
    lines = ["\t".join(MAP_COLUMNS)]
    for name, row in zip(names, table.rows, strict=True):
        lines.append("\t".join((name, row.id, str(row.number), str(row.embedded), row.header)))
    with folder.text(MAP) as text:
        text.write("\n".join([*lines, ""]))
    with folder.text(ABOUT) as text:
        text.write(json.dumps(asdict(About.of(table)), indent=1) + "\n")


def read_protein(path: Path) -> dict[tuple[str, int], Tensor]:
    """Read the file of one protein: kind and layer to its numbers, of shape (L, D) or (D,)."""
    content = torch.load(path, weights_only=True)
    names = {"mean": "mean_representations", "bos": "bos_representations", "per_tok": "representations"}
    return {
        (kind, layer): tensor
        for kind, name in names.items()
        for layer, tensor in content.get(name, {}).items()
    }


class OpenedFairEsm:
    """An output opened for reading. Each protein is a file of its own, read when it is asked for."""

    def __init__(self, path: Path) -> None:
        about = json.loads((path / ABOUT).read_text(encoding="utf-8"))
        self.about = About(**about)
        self._path = path
        _, *lines, rest = (path / MAP).read_bytes().decode().split("\n")
        if rest:
            raise ValueError(f"{MAP} ends within a line")
        self._lines: Sequence[list[str]] = [line.split("\t", len(MAP_COLUMNS) - 1) for line in lines]

    @property
    def num_proteins(self) -> int:
        """N."""
        return len(self._lines)

    def ids(self) -> list[str]:
        """Return the ids of all proteins."""
        return [line[1] for line in self._lines]

    def headers(self) -> list[str]:
        """Return the headers of all proteins."""
        return [line[4] for line in self._lines]

    def lengths(self) -> list[int]:
        """Return the embedded residues of all proteins."""
        return [int(line[3]) for line in self._lines]

    def vectors(self, kind: str, layer: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Read one representation of proteins, shape (n, D)."""
        positions = range(self.num_proteins)[start:stop]
        rows = [self.vector(kind, layer, position) for position in positions]
        return np.stack(rows) if rows else np.empty((0, self.about.width), np.float32)

    def vector(self, kind: str, layer: int, position: int) -> NDArray[Any]:
        """Return one representation of one protein, shape (D,)."""
        return np.asarray(self._load(position)[f"{kind}_representations"][layer].numpy())

    def residues(self, layer: int, position: int) -> NDArray[Any]:
        """Return the residues of one protein, shape (L, D)."""
        return np.asarray(self._load(position)["representations"][layer].numpy())

    def _load(self, position: int) -> dict[str, Any]:
        content: dict[str, Any] = torch.load(self._path / self._lines[position][0], weights_only=True)
        return content


def output_bytes(size: ContentSize) -> int:
    """Return about how many bytes an output will have.

    Each protein is an archive of its own, with an entry for each tensor; id and header stand in it and in the
    map. Constants as measured.
    """
    of_protein = 1450 + 252 * size.num_matrices
    return plain_bytes(size) + size.text_bytes + 550 + of_protein * size.proteins


CODEC = Codec(
    write_fair_esm,
    OpenedFairEsm,
    (MAP, ABOUT),
    loose=Loose(names_of, write_protein, write_tables, read_protein),
    output_bytes=output_bytes,
    output_files=lambda size: size.proteins + len((MAP, ABOUT)) + 1,
)
