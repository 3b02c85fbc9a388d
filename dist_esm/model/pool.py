"""Hidden states of a pack to one answer for each of its segments.

Sums are over the kept residues, never BOS or EOS, in fp32, one segment at a time: what a protein's sum is does not depend on
where it lies in the pack. The division comes in `combine`, when all windows of a protein are in.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dist_esm.config import Include
from dist_esm.types import SegmentEmbedding

ProteinEmbedding = dict[tuple[Include, int], NDArray[Any]]
"""A protein's finished representations by kind and layer: mean and bos (D,), per_tok (L, D)."""


def pool(
    hidden: dict[int, Tensor],
    bounds: Sequence[int],
    keeps: Sequence[tuple[int, int]],
    rows_dtype: torch.dtype | None,
) -> list[SegmentEmbedding]:
    """Reduce the hidden states of a pack.

    Parameters
    ----------
    hidden
        Layer to fp32 Tensor, shape (T, D).
    bounds
        Token offsets of the B segments, and of what comes after them.
    keeps
        For each segment the first and one past the last residue to answer.
    rows_dtype
        Of the residues' own representations; None: they are not wanted.

    Returns
    -------
    list of B answers, on the host
    """
    sums, bos, rows = {}, {}, {}
    spans = kept_rows(bounds, keeps)
    for layer, x_TD in hidden.items():
        sums[layer] = torch.stack([x_TD[first:stop].sum(0) for first, stop in spans]).cpu().numpy()
        bos[layer] = x_TD[list(bounds[: len(keeps)])].cpu().numpy()
        rows[layer] = (
            [x_TD[first:stop].to(rows_dtype).cpu().numpy() for first, stop in spans] if rows_dtype else []
        )
    return [
        SegmentEmbedding(
            {layer: sums[layer][i] for layer in hidden},
            {layer: bos[layer][i] for layer in hidden},
            {layer: rows[layer][i] for layer in hidden} if rows_dtype else {},
        )
        for i in range(len(keeps))
    ]


def kept_rows(bounds: Sequence[int], keeps: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """First and one past the last row of the kept residues of each segment; `bounds` and `keeps` as of `pool`."""
    return [
        (start + 1 + first, start + 1 + stop) for start, (first, stop) in zip(bounds, keeps, strict=False)
    ]


class GpuPool:
    """The same on a GPU, without waiting: reduced there in fp32; only what is wanted is copied, beside the next pack, into pinned memory.

    Parameters
    ----------
    hidden, rows_dtype
        As of `pool`.
    bos_B : int32 Tensor, shape (B,)
        Row of each segment's BOS, on the device.
    starts_B, stops_B : int32 Tensor, shape (B,)
        First and one past the last row of the kept residues of each segment, on the device.
    spans
        The same on the host.
    segment_sum
        Sums rows from `starts_B` up to `stops_B`.
    copies
        The stream of the copies to the host.
    """

    def __init__(
        self,
        hidden: dict[int, Tensor],
        bos_B: Tensor,
        starts_B: Tensor,
        stops_B: Tensor,
        spans: Sequence[tuple[int, int]],
        segment_sum: Callable[[Tensor, Tensor, Tensor], Tensor],
        rows_dtype: torch.dtype | None,
        copies: torch.cuda.Stream,
    ) -> None:
        self.spans = spans
        sums = {layer: segment_sum(x_TD, starts_B, stops_B) for layer, x_TD in hidden.items()}
        bos = {layer: x_TD[bos_B] for layer, x_TD in hidden.items()}
        rows = (
            {layer: x_TD[: spans[-1][1]].to(rows_dtype) for layer, x_TD in hidden.items()}
            if rows_dtype
            else {}
        )
        self.ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.ended.record()
        copies.wait_event(self.ended)
        with torch.cuda.stream(copies):
            self.sums, self.bos, self.rows = (
                {layer: to_host(x, copies) for layer, x in found.items()} for found in (sums, bos, rows)
            )
            self.copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self.copied.record()

    def answers(self) -> list[SegmentEmbedding]:
        """Wait for the copies; the arrays are views of them."""
        self.copied.synchronize()
        sums, bos, rows = (
            {layer: x.numpy() for layer, x in tensors.items()} for tensors in (self.sums, self.bos, self.rows)
        )
        return [
            SegmentEmbedding(
                {layer: x[i] for layer, x in sums.items()},
                {layer: x[i] for layer, x in bos.items()},
                {layer: x[first:stop] for layer, x in rows.items()},
            )
            for i, (first, stop) in enumerate(self.spans)
        ]


def to_host(x: Tensor, stream: torch.cuda.Stream) -> Tensor:
    """A copy into pinned memory that is there once the stream has come so far."""
    x.record_stream(stream)
    return torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)


def combine(
    answers: Sequence[SegmentEmbedding], num_embedded: int, wanted: Sequence[tuple[Include, int]]
) -> ProteinEmbedding:
    """The segments of a protein as one: sums added in order and divided once, rows end to end, BOS of the first."""
    vectors: ProteinEmbedding = {}
    for kind, layer in wanted:
        if kind is Include.mean:
            total = answers[0].sums[layer]
            for answer in answers[1:]:
                total = total + answer.sums[layer]
            vectors[kind, layer] = total / np.float32(num_embedded)
        elif kind is Include.bos:
            vectors[kind, layer] = answers[0].bos[layer]
        else:
            vectors[kind, layer] = (
                answers[0].rows[layer]
                if len(answers) == 1
                else np.concatenate([answer.rows[layer] for answer in answers])
            )
    return vectors
