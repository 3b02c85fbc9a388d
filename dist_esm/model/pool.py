"""Reduce the hidden states of a pack to one embedding for each of its segments.

Sums run over the kept residues, never over BOS or EOS, in fp32, one segment at a time. So a protein's sum
does not depend on its place in the pack. `combine` divides once all windows of a protein are there.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

from dist_esm.config import Include
from dist_esm.types import ProteinEmbedding, SegmentEmbedding


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
        For each segment the first residue to return and the one past the last.
    rows_dtype
        Dtype of the per-residue representations; None: they are not wanted.

    Returns
    -------
    list of B embeddings, on the host
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
            rows_dtype is not torch.float16 or all(np.isfinite(rows[layer][i]).all() for layer in hidden),
        )
        for i in range(len(keeps))
    ]


def kept_rows(bounds: Sequence[int], keeps: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Return the first row of the kept residues of each segment and the one past the last.

    Parameters
    ----------
    bounds, keeps
        As for `pool`.
    """
    return [
        (start + 1 + first, start + 1 + stop) for start, (first, stop) in zip(bounds, keeps, strict=False)
    ]


class GpuPool:
    """The embeddings of a pack on their way off the GPU; nothing waits until `segment_embeddings` is called.

    Hidden states are reduced on the GPU in fp32. Only the wanted representations are copied, into pinned
    memory, while the next pack runs.

    Parameters
    ----------
    hidden, rows_dtype
        As for `pool`.
    bos_B : int32 Tensor, shape (B,)
        Row of each segment's BOS, on the device.
    starts_B, stops_B : int32 Tensor, shape (B,)
        First row of the kept residues of each segment and the one past the last, on the device.
    spans
        The same rows on the host.
    segment_sum
        Sums the rows from `starts_B` up to `stops_B`.
    copies
        The stream for the copies to the host.
    most_rows
        Rows of the largest pack so far.
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
        most_rows: int,
    ) -> None:
        self.spans = spans
        sums = {layer: segment_sum(x_TD, starts_B, stops_B) for layer, x_TD in hidden.items()}
        bos = {layer: x_TD[bos_B] for layer, x_TD in hidden.items()}
        rows = (
            {layer: x_TD[: spans[-1][1]].to(rows_dtype) for layer, x_TD in hidden.items()}
            if rows_dtype
            else {}
        )
        fit = {layer: x_TD.isfinite().all(1) for layer, x_TD in rows.items() if rows_dtype is torch.float16}
        self.ended = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        self.ended.record()
        copies.wait_event(self.ended)
        with torch.cuda.stream(copies):
            self.sums, self.bos, self.rows, self.fit = (
                {layer: to_host(x, copies, room) for layer, x in tensors.items()}
                for tensors, room in ((sums, 0), (bos, 0), (rows, most_rows), (fit, most_rows))
            )
            self.copied = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self.copied.record()

    def segment_embeddings(self) -> list[SegmentEmbedding]:
        """Wait for the copies, and return each segment's embedding; its arrays are views of them."""
        self.copied.synchronize()
        sums, bos, rows, fit = (
            {layer: x.numpy() for layer, x in tensors.items()}
            for tensors in (self.sums, self.bos, self.rows, self.fit)
        )
        return [
            SegmentEmbedding(
                {layer: x[i] for layer, x in sums.items()},
                {layer: x[i] for layer, x in bos.items()},
                {layer: x[first:stop] for layer, x in rows.items()},
                all(x_T[first:stop].all() for x_T in fit.values()),
            )
            for i, (first, stop) in enumerate(self.spans)
        ]


def to_host(x: Tensor, stream: torch.cuda.Stream, room: int = 0) -> Tensor:
    """Start a copy into pinned memory; it is complete once the stream has passed this point.

    The memory has room for so many rows, if that is less than eight times as many. torch takes memory again
    for the same size only, and to pin more for a smaller one may take as long as the pack.
    """
    x.record_stream(stream)
    num_rows = room if len(x) < room < 8 * len(x) else len(x)
    memory = torch.empty((num_rows, *x.shape[1:]), dtype=x.dtype, pin_memory=True)
    return memory[: len(x)].copy_(x, non_blocking=True)


def combine(
    segments: Sequence[SegmentEmbedding], num_embedded: int, wanted: Sequence[tuple[Include, int]]
) -> ProteinEmbedding:
    """Combine the segments of a protein: add sums in order and divide once, join rows, take the first BOS.

    Parameters
    ----------
    segments
        All segments of the protein, in order.
    num_embedded
        Residues that the sums cover.
    wanted
        Representations and layers to return.
    """
    protein: ProteinEmbedding = {}
    for include, layer in wanted:
        if include is Include.mean:
            total = segments[0].sums[layer]
            for segment in segments[1:]:
                total = total + segment.sums[layer]
            protein[include, layer] = total / np.float32(num_embedded)
        elif include is Include.bos:
            protein[include, layer] = segments[0].bos[layer]
        else:
            protein[include, layer] = (
                segments[0].rows[layer]
                if len(segments) == 1
                else np.concatenate([segment.rows[layer] for segment in segments])
            )
    return protein
