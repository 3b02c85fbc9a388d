"""Hidden states of a pack to one answer for each of its segments.

Sums are over the kept residues, never BOS or EOS, in fp32, one segment at a time: what a protein's sum is does not depend on
where it lies in the pack. The division comes later (`collect`), when all windows of a protein are in.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dist_esm.records import Answer


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
