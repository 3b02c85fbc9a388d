"""The named implementations of attention. All take a pack, whole proteins laid end to end, and attend within each protein.

Every row belongs to a protein or to a stretch of padding that is laid out like one: tiles reach past a protein's end, where what is
masked must still be finite.

The softmax scale is part of the query's projection (`weights` folds it in), so scores are plain dot products here.

``flash4``
    FlashAttention-4 (package flash-attn-4): Hopper or newer, bf16 or fp16, heads of 64 or 128.
``varlen``
    FlashAttention-2 over ``cu_seqlens``, as shipped in torch (`torch.nn.attention.varlen`): CUDA, bf16 or fp16.
``sdpa``
    `torch.nn.functional.scaled_dot_product_attention`, one call for each protein: any device, any dtype, more launches.

Shape suffixes: T tokens of a pack, B proteins, N heads, H head width.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Seqlens:
    """Where each protein of a pack begins and ends, and after them each stretch of padding."""

    bounds: list[int]
    """B + 1 token offsets on the host."""
    cu_seqlens: Tensor
    """The same as int32 on the device, FlashAttention's ``cu_seqlens``."""
    max_seqlen: int
    """Tokens of the longest protein."""

    @classmethod
    def of(cls, bounds: list[int], device: torch.device) -> Seqlens:
        """From token offsets on the host."""
        return cls(bounds, torch.tensor(bounds, dtype=torch.int32, device=device), longest(bounds))


def longest(bounds: list[int]) -> int:
    """Tokens of the longest protein between offsets."""
    return max(stop - start for start, stop in pairwise(bounds))


FLASH4_CACHE = "FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED"
"""Environment variable that has FlashAttention-4 keep its compiled kernels on disk; read when it is imported."""
AttentionFunction = Callable[[Tensor, Tensor, Tensor, Seqlens], Tensor]


def sdpa(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, seqlens: Seqlens) -> Tensor:
    """Attend within each protein by torch's own choice of kernel, one call for each."""
    out_TNH = torch.empty_like(q_TNH)
    for start, stop in pairwise(seqlens.bounds):
        q, k, v = (x[start:stop].transpose(0, 1).unsqueeze(0) for x in (q_TNH, k_TNH, v_TNH))
        out_TNH[start:stop] = F.scaled_dot_product_attention(q, k, v, scale=1.0).squeeze(0).transpose(0, 1)
    return out_TNH


def varlen(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, seqlens: Seqlens) -> Tensor:
    """Attend within each protein in one FlashAttention-2 launch."""
    from torch.nn.attention.varlen import varlen_attn

    cu, most = seqlens.cu_seqlens, seqlens.max_seqlen
    out_TNH = varlen_attn(q_TNH, k_TNH, v_TNH, cu, cu, most, most, scale=1.0)
    assert isinstance(out_TNH, Tensor)
    return out_TNH


def load_flash4() -> AttentionFunction:
    """FlashAttention-4 in one launch; its kernels are compiled once and kept on disk.

    Raises
    ------
    ImportError
        If flash-attn-4 is not installed.
    """
    os.environ.setdefault(FLASH4_CACHE, "1")
    from flash_attn.cute.interface import flash_attn_varlen_func

    def flash4(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, seqlens: Seqlens) -> Tensor:
        cu, most = seqlens.cu_seqlens, seqlens.max_seqlen
        out_TNH = flash_attn_varlen_func(
            q_TNH, k_TNH, v_TNH, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=most, max_seqlen_k=most, softmax_scale=1.0, num_splits=1
        )
        out_TNH = out_TNH[0] if isinstance(out_TNH, tuple) else out_TNH
        assert isinstance(out_TNH, Tensor)
        return out_TNH

    return flash4
