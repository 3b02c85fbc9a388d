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
from dist_esm.model.kernels.linear_triton import TritonLinear
from dist_esm.model.kernels.quantized import QuantizedLinear
from dist_esm.model.kernels.triton_products import product


class PairsLinear(TritonLinear):
    """A block computed with Triton's products of pairs."""

    bias_dtype: torch.dtype | None = None
    qkv_dtype: torch.dtype | None = torch.float32

    def prepare(self, linear: nn.Linear) -> None:
        """Put pairs in place of a weight, (C, 2 D), and what undoes their scales beside the bias, (2, C)."""
        pairs, gain = triton_pairs.weight_pairs(linear.weight)
        linear.weight = nn.Parameter(pairs, requires_grad=False)
        linear.bias = nn.Parameter(torch.stack((linear.bias, gain)), requires_grad=False)

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
        return super().residual(x_TD, h_TD, linear, norm)
