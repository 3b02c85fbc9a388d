"""safetensors: a matrix for each kind and layer. The only door to safetensors, which reads what is written
here by hand."""

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
    """An output opened for reading. Numbers are read from disk when they are asked for."""

    def __init__(self, path: Path) -> None:
        from safetensors import safe_open

        file: Any = safe_open(path, framework="numpy")
        self._file = file
        self._metadata: dict[str, str] = file.metadata()
        self.about = About.from_text(self._metadata)
        self._offsets = file.get_tensor("offsets") if self.about.kinds["per_tok"] else None

    def records(self) -> tuple[list[str], list[str], list[int]]:
        """Return ids, headers and embedded residues of all proteins."""
        ids, headers, lengths = (json.loads(self._metadata[name]) for name in ("ids", "headers", "lengths"))
        return ids, headers, lengths

    def vectors(self, kind: str, layer: int) -> NDArray[Any]:
        """Return one representation of all proteins, shape (N, D)."""
        return np.asarray(self._file.get_tensor(f"{kind}.{layer}"))

    def vector(self, kind: str, layer: int, position: int) -> NDArray[Any]:
        """Return one representation of one protein, shape (D,)."""
        return np.asarray(self._file.get_slice(f"{kind}.{layer}")[position])

    def residues(self, layer: int, position: int) -> NDArray[Any]:
        """Return the residues of one protein, shape (L, D)."""
        assert self._offsets is not None
        start, stop = self._offsets[position : position + 2].tolist()
        return np.asarray(self._file.get_slice(f"per_tok.{layer}")[start:stop])


def output_bytes(size: ContentSize) -> int:
    """Return about how many bytes an output will have: numbers, text, what the header says of each matrix and
    protein, and the offsets of residues."""
    of_protein = 21 + (8 if size.kinds["per_tok"] else 0)
    return plain_bytes(size) + 620 + 76 * size.num_matrices + of_protein * size.proteins


CODEC = Codec(write_safetensors, OpenedSafetensors, output_bytes=output_bytes)
