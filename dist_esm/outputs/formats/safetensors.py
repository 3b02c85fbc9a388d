"""safetensors: a matrix for each kind and layer. The format is simple: it is written and mapped by hand."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dist_esm.atomic import SummedFile, write_at
from dist_esm.outputs.embeddings import OutputTable, little_endian_blocks, numpy_dtype
from dist_esm.outputs.formats.base import About, Codec, ContentSize, InPlace, Place, plain_bytes
from dist_esm.types import Extent, Row

MAX_HEADER = 100_000_000
"""Bytes of a header that the library reads."""
DTYPES = {4: "F32", 2: "F16"}
BYTES = {"F32": 4, "F16": 2, "I64": 8}
NUMPY_DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "I64": np.dtype("<i8"),
}
BEGIN = b'{"__metadata__": {'
END_BYTES = 1 << 16
"""Bytes of either end of a header that are looked at first."""


def write_safetensors(table: OutputTable, path: Path) -> str:
    """Write ``mean.33`` and ``bos.33``, shape (N, D), and ``per_tok.33``, shape (sum of embedded residues,
    D), for each layer.

    Protein i's residues are the rows ``offsets[i]`` to ``offsets[i + 1]``. The mean of the last requested
    layer is always there. The metadata is text: ``ids``, ``headers``, ``index`` (of each record in its input,
    from 0) and ``lengths`` (embedded residues) are JSON lists in file order, beside ``model_name`` and the
    fields of `About`, ``provenance`` as JSON.

    The format is a JSON header and the numbers end to end. The library's own writer puts metadata in an order
    that changes from run to run, and its older versions copy every tensor first; here the bytes depend on the
    content alone, and go to disk in chunks.

    Raises
    ------
    ValueError
        If ids and headers are more than the library can read.
    """
    about = About.of(table)
    text = _header(table, about)
    with SummedFile(path) as file:
        file.write(text)
        if table.per_tok:
            file.write(_offsets(table).data)
        for kind, layers in about.kinds.items():
            for layer in layers:
                for block in little_endian_blocks(getattr(table, kind)[layer]):
                    file.write(block.data)
    return file.checksum()


def _offsets(table: OutputTable) -> NDArray[Any]:
    return np.array(table.offsets, dtype="<i8")


def _shapes(about: About, extent: Extent, dtype: np.dtype[Any]) -> dict[str, tuple[str, list[int]]]:
    """Return the dtype and the shape of each tensor, in the order in which they stand."""
    shapes: dict[str, tuple[str, list[int]]] = {}
    if about.kinds["per_tok"]:  # first: the widest numbers stay aligned
        shapes["offsets"] = ("I64", [extent.proteins + 1])
    for kind, layers in about.kinds.items():
        num_rows = extent.residues if kind == "per_tok" else extent.proteins
        shapes |= {f"{kind}.{layer}": (DTYPES[dtype.itemsize], [num_rows, about.width]) for layer in layers}
    return shapes


def _header(table: OutputTable, about: About) -> bytes:
    """Return all bytes in front of the first tensor.

    Raises
    ------
    ValueError
        If ids and headers are more than the library can read.
    """
    extent = Extent(len(table.rows), sum(table.lengths))
    text, _ = _text(about, extent, numpy_dtype(table.mean[table.main_layer].dtype), table.rows)
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(
            f"ids and headers of {len(table.rows)} proteins are too much for one safetensors file: "
            "lower max_proteins_per_output, or use format=parquet, in another output_dir"
        )
    return len(text).to_bytes(8, "little") + text


def _text(
    about: About, extent: Extent, dtype: np.dtype[Any], rows: Sequence[Row]
) -> tuple[bytes, dict[str, int]]:
    """Return the header of these rows, and where each tensor begins behind it."""
    lists = {name: json.dumps(values, ensure_ascii=False) for name, values in _lists(rows).items()}
    header: dict[str, Any] = {"__metadata__": {**about.to_text(), **lists}}
    starts: dict[str, int] = {}
    end = 0
    for name, (tensor_dtype, shape) in _shapes(about, extent, dtype).items():
        starts[name], end = end, end + math.prod(shape) * BYTES[tensor_dtype]
        header[name] = {"dtype": tensor_dtype, "shape": shape, "data_offsets": [starts[name], end]}
    return json.dumps(header, ensure_ascii=False).encode(), starts


def _lists(rows: Sequence[Row]) -> dict[str, list[Any]]:
    return {
        "ids": [row.id for row in rows],
        "headers": [row.header for row in rows],
        "index": [row.number for row in rows],
        "lengths": [row.embedded for row in rows],
    }


def text_size(rows: Sequence[Row]) -> int:
    """Return the bytes that rows add to the header, with a comma and a blank behind each."""
    if not rows:
        return 0
    lists = (json.dumps(values, ensure_ascii=False)[1:-1] for values in _lists(rows).values())
    return sum(len(json.dumps(items, ensure_ascii=False).encode()) for items in lists)


def places(
    table: OutputTable, extent: Extent, dtype: np.dtype[Any], lengths: Sequence[int]
) -> dict[tuple[str, int], Place]:
    """Return where the rows of each kind and layer begin."""
    about = About.of(table)
    empty, starts = _text(about, extent, dtype, [])
    commas = 2 * len(_lists([])) if extent.proteins else 0  # behind the last item of a list there is none
    num_bytes = len(empty) + extent.text - commas
    begin = 8 + num_bytes + -num_bytes % 8
    return {
        (kind, layer): Place("", begin + starts[f"{kind}.{layer}"])
        for kind, layers in about.kinds.items()
        for layer in layers
    }


def finish_safetensors(table: OutputTable, path: Path, crcs: Mapping[tuple[str, int], int]) -> None:
    """Write the header and the offsets around numbers that have their places already.

    Raises
    ------
    ValueError
        If ids and headers are more than the library can read.
    """
    text = _header(table, About.of(table))
    write_at(path, 0, text)
    if table.per_tok:
        write_at(path, len(text), _offsets(table).data)


class OpenedSafetensors:
    """An output opened for reading. The file is mapped: numbers are read from disk when they are used, and of
    the header, which has all ids in it, only the two ends until ids are asked for."""

    def __init__(self, path: Path) -> None:
        self._bytes: NDArray[np.uint8] = np.asarray(np.memmap(path, np.uint8, "r"))
        self._metadata: dict[str, str] | None = None
        self._data_start = 8 + int.from_bytes(self._bytes[:8].tobytes(), "little")
        if self._data_start > len(self._bytes):
            raise ValueError("it ends within its header")
        text, self._tensors = self._ends_of_header()
        ends = [entry["data_offsets"][1] for entry in self._tensors.values()]
        if self._data_start + max(ends) != len(self._bytes):
            raise ValueError(f"it has {len(self._bytes)} bytes, {self._data_start + max(ends)} are expected")
        self.about = About.from_text(text)
        self.num_proteins: int = self._tensors[f"mean.{self.about.main_layer}"]["shape"][0]

    def ids(self) -> list[str]:
        """Read the ids of all proteins."""
        return self._list("ids")

    def headers(self) -> list[str]:
        """Read the headers of all proteins."""
        return self._list("headers")

    def lengths(self) -> list[int]:
        """Read the embedded residues of all proteins."""
        return self._list("lengths")

    def vectors(self, kind: str, layer: int, start: int = 0, stop: int | None = None) -> NDArray[Any]:
        """Return one representation of proteins, shape (n, D)."""
        return self._tensor(f"{kind}.{layer}")[start:stop]

    def vector(self, kind: str, layer: int, position: int) -> NDArray[Any]:
        """Return one representation of one protein, shape (D,)."""
        return np.asarray(self._tensor(f"{kind}.{layer}")[position])

    def residues(self, layer: int, position: int) -> NDArray[Any]:
        """Return the residues of one protein, shape (L, D)."""
        start, stop = self._tensor("offsets")[position : position + 2].tolist()
        return self._tensor(f"per_tok.{layer}")[start:stop]

    def _tensor(self, name: str) -> NDArray[Any]:
        entry = self._tensors[name]
        start, stop = (self._data_start + offset for offset in entry["data_offsets"])
        return self._bytes[start:stop].view(NUMPY_DTYPES[entry["dtype"]]).reshape(entry["shape"])

    def _list(self, name: str) -> list[Any]:
        if self._metadata is None:
            self._metadata = json.loads(self._bytes[8 : self._data_start].tobytes())["__metadata__"]
        values: list[Any] = json.loads(self._metadata[name])
        return values

    def _ends_of_header(self) -> tuple[dict[str, str], dict[str, dict[str, Any]]]:
        """Read the metadata up to the ids, and the entries of the tensors, as `write_safetensors` puts them:
        the former first, the latter last."""
        header = self._bytes[8 : self._data_start]
        begin, end = header[:END_BYTES].tobytes(), header[-END_BYTES:].tobytes()
        stop, start = begin.find(b', "ids": "'), end.rfind(b'"}, "')
        if begin.startswith(BEGIN) and stop >= 0 and start >= 0:
            return json.loads(begin[len(BEGIN) - 1 : stop] + b"}"), json.loads(b"{" + end[start + 4 :])
        entries = json.loads(header.tobytes())
        return entries.pop("__metadata__"), entries


def output_bytes(size: ContentSize) -> int:
    """Return about how many bytes an output will have: numbers, text, what the header says of each matrix and
    protein, and the offsets of residues."""
    of_protein = 21 + (8 if size.kinds["per_tok"] else 0)
    return plain_bytes(size) + 620 + 76 * size.num_matrices + of_protein * size.proteins


CODEC = Codec(
    write_safetensors,
    OpenedSafetensors,
    in_place=InPlace(places, finish_safetensors, text_size),
    output_bytes=output_bytes,
)
