"""The ``quack`` implementation of a block: CuTe matrix products with what follows them inside, from the package quack-kernels.

A product is accumulated in fp32 registers; bias, GELU, rotation or residual are applied there (`quack_epilogues`), in fp32, before the one rounding on
the way out. Products are not split along their inner dimension, so a row's bits depend neither on its place nor on the number of rows.

Compiled kernels are kept on disk (``QUACK_CACHE_DIR``).
"""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_esm.linear import angles
from dist_esm.linear_triton import TritonPasses
from dist_esm.preload import wait_for_preload


class Tile(NamedTuple):
    """How a product is cut: rows and columns of a tile, of a cluster of tiles, and whether two tiles take turns on a multiprocessor."""

    tile_M: int  # noqa: N815 - quack's names
    tile_N: int  # noqa: N815
    cluster_M: int  # noqa: N815
    cluster_N: int  # noqa: N815
    pingpong: bool


TILES = {
    "rotation": Tile(192, 128, 1, 2, True),
    "gelu": Tile(192, 128, 1, 2, True),
    "residual": Tile(192, 128, 1, 2, True),
}
"""Measured on an H100, see LOG.md."""


class QuackLinear(TritonPasses):
    """CuTe products."""

    name = "quack"
    interleaves = True
    any_rows = True
    bias_dtype: torch.dtype | None = torch.float32

    def rotary(self, positions_T: Tensor, inv_freq: Tensor) -> Tensor:
        """Cosine and sine of each pair side by side, then as many ones and zeros; shape (T, 2 H)."""
        angles_TH = angles(positions_T, inv_freq)
        angles_TH = torch.cat((angles_TH, torch.zeros_like(angles_TH)), 1)
        return torch.stack((angles_TH.cos(), angles_TH.sin()), -1).flatten(1)

    def qkv(self, h_TD: Tensor, linear: nn.Linear, rotary: Tensor, num_heads: int) -> tuple[Tensor, Tensor, Tensor]:
        """See `LinearOps`."""
        num_rows, width = h_TD.shape
        qkv_TC = h_TD.new_empty(num_rows, 3 * width)
        launch("rotation", epilogues().with_rotation(width), h_TD, linear.weight, qkv_TC, bias=linear.bias.unsqueeze(0), turn=rotary)
        q_TNH, k_TNH, v_TNH = qkv_TC.view(num_rows, 3, num_heads, -1).unbind(1)
        return q_TNH, k_TNH, v_TNH

    def gelu(self, h_TD: Tensor, linear: nn.Linear) -> Tensor:
        """See `LinearOps`."""
        out_TF = h_TD.new_empty(len(h_TD), len(linear.weight))
        launch("gelu", epilogues().with_gelu, h_TD, linear.weight, out_TF, bias=linear.bias.unsqueeze(0))
        return out_TF

    def residual(self, x_TD: Tensor, h_TD: Tensor, linear: nn.Linear, norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
        """See `LinearOps`."""
        launch("residual", epilogues().with_residual, h_TD, linear.weight, x_TD, x_TD, bias=linear.bias.unsqueeze(0))
        return x_TD, x_TD if norm is None else self.norm(x_TD, norm, h_TD.dtype)


@cache
def epilogues() -> Any:
    """`quack_epilogues`, imported when the first product is wanted: until then weights are read beside the import that `preload` began."""
    wait_for_preload()
    from dist_esm import quack_epilogues

    return quack_epilogues


def launch(kind: str, epilogue: Any, a: Tensor, weight: Tensor, out: Tensor, addend: Tensor | None = None, **operands: Tensor) -> None:
    """out = epilogue(a @ weight.T, operands)."""
    epilogue.gemm(a, weight, out, addend, epi_args=operands, **TILES[kind]._asdict())
