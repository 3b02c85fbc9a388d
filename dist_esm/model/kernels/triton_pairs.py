"""fp32 numbers as pairs of fp16 numbers, which tensor cores multiply: what makes them, and LayerNorm in fp32.

A pair holds the first 11 bits of a number and the next 11. Of the four products of two pairs the three
largest are taken: their error is that of fp32. Source: Ootomo and Yokota 2022, doi:10.1177/10943420221090256.

A row of D numbers is kept as 2 D: first parts, then second parts.
"""

# mypy: ignore-errors
# Triton traces its kernels and does not run them: their values have not the types that Python sees.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

PAIR_SCALE = tl.constexpr(4.0)
"""Inputs of products are kept times this: they reach 16 thousand, to 22 bits or 4e-9. What goes beyond is not
finite as a pair."""


@triton.jit
def pair_of(values):
    """Return two fp16 numbers whose sum is the fp32 number to 22 bits, or to 3e-8 where it is small."""
    high = values.to(tl.float16)
    return high, (values - high.to(tl.float32)).to(tl.float16)


@triton.jit
def dot_of_pairs(a, b):
    """Multiply two fp32 tiles as pairs."""
    a_high, a_low = pair_of(a)
    b_high, b_low = pair_of(b)
    return tl.dot(a_high, b_high, tl.dot(a_high, b_low, tl.dot(a_low, b_high)))


@triton.jit
def _to_pairs(x, out, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < width
    high, low = pair_of(tl.load(x + row * width + columns, mask=inside, other=0.0) * PAIR_SCALE)
    tl.store(out + row * 2 * width + columns, high, mask=inside)
    tl.store(out + (row * 2 + 1) * width + columns, low, mask=inside)


def to_pairs(x_TD: Tensor) -> Tensor:
    """Return fp32 values, times `PAIR_SCALE`, as pairs; shape (T, 2 D)."""
    num_rows, width = x_TD.shape
    out_TD = x_TD.new_empty(num_rows, 2 * width, dtype=torch.float16)
    block = 1024
    _to_pairs[(num_rows, triton.cdiv(width, block))](x_TD, out_TD, width, BLOCK=block, num_warps=4)
    return out_TD


def weight_pairs(weight_CD: Tensor) -> tuple[Tensor, Tensor]:
    """Return a weight as pairs, and what undoes their scales and that of the inputs: (C, 2 D) and (C,).

    A power of two brings the largest of each row to 256 at most, so that small rows lose nothing.
    """
    most_C1 = weight_CD.abs().amax(1, keepdim=True).clamp_min(2.0**-60)
    scale_C1 = torch.exp2(8 - torch.ceil(torch.log2(most_C1)))
    scaled_CD = weight_CD * scale_C1
    high_CD = scaled_CD.half()
    pairs = torch.cat((high_CD, (scaled_CD - high_CD.float()).half()), 1)
    return pairs, (1 / (scale_C1 * PAIR_SCALE.value)).flatten()


@triton.jit
def _norm(x, weight, bias, out, width, eps, BLOCK: tl.constexpr, PAIRS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * width + columns, mask=inside, other=0.0)
    mean = tl.sum(values, 0) / width
    centred = tl.where(inside, values - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    gain = tl.load(weight + columns, mask=inside, other=0.0)
    shift = tl.load(bias + columns, mask=inside, other=0.0)
    normed = centred * rstd * gain + shift
    if PAIRS:
        high, low = pair_of(normed * PAIR_SCALE)
        tl.store(out + row * 2 * width + columns, high, mask=inside)
        tl.store(out + (row * 2 + 1) * width + columns, low, mask=inside)
    else:
        tl.store(out + row * width + columns, normed, mask=inside)


def norm(x_TD: Tensor, weight_D: Tensor, bias_D: Tensor, eps: float, pairs: bool) -> Tensor:
    """Return the LayerNorm of an fp32 stream in fp32, shape (T, D), or as pairs, (T, 2 D)."""
    num_rows, width = x_TD.shape
    out_TD = x_TD.new_empty(num_rows, 2 * width, dtype=torch.float16) if pairs else torch.empty_like(x_TD)
    block = triton.next_power_of_2(width)
    warps = max(1, min(16, block // 512))
    _norm[(num_rows,)](x_TD, weight_D, bias_D, out_TD, width, eps, BLOCK=block, PAIRS=pairs, num_warps=warps)
    return out_TD
