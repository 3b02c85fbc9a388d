"""The rounding of weights to e4m3, each so that the next make up for its error.

Columns are rounded one after the other. What a column's rounding does to the layer's outputs, over the inputs
of the calibration set, is given to the columns that are still to come. So a sum over many inputs errs far
less than its terms.

Source: Frantar et al. 2022, arXiv:2210.17323 (GPTQ).

Shape suffixes: T tokens, C outputs, K inputs, G inputs of a group, B of a block.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from dist_esm.model.kernels.quantized import E4M3, LARGEST

GROUP = 2560
"""Errors are passed on within so many columns; the work grows with their third power."""
BLOCK = 128
"""Columns that are rounded before their errors are passed on to the rest, by a matrix product."""
DAMPING = 0.01
"""Share of the mean square of the inputs that is added to the square of each: it keeps the factors finite."""
SMALLEST = 2.0**-100
"""Stands in for the squares of inputs that all are zero."""

RoundBlock = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Rounds the columns of a block: takes weights (C, B), which it changes, the factors (B, B), and where to put
the rounded weights, e4m3 of shape (C, B); returns what each column's error passes on, shape (C, B)."""


def round_weights(weight_CK: Tensor, inputs_TK: Tensor, round_block: RoundBlock) -> Tensor:
    """Return weights in e4m3, shape (C, K).

    Parameters
    ----------
    weight_CK
        fp32, within e4m3's range.
    inputs_TK
        What the layer multiplies, e4m3. Its mean counts for nothing: the bias makes up for that.
    round_block
        See `RoundBlock`.
    """
    rounded_CK = torch.empty_like(weight_CK, dtype=E4M3)
    for first in range(0, weight_CK.shape[1], GROUP):
        columns = slice(first, first + GROUP)
        weight_CG = weight_CK[:, columns].clone()
        factors_GG = factors_of(inputs_TK[:, columns])
        for start in range(0, weight_CG.shape[1], BLOCK):
            stop = min(start + BLOCK, weight_CG.shape[1])
            block_CB = weight_CG[:, start:stop].contiguous()
            block_BB = factors_GG[start:stop, start:stop].contiguous()
            rounded_CB = torch.empty_like(block_CB, dtype=E4M3)
            errors_CB = round_block(block_CB, block_BB, rounded_CB)
            rounded_CK[:, first + start : first + stop] = rounded_CB
            weight_CG[:, stop:] -= errors_CB @ factors_GG[start:stop, stop:]
    return rounded_CK


def factors_of(inputs_TG: Tensor) -> Tensor:
    """Return how much of a column's error each later column takes; fp32, upper triangular, shape (G, G).

    That is the Cholesky factor U of the inverse of the inputs' covariance, which is U.T @ U. It is computed
    in fp64: where few directions hold nearly all of the covariance, fp32 finds it not to be positive.
    """
    centred_TG = inputs_TG.double()
    centred_TG -= centred_TG.mean(0)
    covariance_GG = centred_TG.T @ centred_TG / len(centred_TG)
    squares_G = covariance_GG.diagonal()
    squares_G += DAMPING * squares_G.mean() + SMALLEST
    backwards_GG = torch.linalg.cholesky(covariance_GG.flip(0, 1))
    identity_GG = torch.eye(len(squares_G), dtype=torch.float64, device=squares_G.device)
    factors_GG: Tensor = torch.linalg.solve_triangular(backwards_GG.flip(0, 1), identity_GG, upper=True)
    return factors_GG.float()


def round_block(weight_CB: Tensor, factors_BB: Tensor, rounded_CB: Tensor) -> Tensor:
    """Round the columns of a block with torch's own operations, see `RoundBlock`."""
    errors_CB = torch.empty_like(weight_CB)
    for column in range(weight_CB.shape[1]):
        rounded_CB[:, column] = weight_CB[:, column].clamp(-LARGEST, LARGEST).to(E4M3)
        error_C = (weight_CB[:, column] - rounded_CB[:, column].float()) / factors_BB[column, column]
        weight_CB[:, column:] -= torch.outer(error_C, factors_BB[column, column:])
        errors_CB[:, column] = error_C
    return errors_CB
