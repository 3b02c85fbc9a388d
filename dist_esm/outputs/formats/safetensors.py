"""safetensors: a matrix for each kind and layer. The format is simple: it is written and mapped by hand."""

from __future__ import annotations

import json
import math
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_esm.atomic import SummedFile
from dist_esm.outputs.embeddings import ChunkedTensor, OutputTable, little_endian_blocks
from dist_esm.outputs.formats.base import About, Codec, ContentSize, plain_bytes

MAX_HEADER = 100_000_000
"""Bytes of a header that the library reads."""
DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.int64: "I64"}
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
    tensors: dict[str, Tensor | ChunkedTensor] = {}
    if table.per_tok:
        tensors["offsets"] = torch.tensor(
            [0, *accumulate(table.lengths)], dtype=torch.int64
        )  # first: the widest numbers stay aligned
    about = About.of(table)
    for kind, layers in about.kinds.items():
        tensors |= {f"{kind}.{layer}": getattr(table, kind)[layer] for layer in layers}
    lists = {
        "ids": table.ids,
        "headers": [row.header for row in table.rows],
        "index": [row.number for row in table.rows],
        "lengths": table.lengths,
    }
    metadata = {
        **about.to_text(),
        **{name: json.dumps(values, ensure_ascii=False) for name, values in lists.items()},
    }
    header: dict[str, Any] = {"__metadata__": metadata}
    end = 0
    for name, tensor in tensors.items():
        start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > MAX_HEADER:
        raise ValueError(
            f"ids and headers of {len(table.rows)} proteins are too much for one safetensors file: "
            "lower max_proteins_per_output, or use format=parquet, in another output_dir"
        )
    with SummedFile(path) as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in tensors.values():
            for block in little_endian_blocks(tensor):
                file.write(block.data)
    return file.sha256()


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


CODEC = Codec(write_safetensors, OpenedSafetensors, output_bytes=output_bytes)
