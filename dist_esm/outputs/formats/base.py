"""The parts that formats share: the description in every output, how it is read back, and safe names."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from numpy.typing import NDArray

from dist_esm.outputs.embeddings import OutputTable


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
    """Writes an output to exactly this path, a new file or folder; returns its sha256 if that was taken on
    the way."""
    open: Callable[[Path], Opened]
    """Opens an output for reading; raises whatever its library raises if it is damaged."""
    marks: tuple[str, ...] = ()
    """For a format whose output is a folder: names of the files that every such folder has."""
    write_compressed: Callable[[OutputTable, Path], str | None] | None = None
    """As `write`, with numbers compressed by zstd, for a format that can."""
    output_bytes: Callable[[ContentSize], int] = plain_bytes
    """Returns about how many bytes an output will have; within a few percent of what `write` writes."""
    output_files: Callable[[ContentSize], int] = lambda size: 1
    """Returns how many files and folders an output is."""


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
