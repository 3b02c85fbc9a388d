"""Everything of a block but attention, as one interface with three implementations: matrix products and what is fused to them.

``torch``
    torch's own operations, this module: any device, any dtype.
``triton`` (`linear_triton`)
    cuBLAS for the products, one Triton pass for what lies between them: CUDA, bf16 or fp16.
``quack`` (`linear_quack`)
    CuTe products of the package quack-kernels with GELU, rotation and residual inside: Hopper, bf16 or fp16.

LayerNorm, GELU, rotation and every sum run in fp32 in all of them; a product's inputs are rounded to its dtype. Between blocks the
residual stream is kept in fp32 by ``torch``; by the other two in fp16, scaled so that it reaches 4 million: 8 times finer than bf16,
and half of fp32's traffic. A stream that goes beyond is not finite, and the engine computes that protein again in fp32.

Shape suffixes: T tokens of a pack, N heads, H head width, D model width, B proteins.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class LinearOps(Protocol):
    """One way to compute a block."""

    name: str
    interleaves: bool
    """Queries and keys hold the two numbers that are rotated against each other side by side, not half a head apart."""
    any_rows: bool
    """A row's bits do not depend on the number of rows: a pack that is not full may have fewer."""
    bias_dtype: torch.dtype | None
    """Of the products' biases; None: that of their weights."""

    def rotary(self, positions_T: Tensor, inv_freq: Tensor) -> Any:
        """What `qkv` needs to turn queries and keys: computed once for a pack, shared by all layers."""

    def enter(self, x_TD: Tensor) -> Tensor:
        """The residual stream as this implementation keeps it, from fp32."""

    def leave(self, x_TD: Tensor) -> Tensor:
        """The residual stream in fp32 or wider, on its own memory."""

    def norm(self, x_TD: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> Tensor:
        """LayerNorm of the residual stream, in fp32, rounded to `dtype`."""

    def qkv(
        self, h_TD: Tensor, linear: nn.Linear, rotary: Any, num_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, rotated, and values; each of shape (T, N, H)."""

    def gelu(self, h_TD: Tensor, linear: nn.Linear) -> Tensor:
        """Exact GELU of a product."""

    def residual(
        self, x_TD: Tensor, h_TD: Tensor, linear: nn.Linear, norm: nn.LayerNorm | None
    ) -> tuple[Tensor, Tensor]:
        """The residual stream with a product added, which may overwrite `x_TD`, and its LayerNorm in the product's dtype; without one, twice the stream."""

    def segment_sum(self, x_TD: Tensor, starts_B: Tensor, stops_B: Tensor) -> Tensor:
        """Sums of rows `starts_B[i]` up to `stops_B[i]`, shape (B, D); each depends on its own rows alone."""


def angles(positions_T: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotation of each token, in radians, in the dtype of `inv_freq`, shape (T, H / 2). Source: Su et al. 2021, arXiv:2104.09864."""
    return torch.outer(positions_T.to(inv_freq.dtype), inv_freq)


class TorchLinear:
    """torch's own operations."""

    name = "torch"
    interleaves = False
    any_rows = False
    bias_dtype: torch.dtype | None = None

    def rotary(self, positions_T: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, shape (T, 1, H)."""
        angles_T1H = angles(positions_T, inv_freq).repeat(1, 2).unsqueeze(1)
        return angles_T1H.cos(), angles_T1H.sin()

    def enter(self, x_TD: Tensor) -> Tensor:
        """See `LinearOps`."""
        return x_TD

    def leave(self, x_TD: Tensor) -> Tensor:
        """See `LinearOps`."""
        return x_TD

    def norm(self, x_TD: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> Tensor:
        """See `LinearOps`."""
        h_TD: Tensor = norm(x_TD)
        return h_TD.to(dtype)

    def qkv(
        self, h_TD: Tensor, linear: nn.Linear, rotary: tuple[Tensor, Tensor], num_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `LinearOps`."""
        q_TNH, k_TNH, v_TNH = linear(h_TD).view(len(h_TD), 3, num_heads, -1).unbind(1)
        return rotate(q_TNH, *rotary), rotate(k_TNH, *rotary), v_TNH

    def gelu(self, h_TD: Tensor, linear: nn.Linear) -> Tensor:
        """See `LinearOps`."""
        return F.gelu(linear(h_TD))

    def residual(
        self, x_TD: Tensor, h_TD: Tensor, linear: nn.Linear, norm: nn.LayerNorm | None
    ) -> tuple[Tensor, Tensor]:
        """See `LinearOps`."""
        x_TD = x_TD + linear(h_TD)
        return x_TD, x_TD if norm is None else self.norm(x_TD, norm, linear.weight.dtype)

    def segment_sum(self, x_TD: Tensor, starts_B: Tensor, stops_B: Tensor) -> Tensor:
        """See `LinearOps`."""
        return torch.stack(
            [x_TD[start:stop].sum(0) for start, stop in zip(starts_B.tolist(), stops_B.tolist(), strict=True)]
        )


def rotate(x_TNH: Tensor, cos_T1H: Tensor, sin_T1H: Tensor) -> Tensor:
    """Apply rotary position embeddings in fp32 or wider: the first half of each head is turned against the second."""
    first, second = x_TNH.to(cos_T1H.dtype).chunk(2, dim=-1)
    return (
        torch.cat((first, second), -1)
        .mul(cos_T1H)
        .addcmul_(torch.cat((-second, first), -1), sin_T1H)
        .to(x_TNH.dtype)
    )
