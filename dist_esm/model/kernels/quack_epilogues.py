"""The epilogues of `linear_quack`: bias, and GELU, rotation or residual, applied in fp32 registers.

Products of e4m3 numbers (`quantized`) have each column multiplied by a factor of its own first.

CuTe's compiler traces these functions. Importing this module takes seconds, and is only done to compile.
"""

# mypy: ignore-errors
# The values of a traced function have not the types that Python sees.

from __future__ import annotations

from functools import cache
from typing import Any

import cutlass.cute as cute
import quack.cache
from cutlass import Int32, const_expr
from cutlass.cute.runtime import find_runtime_libraries
from quack import copy_utils
from quack.epilogue.frontend import gemm_epilogue, pack, unpack
from quack.epilogue.ops import RowVecLoad
from quack.epilogue.rotary import RotaryCosSinTMALoad
from quack.gemm_runtime.host import run_gemm_epi_plan
from quack.gemm_sm90 import GemmSm90
from torch import Tensor

from dist_esm.model.kernels import kernel_cache
from dist_esm.model.kernels.triton_ops import SCALE

TO_INFINITY = 3.4028235e38 / 448
"""Takes what is larger than 448, e4m3's largest number, to infinity in fp32."""
FAST_SUMS = (("fp8_slow_accum", False),)
"""Products of e4m3 numbers are summed by the tensor cores alone. Over 10,240 terms that errs by 0.24%, the
rounding to e4m3 by 3.7%."""

quack.cache.CACHE_ENABLED = False  # what its cache answers cannot be exported


def gelu(x):
    """Return x (1 + erf(x / sqrt 2)) / 2, erf to 1.5e-7. Source: Abramowitz and Stegun 1964, 7.1.26."""
    z = x * 0.7071067811865476
    z = cute.arch.fmax(z, -z)
    t = cute.arch.rcp_approx(1.0 + 0.3275911 * z)
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    erf = 1.0 - poly * cute.math.exp2(z * z * -1.4426950408889634, fastmath=True)
    half = 0.5 * x
    return half + cute.arch.fmax(half, -half) * erf


@gemm_epilogue(ops={"bias": RowVecLoad("bias")})
def with_gelu(acc, bias):
    """Apply GELU to a product."""
    return {"D": gelu(acc + bias)}


@gemm_epilogue(ops={name: RowVecLoad(name) for name in ("factor", "bias", "half_gain")})
def with_gelu_of_quantized(acc, factor, bias, half_gain):
    """Apply GELU, and scale the result for e4m3; NaN where it would be larger than e4m3's largest number.

    GELU is half (1 + tanh(...)), to 5e-4: e4m3 rounds more coarsely. Source: Hendrycks and Gimpel 2016,
    arXiv:1606.08415.
    """
    x = acc * factor + bias
    half = half_gain * x
    y = half + half * cute.math.tanh(x * (0.7978846 + 0.0356774 * (x * x)), fastmath=True)
    return {"D": y + (y * TO_INFINITY) * 0.0}  # e4m3's own rounding takes all that is too large as 448


@gemm_epilogue(ops={"bias": RowVecLoad("bias")})
def with_residual(acc, c, bias):
    """Add a product to the residual stream, which is kept scaled."""
    return {"D": (acc + bias) * SCALE + c}


@gemm_epilogue(ops={"factor": RowVecLoad("factor"), "bias": RowVecLoad("bias")})
def with_residual_of_quantized(acc, c, factor, bias):
    """Add a product of e4m3 numbers to the residual stream."""
    return {"D": (acc * factor + bias) * SCALE + c}


