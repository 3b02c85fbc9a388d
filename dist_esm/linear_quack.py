"""The ``quack`` implementation of a block: CuTe matrix products with what follows them inside, from the package quack-kernels.

A product is accumulated in fp32 registers; bias, GELU, rotation or residual are applied there, in fp32, before the one rounding on the
way out. Products are not split along their inner dimension, so a row's bits depend neither on its place nor on the number of rows.

The functions that are applied are traced by CuTe's compiler. Compiled kernels are kept on disk (``QUACK_CACHE_DIR``).
"""

# mypy: ignore-errors
# What a traced function holds are not the types that Python sees.

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import cutlass.cute as cute
import torch
from cutlass import Int32, const_expr
from quack import copy_utils
from quack.epilogue.frontend import gemm_epilogue, pack, unpack
from quack.epilogue.ops import RowVecLoad
from quack.epilogue.rotary import RotaryCosSinTMALoad
from torch import Tensor, nn

from dist_esm import triton_kernels
from dist_esm.linear import angles
from dist_esm.linear_triton import TritonPasses


def gelu(x):
    """GELU(x) = x (1 + erf(x / sqrt 2)) / 2; erf to 1.5e-7. Source: Abramowitz and Stegun 1964, 7.1.26."""
    z = x * 0.7071067811865476
    z = cute.arch.fmax(z, -z)
    t = cute.arch.rcp_approx(1.0 + 0.3275911 * z)
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    erf = 1.0 - poly * cute.math.exp2(z * z * -1.4426950408889634, fastmath=True)
    half = 0.5 * x
    return half + cute.arch.fmax(half, -half) * erf


@gemm_epilogue(ops={"bias": RowVecLoad("bias")})
def with_gelu(acc, bias):
    """GELU of a product."""
    return {"D": gelu(acc + bias)}


@gemm_epilogue(ops={"bias": RowVecLoad("bias")})
def with_residual(acc, c, bias):
    """A product added to the residual stream as it is kept."""
    return {"D": (acc + bias) * triton_kernels.SCALE + c}


class TurnLoad(RotaryCosSinTMALoad):
    """The table of rotations, loaded beside a product's tiles: its left half for queries and keys, its right one, no turn, for values.

    Parameters
    ----------
    name
        Of the operand: fp32, shape (T, 2 H), cosine and sine of each pair side by side.
    num_turned
        Columns of the product that hold queries and keys; the tiles' width divides it.
    """

    def __init__(self, name, num_turned):
        super().__init__(name)
        self.num_turned = num_turned

    def config_key(self):
        """What the kernel is compiled for."""
        return (*super().config_key(), self.num_turned)

    def load_g2s_copy_fn(self, gemm, params, smem_tensor, tile_coord_mnkl, varlen_manager, epi_pipeline):
        """What brings the table's part for a tile to shared memory, a subtile at a time."""
        table = varlen_manager.offset_batch_epi(getattr(params, self.name), tile_coord_mnkl[3])
        head_dim = const_expr(table.shape[1] // 2)
        tile_rows, tile_columns = gemm.cta_tile_shape_mnk[0], gemm.cta_tile_shape_mnk[1]
        subtile = getattr(params, self._epi_tile_key())
        width = const_expr(cute.size(subtile[1]))
        assert tile_columns % head_dim == 0, "a tile holds whole heads"
        assert head_dim % width == 0, "a head holds whole subtiles"
        assert self.num_turned % tile_columns == 0, "a tile is turned as a whole"
        half = Int32(tile_coord_mnkl[1] * tile_columns >= self.num_turned)
        atom = getattr(params, self._tma_atom_key())
        copy_subtile, _, _ = gemm.epilog_gmem_copy_and_partition(atom, table, (tile_rows, head_dim), subtile, smem_tensor, (tile_coord_mnkl[0], half))
        copy = copy_utils.tma_producer_copy_fn(copy_subtile, epi_pipeline)
        repeats = const_expr(head_dim // width)

        def copy_turn(src_idx, producer_state, **options):
            copy((src_idx[0], src_idx[1] % repeats), producer_state, **options)

        return copy_turn


@cache
def with_rotation(width):
    """A product whose neighbouring columns are rotated against each other, for queries, keys and values of a width."""

    @gemm_epilogue(ops={"turn": TurnLoad("turn", 2 * width), "bias": RowVecLoad("bias")}, mode="acc_pair")
    def turned(acc, turn, bias):
        x, y = unpack(acc + bias)
        cos, sin = unpack(turn)
        return {"D": pack(x * cos - y * sin, x * sin + y * cos)}

    return turned


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
        launch("rotation", with_rotation(width), h_TD, linear.weight, qkv_TC, bias=linear.bias.unsqueeze(0), turn=rotary)
        q_TNH, k_TNH, v_TNH = qkv_TC.view(num_rows, 3, num_heads, -1).unbind(1)
        return q_TNH, k_TNH, v_TNH

    def gelu(self, h_TD: Tensor, linear: nn.Linear) -> Tensor:
        """See `LinearOps`."""
        out_TF = h_TD.new_empty(len(h_TD), len(linear.weight))
        launch("gelu", with_gelu, h_TD, linear.weight, out_TF, bias=linear.bias.unsqueeze(0))
        return out_TF

    def residual(self, x_TD: Tensor, h_TD: Tensor, linear: nn.Linear, norm: nn.LayerNorm | None) -> tuple[Tensor, Tensor]:
        """See `LinearOps`."""
        launch("residual", with_residual, h_TD, linear.weight, x_TD, x_TD, bias=linear.bias.unsqueeze(0))
        return x_TD, x_TD if norm is None else self.norm(x_TD, norm, h_TD.dtype)


def launch(kind: str, epilogue: Any, a: Tensor, weight: Tensor, out: Tensor, addend: Tensor | None = None, **operands: Tensor) -> None:
    """out = epilogue(a @ weight.T, operands)."""
    epilogue.gemm(a, weight, out, addend, epi_args=operands, **TILES[kind]._asdict())
