"""The ``cublas`` and ``triton`` implementations of a block, and the passes that others share with them."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_esm.model.kernels import triton_ops
from dist_esm.model.kernels.linear import angles
from dist_esm.model.kernels.quantized import QuantizedLinear
from dist_esm.model.kernels.triton_products import product


class TritonPasses:
    """The steps between the products, a pass over memory each."""

    def prepare(self, linear: nn.Linear) -> None:
        """Leave them as they are."""

    def to_stream(self, x_TD: Tensor) -> Tensor:
        """Return the values in scaled fp16."""
        return triton_ops.to_stream(x_TD)

    def from_stream(self, x_TD: Tensor) -> Tensor:
        """Return a copy of the stream in fp32."""
        return triton_ops.from_stream(x_TD)

    def norm(self, x_TD: Tensor, norm: Any) -> Tensor:
        """Apply LayerNorm in one pass."""
        return triton_ops.norm(x_TD, norm.weight, norm.bias, norm.eps, norm.rounds_to)

    def segment_sum(self, x_TD: Tensor, starts_B: Tensor, stops_B: Tensor) -> Tensor:
        """Sum the rows of all segments in one launch."""
        return triton_ops.segment_sum(x_TD, starts_B, stops_B)

    def round_block(self, weight_CB: Tensor, factors_BB: Tensor, rounded_CB: Tensor) -> Tensor:
        """Round a block's columns in one launch."""
        return triton_ops.round_block(weight_CB, factors_BB, rounded_CB)


class CublasLinear(TritonPasses):
    """A block computed with cuBLAS products, and a pass for each step between them."""

    name = "cublas"
    interleaves = False
    any_rows = False
    bias_dtype: torch.dtype | None = None

    def rotary(self, positions_T: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine of each rotation; shape (T, H / 2)."""
        angles_TH = angles(positions_T, inv_freq)
        return angles_TH.cos(), angles_TH.sin()

    def qkv(
        self, h_TD: Tensor, linear: nn.Linear | QuantizedLinear, rotary: tuple[Tensor, Tensor], num_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Multiply by one matrix for all three, then rotate queries and keys in place."""
        qkv_TC = linear(h_TD)
        triton_ops.rotate_(qkv_TC, *rotary, 2 * num_heads)
        q_TNH, k_TNH, v_TNH = qkv_TC.view(len(h_TD), 3, num_heads, -1).unbind(1)
        return q_TNH, k_TNH, v_TNH

    def gelu(self, h_TD: Tensor, linear: nn.Linear | QuantizedLinear) -> Tensor:
        """Apply GELU to the rounded product in place."""
        return triton_ops.gelu_(linear(h_TD))

    def residual(
        self, x_TD: Tensor, h_TD: Tensor, linear: nn.Linear | QuantizedLinear, norm: Any | None
    ) -> tuple[Tensor, Tensor]:
        """Add the rounded product to the stream in place, in the pass that applies LayerNorm."""
        added_TD = F.linear(h_TD, linear.weight, linear.bias)
        if norm is None:
            return x_TD.add_(added_TD, alpha=triton_ops.SCALE), x_TD
        return x_TD, triton_ops.norm(x_TD, norm.weight, norm.bias, norm.eps, norm.rounds_to, added_TD)


class TritonLinear(TritonPasses):
    """A block computed with Triton's products, which include the step after them."""

    name = "triton"
    interleaves = True
    any_rows = True
    bias_dtype: torch.dtype | None = torch.float32
    qkv_dtype: torch.dtype | None = None
    """Dtype of queries, keys and values; None: that of the products' inputs."""

    def rotary(self, positions_T: Tensor, inv_freq: Tensor) -> Tensor:
        """Return cosine and sine of each pair that rotates side by side; shape (T, H)."""
        angles_TH = angles(positions_T, inv_freq)
        return torch.stack((angles_TH.cos(), angles_TH.sin()), -1).flatten(1)

    def qkv(
        self, h_TD: Tensor, linear: nn.Linear | QuantizedLinear, rotary: Tensor, num_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Multiply by one matrix for all three; queries and keys are rotated inside the product."""
        num_rows = len(h_TD)
        qkv_TC = h_TD.new_empty(num_rows, len(linear.weight), dtype=self.qkv_dtype)
        product("rotation", h_TD, linear.weight, linear.bias, qkv_TC, rotary)
        q_TNH, k_TNH, v_TNH = qkv_TC.view(num_rows, 3, num_heads, -1).unbind(1)
        return q_TNH, k_TNH, v_TNH

    def gelu(self, h_TD: Tensor, linear: nn.Linear | QuantizedLinear) -> Tensor:
        """Apply GELU inside the product."""
        out_TF = h_TD.new_empty(len(h_TD), len(linear.weight))
        product("gelu", h_TD, linear.weight, linear.bias, out_TF)
        return out_TF

    def residual(
        self, x_TD: Tensor, h_TD: Tensor, linear: nn.Linear | QuantizedLinear, norm: Any | None
    ) -> tuple[Tensor, Tensor]:
        """Add the product to the stream in place, inside the product."""
        product("residual", h_TD, linear.weight, linear.bias, x_TD)
        return x_TD, x_TD if norm is None else self.norm(x_TD, norm)
