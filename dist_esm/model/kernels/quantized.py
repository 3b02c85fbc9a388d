"""Linear layers whose products are of e4m3 numbers: 8 bits, of which 3 are after the point.

e4m3 reaches 448, and from 1/64 on it rounds by at most 1/16 of a number. So a factor for each output channel
is all that weights need, and a factor for a whole layer is all that inputs need. None depends on the input,
so a protein's bits do not depend on its company. `quantize` chooses them.

Source: Micikevicius et al. 2022, arXiv:2209.05433.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

E4M3 = torch.float8_e4m3fn
LARGEST = 448.0
"""The largest number of e4m3."""


class QuantizedLinear(nn.Module):
    """A linear layer that takes e4m3 numbers and returns ``(h_TK @ weight_CK.T) * factor_1C + bias_1C``.

    Parameters
    ----------
    weight_CK
        The weights in e4m3.
    factor_C
        Takes a product back to the size of the layer's outputs; fp32.
    bias_C
        The bias; fp32.
    input_scale
        By what the inputs are multiplied before they are rounded to e4m3.
    """

    weight: Tensor
    """e4m3, shape (C, K)."""
    factor: Tensor
    """fp32, shape (1, C)."""
    bias: Tensor
    """fp32, shape (1, C)."""
    half_gain: Tensor
    """Half of what the layer's GELU is multiplied by before it is rounded to e4m3; fp32, shape (1, C)."""

    def __init__(self, weight_CK: Tensor, factor_C: Tensor, bias_C: Tensor, input_scale: float) -> None:
        super().__init__()
        self.register_buffer("weight", weight_CK)
        self.register_buffer("factor", factor_C[None])
        self.register_buffer("bias", bias_C[None])
        self.register_buffer("half_gain", torch.full_like(self.bias, 0.5))
        self.input_scale = input_scale

    def forward(self, h_TK: Tensor) -> Tensor:
        """Return the layer's outputs, shape (T, C), summed in fp32, rounded to bf16."""
        return (h_TK.float() @ self.weight.float().T * self.factor + self.bias).bfloat16()

    def quantize(self, values_TC: Tensor) -> Tensor:
        """Return GELU's outputs scaled and rounded to e4m3, what is too large as NaN; shape (T, C)."""
        return to_e4m3(values_TC.float() * (2 * self.half_gain))


def to_e4m3(values: Tensor) -> Tensor:
    """Round fp32 numbers to e4m3. What is larger than 448 becomes NaN, as on every device it must."""
    return torch.where(values.abs() <= LARGEST, values, torch.nan).to(E4M3)
