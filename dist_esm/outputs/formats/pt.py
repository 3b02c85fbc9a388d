"""`format=pt`: what VirNucPro reads, one file for each input."""

from __future__ import annotations

from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_esm.outputs.embeddings import OutputTable
from dist_esm.outputs.formats.base import About, Codec, ContentSize, plain_bytes
from dist_esm.outputs.pickling import save


def write_pt(table: OutputTable, path: Path) -> str:
    """Write VirNucPro's layout, with every representation beside it under fair-esm's names.

    ``proteins`` and ``data`` are lists in file order, ``data`` of the mean of the last requested layer, shape
    (D,); further ``headers``, ``lengths`` (embedded residues), the fields of `About`, and as included
    ``mean_representations[layer]`` and ``bos_representations[layer]``, shape (N, D), and
    ``representations[layer]``, a list of tensors of shape (L, D). Tensors of a kind and layer are views of
    one storage, or of one for each shard of a file that was cut. Loading takes 35 us of a core for each
    tensor of a list, most of them in torch's unpickler.
    """
    content: dict[str, object] = {
        "proteins": table.ids,
        "data": list(table.mean[table.main_layer].unbind()),
        "headers": [row.header for row in table.rows],
        "lengths": table.lengths,
        **vars(About.of(table)),
    }
    if "mean" in table.include:
        content["mean_representations"] = table.mean
    if "bos" in table.include:
        content["bos_representations"] = table.bos
    if "per_tok" in table.include:
        spans = [slice(*span) for span in pairwise(accumulate(table.lengths, initial=0))]
        content["representations"] = {
            layer: [rows[span] for span in spans] for layer, rows in table.per_tok.items()
        }
    return save(content, path)


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


CODEC = Codec(write_pt, OpenedPt, output_bytes=output_bytes)
