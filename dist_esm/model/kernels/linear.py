"""All of a block but attention: matrix products and the steps between them, in several implementations.

``torch``
    torch's own operations, this module: any device, any dtype.
``cublas`` (`linear_triton`)
    cuBLAS for the products, a Triton pass for each step between them: CUDA, bf16 or fp16.
``triton`` (`linear_triton`; fp32: `linear_pairs`)
    Triton products with GELU, rotation and residual inside: CUDA, bf16, fp16 or fp32.
``quack`` (`linear_quack`)
    CuTe products of the package quack-kernels with GELU, rotation and residual inside: Hopper, bf16 or fp16.

LayerNorm, GELU, rotation and every sum run in fp32 in all of them; a product's inputs are rounded to its
dtype. Between blocks ``torch``, and ``triton`` in fp32, keep the residual stream in fp32. The others keep it
in fp16, scaled so that it reaches 4 million: 8 times finer than bf16, and half the traffic of fp32. A stream
that goes beyond is not finite, and the engine computes that protein again in fp32.

Shape suffixes: T tokens of a pack, N heads, H head width, D model width, B proteins.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_esm.model.kernels.quantized import E4M3, QuantizedLinear, to_e4m3
from dist_esm.model.kernels.rounding import round_block


class LinearOps(Protocol):
    """A way to compute a block."""

    name: str
    interleaves: bool
    """True if the two numbers that rotate against each other lie side by side in queries and keys; False if
    they lie half a head apart."""
    any_rows: bool
    """True if a row's bits do not depend on the number of rows: then a pack may have fewer."""
    bias_dtype: torch.dtype | None
    """Dtype of the products' biases; None: that of their weights."""

    def prepare(self, linear: nn.Linear) -> None:
        """Bring a product's parameters, in the products' dtype, into the form that the methods below take."""

    def rotary(self, positions_T: Tensor, inv_freq: Tensor) -> Any:
        """Return what `qkv` needs to rotate queries and keys; computed once for a pack."""

    def to_stream(self, x_TD: Tensor) -> Tensor:
        """Return fp32 values in the form in which this implementation keeps the residual stream."""

    def from_stream(self, x_TD: Tensor) -> Tensor:
        """Return the residual stream in fp32 or wider; later changes to the stream do not reach it."""

    def norm(self, x_TD: Tensor, norm: Any) -> Tensor:
        """Return the LayerNorm of the residual stream, computed in fp32, rounded to `norm.rounds_to`."""

    def qkv(
        self, h_TD: Tensor, linear: nn.Linear | QuantizedLinear, rotary: Any, num_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries and keys, both rotated, and values; each of shape (T, N, H)."""

    def gelu(self, h_TD: Tensor, linear: nn.Linear | QuantizedLinear) -> Tensor:
        """Return the exact GELU of a product."""

    def residual(
        self, x_TD: Tensor, h_TD: Tensor, linear: nn.Linear | QuantizedLinear, norm: Any | None
    ) -> tuple[Tensor, Tensor]:
        """Add a product to the residual stream; return the stream, and its LayerNorm, as `norm` does.

        `x_TD` may be overwritten. Without `norm` the stream is returned twice.
        """

    def segment_sum(self, x_TD: Tensor, starts_B: Tensor, stops_B: Tensor) -> Tensor:
        """Sum rows `starts_B[i]` up to `stops_B[i]`; shape (B, D). A sum depends on its own rows alone."""

    def round_block(self, weight_CB: Tensor, factors_BB: Tensor, rounded_CB: Tensor) -> Tensor:
        """Round weights to e4m3, see `rounding.RoundBlock`."""


def angles(positions_T: Tensor, inv_freq: Tensor) -> Tensor:
    """Return the rotation of each token in radians, in the dtype of `inv_freq`; shape (T, H / 2).

    Source: Su et al. 2021, arXiv:2104.09864.
    """
    return torch.outer(positions_T.to(inv_freq.dtype), inv_freq)


class TorchLinear:
    """A block computed with torch's own operations."""

    name = "torch"
    interleaves = False
    any_rows = False
    bias_dtype: torch.dtype | None = None

    def prepare(self, linear: nn.Linear) -> None:
        """Leave them as they are."""

    def rotary(self, positions_T: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of each rotation; shape (T, 1, H)."""
        angles_T1H = angles(positions_T, inv_freq).repeat(1, 2).unsqueeze(1)
        return angles_T1H.cos(), angles_T1H.sin()

    def to_stream(self, x_TD: Tensor) -> Tensor:
        """Return the values as they are: the stream is kept in their dtype."""
        return x_TD

    def from_stream(self, x_TD: Tensor) -> Tensor:
        """Return the stream itself: `residual` makes a new one and never changes it."""
        return x_TD

    def norm(self, x_TD: Tensor, norm: Any) -> Tensor:
        """Apply torch's LayerNorm in the stream's dtype, then round."""
        h_TD: Tensor = norm(x_TD)
        return to_e4m3(h_TD) if norm.rounds_to is E4M3 else h_TD.to(norm.rounds_to)

    def qkv(
        self, h_TD: Tensor, linear: nn.Linear | QuantizedLinear, rotary: tuple[Tensor, Tensor], num_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Multiply by one matrix for all three, then rotate queries and keys."""
        q_TNH, k_TNH, v_TNH = linear(h_TD).view(len(h_TD), 3, num_heads, -1).unbind(1)
        return rotate(q_TNH, *rotary), rotate(k_TNH, *rotary), v_TNH

    def gelu(self, h_TD: Tensor, linear: nn.Linear | QuantizedLinear) -> Tensor:
        """Apply torch's erf GELU to the rounded product."""
        values_TF = F.gelu(linear(h_TD))
        return linear.quantize(values_TF) if isinstance(linear, QuantizedLinear) else values_TF

    def residual(
        self, x_TD: Tensor, h_TD: Tensor, linear: nn.Linear | QuantizedLinear, norm: Any | None
    ) -> tuple[Tensor, Tensor]:
        """Add the rounded product in the stream's dtype, into new memory."""
        x_TD = x_TD + linear(h_TD)
        return x_TD, x_TD if norm is None else self.norm(x_TD, norm)

    def segment_sum(self, x_TD: Tensor, starts_B: Tensor, stops_B: Tensor) -> Tensor:
        """Sum the rows of each segment by a call of its own."""
        return torch.stack(
            [x_TD[start:stop].sum(0) for start, stop in zip(starts_B.tolist(), stops_B.tolist(), strict=True)]
        )

    def round_block(self, weight_CB: Tensor, factors_BB: Tensor, rounded_CB: Tensor) -> Tensor:
        """Round column after column."""
        return round_block(weight_CB, factors_BB, rounded_CB)


def rotate(x_TNH: Tensor, cos_T1H: Tensor, sin_T1H: Tensor) -> Tensor:
    """Apply rotary position embeddings in fp32 or wider: a head's first half rotates against its second."""
    first, second = x_TNH.to(cos_T1H.dtype).chunk(2, dim=-1)
    return (
        torch.cat((first, second), -1)
        .mul(cos_T1H)
        .addcmul_(torch.cat((-second, first), -1), sin_T1H)
        .to(x_TNH.dtype)
    )
