"""The ``triton`` implementation of a block: cuBLAS products, and one pass over memory for each step between them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dist_esm.model.kernels import triton_ops as triton_kernels
from dist_esm.model.kernels.linear import angles


class TritonPasses:
    """What lies between the products, one pass over memory each."""

    def enter(self, x_TD: Tensor) -> Tensor:
        """See `LinearOps`."""
        return triton_kernels.enter(x_TD)

    def leave(self, x_TD: Tensor) -> Tensor:
        """See `LinearOps`."""
        return triton_kernels.leave(x_TD)

    def norm(self, x_TD: Tensor, norm: nn.LayerNorm, dtype: torch.dtype) -> Tensor:
        """See `LinearOps`."""
        return triton_kernels.norm(x_TD, norm.weight, norm.bias, norm.eps, dtype)

    def segment_sum(self, x_TD: Tensor, starts_B: Tensor, stops_B: Tensor) -> Tensor:
        """See `LinearOps`."""
        return triton_kernels.segment_sum(x_TD, starts_B, stops_B)


class TritonLinear(TritonPasses):
    """cuBLAS and Triton."""

    name = "triton"
    interleaves = False
    any_rows = False
    bias_dtype: torch.dtype | None = None

    def rotary(self, positions_T: Tensor, inv_freq: Tensor) -> tuple[Tensor, Tensor]:
        """Cosine and sine, shape (T, H / 2)."""
        angles_TH = angles(positions_T, inv_freq)
        return angles_TH.cos(), angles_TH.sin()

    def qkv(
        self, h_TD: Tensor, linear: nn.Linear, rotary: tuple[Tensor, Tensor], num_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See `LinearOps`."""
        qkv_TC = linear(h_TD)
        triton_kernels.rotate_(qkv_TC, *rotary, 2 * num_heads)
        q_TNH, k_TNH, v_TNH = qkv_TC.view(len(h_TD), 3, num_heads, -1).unbind(1)
        return q_TNH, k_TNH, v_TNH

    def gelu(self, h_TD: Tensor, linear: nn.Linear) -> Tensor:
        """See `LinearOps`."""
        return triton_kernels.gelu_(linear(h_TD))

    def residual(
        self, x_TD: Tensor, h_TD: Tensor, linear: nn.Linear, norm: nn.LayerNorm | None
    ) -> tuple[Tensor, Tensor]:
        """See `LinearOps`."""
        added_TD = F.linear(h_TD, linear.weight, linear.bias)
        if norm is None:
            return x_TD.add_(added_TD, alpha=triton_kernels.SCALE), x_TD
        return x_TD, triton_kernels.norm(x_TD, norm.weight, norm.bias, norm.eps, added_TD.dtype, added_TD)
