"""The named implementations of attention. All take a pack and attend within each of its proteins.

The softmax scale is part of the query's projection (`weights` folds it in), so scores are plain dot products
here.

``triton``
    Our own kernel (`triton_ops.attend`), a single launch over tiles of `TILE` queries: CUDA, not in fp64.
``sdpa``
    `torch.nn.functional.scaled_dot_product_attention`, a call for each protein: any device and dtype, more
    launches. cuDNN's is left out: over proteins of many lengths it took 4 to 7 times as long (LOG.md).

Shape suffixes: T tokens of a pack, N heads, H head width, C tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from dist_esm.model.kernels.quantized import to_e4m3

TILE = 64
"""Queries of a tile, and keys that are taken at once. Few, since proteins are short: the part of a tile that
reaches past a protein's end is wasted."""


BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


@dataclass(frozen=True)
class Seqlens:
    """Where each protein of a pack begins and ends, and after them each stretch of padding."""

    bounds: Sequence[int]
    """Token offsets on the host, one more than there are proteins and stretches."""
    tiles: Tensor
    """int32, shape (C, 3), on the device: each tile's first row, its protein's first row and last row + 1."""

    @classmethod
    def of(cls, bounds: Sequence[int], device: torch.device) -> Seqlens:
        """Make them from token offsets on the host."""
        return cls(bounds, torch.from_numpy(tiles(bounds)).to(device))


def tiles(bounds: Sequence[int]) -> NDArray[np.int32]:
    """Return the tiles of a pack as `Seqlens.tiles` holds them, on the host."""
    starts, stops = np.asarray(bounds[:-1]), np.asarray(bounds[1:])
    counts = -(-(stops - starts) // TILE)
    index_in_protein = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
    starts, stops = np.repeat(starts, counts), np.repeat(stops, counts)
    return np.stack((starts + index_in_protein * TILE, starts, stops), 1).astype(np.int32)


AttentionFunction = Callable[[Tensor, Tensor, Tensor, Seqlens, float | None], Tensor]
"""Takes queries, keys and values of a pack, where its proteins are, and by what the result is multiplied
before it is rounded to e4m3; None: it stays in the dtype of the values."""


def sdpa(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, seqlens: Seqlens, scale: float | None = None) -> Tensor:
    """Attend within each protein by torch's own choice of kernel, a call for each."""
    out_TNH = torch.empty_like(q_TNH)
    # It holds for all threads of the process; on a GPU only one computes.
    with sdpa_kernel(BACKENDS) if q_TNH.is_cuda else nullcontext():
        for start, stop in pairwise(seqlens.bounds):
            q, k, v = (x[start:stop].transpose(0, 1).unsqueeze(0) for x in (q_TNH, k_TNH, v_TNH))
            out_TNH[start:stop] = F.scaled_dot_product_attention(q, k, v, scale=1.0)[0].transpose(0, 1)
    return out_TNH if scale is None else to_e4m3(out_TNH.float() * scale)


def load_triton() -> AttentionFunction:
    """Import our own kernel and return it.

    Raises
    ------
    ImportError
        If triton is not installed.
    """
    from dist_esm.model.kernels import triton_ops

    def attend(
        q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, seqlens: Seqlens, scale: float | None = None
    ) -> Tensor:
        return triton_ops.attend(q_TNH, k_TNH, v_TNH, seqlens.tiles, TILE, scale)

    return attend
