"""The named implementations of attention. All take a pack, whole proteins laid end to end, and attend within each protein.

The softmax scale is part of the query's projection (`weights` folds it in), so scores are plain dot products here.

``triton``
    One launch of our own kernel (`triton_kernels.attend`) over tiles of `TILE` queries of one protein and head: CUDA, bf16 or fp16.
``sdpa``
    `torch.nn.functional.scaled_dot_product_attention`, one call for each protein: any device, any dtype, more launches.

Shape suffixes: T tokens of a pack, N heads, H head width, C tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

TILE = 64
"""Queries of a tile, and keys that are taken at once: few, since proteins are short and what reaches past their end is wasted."""


@dataclass(frozen=True)
class Seqlens:
    """Where each protein of a pack begins and ends, and after them each stretch of padding."""

    bounds: Sequence[int]
    """Token offsets on the host, one more than there are proteins and stretches."""
    tiles: Tensor
    """int32, shape (C, 3), on the device: for each tile its first row, and the first row of its protein and the one past its last."""

    @classmethod
    def of(cls, bounds: Sequence[int], device: torch.device) -> Seqlens:
        """From token offsets on the host."""
        return cls(bounds, torch.from_numpy(tiles(bounds)).to(device))


def tiles(bounds: Sequence[int]) -> NDArray[np.int32]:
    """The tiles of a pack, see `Seqlens`."""
    starts, stops = np.asarray(bounds[:-1]), np.asarray(bounds[1:])
    counts = -(-(stops - starts) // TILE)
    number = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts, stops = np.repeat(starts, counts), np.repeat(stops, counts)
    return np.stack((starts + number * TILE, starts, stops), 1).astype(np.int32)


AttentionFunction = Callable[[Tensor, Tensor, Tensor, Seqlens], Tensor]


def sdpa(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, seqlens: Seqlens) -> Tensor:
    """Attend within each protein by torch's own choice of kernel, one call for each."""
    out_TNH = torch.empty_like(q_TNH)
    for start, stop in pairwise(seqlens.bounds):
        q, k, v = (x[start:stop].transpose(0, 1).unsqueeze(0) for x in (q_TNH, k_TNH, v_TNH))
        out_TNH[start:stop] = F.scaled_dot_product_attention(q, k, v, scale=1.0).squeeze(0).transpose(0, 1)
    return out_TNH


def load_triton() -> AttentionFunction:
    """Our own kernel.

    Raises
    ------
    ImportError
        If triton is not installed.
    """
    from dist_esm.model.kernels import triton_ops as triton_kernels

    def attend(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, seqlens: Seqlens) -> Tensor:
        return triton_kernels.attend(q_TNH, k_TNH, v_TNH, seqlens.tiles, TILE)

    return attend