class TurnLoad(RotaryCosSinTMALoad):
    """Loads the table of rotations together with a product's tiles.

    The left half of the table rotates queries and keys; the right half is for values and rotates nothing.

    Parameters
    ----------
    name
        Name of the operand: fp32, shape (T, 2 H), cosine and sine of each pair side by side.
    num_turned
        Columns of the product that hold queries and keys; the width of a tile divides it.
    """

    def __init__(self, name, num_turned):
        super().__init__(name)
        self.num_turned = num_turned

    def config_key(self):
        """Return what the compiled kernel depends on."""
        return (*super().config_key(), self.num_turned)

    def load_g2s_copy_fn(self, gemm, params, smem_tensor, tile_coord_mnkl, varlen_manager, epi_pipeline):
        """Return the function that copies a tile's part of the table to shared memory by subtiles."""
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
        copy_subtile, _, _ = gemm.epilog_gmem_copy_and_partition(
            atom, table, (tile_rows, head_dim), subtile, smem_tensor, (tile_coord_mnkl[0], half)
        )
        copy = copy_utils.tma_producer_copy_fn(copy_subtile, epi_pipeline)
        repeats = const_expr(head_dim // width)

        def copy_turn(src_idx, producer_state, **options):
            copy((src_idx[0], src_idx[1] % repeats), producer_state, **options)

        return copy_turn


def turn_pair(pair, turn):
    """Rotate two neighbouring numbers against each other."""
    x, y = unpack(pair)
    cos, sin = unpack(turn)
    return {"D": pack(x * cos - y * sin, x * sin + y * cos)}


@cache
def with_rotation(width):
    """Return an epilogue that rotates neighbouring columns against each other, for one width of the model."""

    @gemm_epilogue(ops={"turn": TurnLoad("turn", 2 * width), "bias": RowVecLoad("bias")}, mode="acc_pair")
    def turned(acc, turn, bias):
        return turn_pair(acc + bias, turn)

    return turned


@cache
def with_rotation_of_quantized(width):
    """Return the same for products of e4m3 numbers."""
    ops = {
        "turn": TurnLoad("turn", 2 * width),
        "factor": RowVecLoad("factor"),
        "bias": RowVecLoad("bias"),
    }

    @gemm_epilogue(ops=ops, mode="acc_pair")
    def turned(acc, turn, factor, bias):
        return turn_pair(acc * factor + bias, turn)

    return turned


def compile_product(epilogue: str, tensors: dict[str, Tensor], tile: Any) -> kernel_cache.Compiled:
    """Compile a product; return its kernel and the means to keep it.

    Parameters
    ----------
    epilogue
        "rotation", "gelu" or "residual".
    tensors
        a (T, K), weight (C, K), bias (1, C), out (T, C), and turn (T, 2 H) for a rotation. With e4m3 numbers
        also factor (1, C), and half_gain (1, C) for GELU. The kernel depends on their dtypes, and for a
        rotation on the widths.
    tile
        How the product is cut.
    """
    assert FAST_SUMS[0][0] in GemmSm90.__init__.__code__.co_names, "quack-kernels has another name for it"
    a, weight, out = (tensors[name] for name in ("a", "weight", "out"))
    operands = {name: tensor for name, tensor in tensors.items() if name not in ("a", "weight", "out")}
    is_quantized = "factor" in tensors
    traced = {
        "rotation": lambda: (with_rotation_of_quantized if is_quantized else with_rotation)(a.shape[1]),
        "gelu": lambda: with_gelu_of_quantized if is_quantized else with_gelu,
        "residual": lambda: with_residual_of_quantized if is_quantized else with_residual,
    }[epilogue]()
    addend = out if epilogue == "residual" else None
    plan = traced.gemm(
        a,
        weight,
        out,
        addend,
        epi_args=operands,
        **tile._asdict(),
        post_init_attrs=FAST_SUMS if is_quantized else (),
        _launch=False,
    )
    calls = []
    run_gemm_epi_plan(
        plan._replace(compiled_fn=lambda *arguments: calls.append(arguments)),
        a,
        weight,
        out,
        addend,
        operands,
    )

    def export(path):
        plan.compiled_fn.export_to_c(object_file_path=str(path), function_name=kernel_cache.SYMBOL)

    return kernel_cache.Compiled(
        kernel_cache.Kernel(plan.compiled_fn, kernel_cache.form_of(calls[0], tensors)),
        export,
        find_runtime_libraries(enable_tvm_ffi=True),
    )
