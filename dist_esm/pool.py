"""Hidden states of a pack to one answer for each of its segments.

Sums are over the kept residues, never BOS or EOS, in fp32, one segment at a time: what a protein's sum is does not depend on
where it lies in the pack. The division comes in `combine`, when all windows of a protein are in.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_esm.config import Include
from dist_esm.records import Answer

Vectors = dict[tuple[Include, int], NDArray[Any]]
"""A protein's finished representations by kind and layer: mean and bos (D,), per_tok (L, D)."""


def pool(hidden: dict[int, Tensor], bounds: Sequence[int], keeps: Sequence[tuple[int, int]], wants_rows: bool) -> list[Answer]:
    """Reduce the hidden states of a pack.

    Parameters
    ----------
    hidden
        Layer to fp32 Tensor, shape (T, D).
    bounds
        B + 1 token offsets of the segments.
    keeps
        For each segment the first and one past the last residue to answer.
    wants_rows
        Whether to return the residues' own representations too.

    Returns
    -------
    list of B answers, on the host
    """
    sums, bos, rows = {}, {}, {}
    spans = [(start + 1 + first, start + 1 + stop) for start, (first, stop) in zip(bounds, keeps, strict=False)]
    for layer, x_TD in hidden.items():
        sums[layer] = torch.stack([x_TD[first:stop].sum(0) for first, stop in spans]).cpu().numpy()
        bos[layer] = x_TD[list(bounds[:-1])].cpu().numpy()
        rows[layer] = [x_TD[first:stop].cpu().numpy() for first, stop in spans] if wants_rows else []
    return [
        Answer(
            {layer: sums[layer][i] for layer in hidden},
            {layer: bos[layer][i] for layer in hidden},
            {layer: rows[layer][i] for layer in hidden} if wants_rows else {},
        )
        for i in range(len(keeps))
    ]


def combine(answers: Sequence[Answer], num_embedded: int, wanted: Sequence[tuple[Include, int]]) -> Vectors:
    """The segments of a protein as one: sums added in order and divided once, rows end to end, BOS of the first."""
    vectors: Vectors = {}
    for kind, layer in wanted:
        if kind is Include.mean:
            total = answers[0].sums[layer]
            for answer in answers[1:]:
                total = total + answer.sums[layer]
            vectors[kind, layer] = total / np.float32(num_embedded)
        elif kind is Include.bos:
            vectors[kind, layer] = answers[0].bos[layer]
        else:
            vectors[kind, layer] = answers[0].rows[layer] if len(answers) == 1 else np.concatenate([answer.rows[layer] for answer in answers])
    return vectors
