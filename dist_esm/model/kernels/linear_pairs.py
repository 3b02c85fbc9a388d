"""The ``triton`` implementation of a block in fp32: each product as three of fp16, on the tensor cores.

An fp32 number is kept as a pair of fp16 numbers, its first 11 bits and the next 11 (`triton_pairs.pair_of`).
A product takes the three largest of the four products of pairs (`triton_products`); its error is that of
fp32. Everything between products is fp32, and so is the residual stream.

A number beyond 16 thousand does not fit a pair. What comes of it is not finite, and the engine computes that
protein again in fp64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from dist_esm.model.kernels import triton_pairs
from dist_esm.model.kernels.linear_triton import TritonPasses, rotation_table
from dist_esm.model.kernels.quantized import QuantizedLinear
from dist_esm.model.kernels.triton_products import product


class PairsLinear(TritonPasses):
    """A block computed with Triton's products of pairs."""

    name = "triton"
    interleaves = True
    any_rows = True
    bias_dtype: torch.dtype | None = None

    def prepare(self, linear: nn.Linear) -> None:
        """Put pairs in place of a weight, (C, 2 D), and what undoes their scales beside the bias, (2, C)."""
        pairs, gain = triton_pairs.weight_pairs(linear.weight)
        linear.weight = nn.Parameter(pairs, requires_grad=False)
        linear.bias = nn.Parameter(torch.stack((linear.bias, gain)), requires_grad=False)

    def rotary(self, positions_T: Tensor, inv_freq: Tensor) -> Tensor:
        """Return cosine and sine of each pair that rotates side by side; shape (T, H)."""
        return rotation_table(positions_T, inv_freq)

    def to_stream(self, x_TD: Tensor) -> Tensor:
        """Return the fp32 values as they are."""
        return x_TD

    def from_stream(self, x_TD: Tensor) -> Tensor:
        """Return a copy of the stream."""
        return x_TD.clone()

    def norm(self, x_TD: Tensor, norm: Any) -> Tensor:
        """Apply LayerNorm in one pass; for the products, whose weights are fp16, it writes pairs."""
        is_for_product = norm.rounds_to is torch.float16
        return triton_pairs.norm(x_TD, norm.weight, norm.bias, norm.eps, pairs=is_for_product)

    def qkv(
        self, h_TD: Tensor, linear: nn.Linear | QuantizedLinear, rotary: Tensor, num_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Multiply by one matrix for all three; queries and keys are rotated inside the product."""
        num_rows = len(h_TD)
        qkv_TC = h_TD.new_empty(num_rows, len(linear.weight), dtype=torch.float32)
        product("rotation", h_TD, linear.weight, linear.bias, qkv_TC, rotary)
        q_TNH, k_TNH, v_TNH = qkv_TC.view(num_rows, 3, num_heads, -1).unbind(1)
        return q_TNH, k_TNH, v_TNH

    def gelu(self, h_TD: Tensor, linear: nn.Linear | QuantizedLinear) -> Tensor:
        """Apply GELU inside the product, which writes pairs."""
        out_TF = h_TD.new_empty(len(h_TD), 2 * len(linear.weight))
        product("gelu", h_TD, linear.weight, linear.bias, out_TF)
        return out_TF

    def residual(
        self, x_TD: Tensor, h_TD: Tensor, linear: nn.Linear | QuantizedLinear, norm: Any | None
    ) -> tuple[Tensor, Tensor]:
        """Add the product to the stream in place, inside the product."""
        if h_TD.dtype is torch.float32:  # attention's answer
            h_TD = triton_pairs.to_pairs(h_TD)
        product("residual", h_TD, linear.weight, linear.bias, x_TD)
        return x_TD, x_TD if norm is None else self.norm(x_TD, norm)
