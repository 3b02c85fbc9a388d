"""Matrix products with the step after them inside, in Triton: bias, and GELU, rotation or residual.

A program computes a tile of the product, accumulates it in fp32 registers, and applies the epilogue there, so
values are rounded once, on the way out. Products are not split along their inner dimension, and the tiles are
fixed for each kind of card. So a row's bits depend neither on its place nor on the number of rows.

fp32 numbers are multiplied as pairs of fp16 numbers (`triton_pairs`): three products on the tensor cores in
place of one of fp32. Tensor cores cut off what they add, where fp32 rounds; so they add a few steps alone,
and the sums of these are added in fp32.
"""

# mypy: ignore-errors
# Triton traces its kernels and does not run them: their values have not the types that Python sees.

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from dist_esm.model.kernels.triton_ops import LOG2_E, RESCALE, exact_gelu
from dist_esm.model.kernels.triton_pairs import PAIR_SCALE, pair_of


class Tile(NamedTuple):
    """How a product is cut and run."""

    rows: int
    columns: int
    depth: int
    """Rows and columns of a tile, and the numbers of the inner dimension that are taken at once."""
    warps: int
    stages: int
    parts: int
    """Parts of a tile's columns that the epilogue takes one after another: it needs fewer registers."""
    by_tma: bool = False
    """True: the tensor memory accelerator loads tiles, and a program goes from tile to tile, so that the next
    tile's loads run during the epilogue. False: a program loads and computes a single tile."""
    stores_by_tma: bool = False
    """True: what the epilogue reads and writes goes through the accelerator, too."""


HOPPER = {
    "rotation": Tile(128, 256, 64, 8, 3, 4, by_tma=True, stores_by_tma=True),
    "gelu": Tile(128, 256, 64, 8, 4, 4, by_tma=True),
    "residual": Tile(128, 256, 64, 8, 4, 4, by_tma=True),
}
"""For each epilogue in bf16 or fp16; measured on an H200, see LOG.md."""
HOPPER_PAIRS = Tile(128, 128, 64, 8, 3, 2, by_tma=True)
OTHERS, OTHERS_PAIRS = Tile(128, 128, 32, 4, 4, 4), Tile(128, 128, 32, 8, 3, 4)
"""They fit the shared memory and the registers of all other cards. They were not measured there."""


@cache
def tile_of(device: torch.device, epilogue: str, pairs: bool) -> Tile:
    """Return how a product is cut on a device."""
    return tile_for(torch.cuda.get_device_capability(device), epilogue, pairs)


def tile_for(capability: tuple[int, int], epilogue: str, pairs: bool) -> Tile:
    """Return how a product is cut on cards of a compute capability.

    It depends on nothing else, above all not on timing: another tile may give other bits.
    """
    if capability == (9, 0):
        return HOPPER_PAIRS if pairs else HOPPER[epilogue]
    return OTHERS_PAIRS if pairs else OTHERS


@triton.jit
def _gelu(x):
    # x (1 + erf(x / sqrt 2)) / 2, erf to 1.5e-7. Source: Abramowitz and Stegun 1964, 7.1.26.
    z = tl.abs(x) * 0.7071067811865476
    t = tl.inline_asm_elementwise(
        "rcp.approx.ftz.f32 $0, $1;", "=r,r", [1.0 + 0.3275911 * z], tl.float32, is_pure=True, pack=1
    )
    poly = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    erf = 1.0 - poly * tl.exp2(z * z * -LOG2_E)
    half = 0.5 * x
    return half + tl.abs(half) * erf


@triton.jit
def _finish(
    acc,
    first_row,
    first_column,
    out,
    out_tiles,
    bias,
    turn,
    num_rows,
    num_columns,
    EPILOGUE: tl.constexpr,
    HEAD: tl.constexpr,
    PAIRS: tl.constexpr,
    PARTS: tl.constexpr,
):
    ROWS: tl.constexpr = acc.shape[0]
    if PARTS > 1:
        HALF: tl.constexpr = acc.shape[1] // 2
        left, right = tl.split(tl.permute(tl.reshape(acc, (ROWS, 2, HALF)), (0, 2, 1)))
        _finish(
            left,
            first_row,
            first_column,
            out,
            out_tiles,
            bias,
            turn,
            num_rows,
            num_columns,
            EPILOGUE,
            HEAD,
            PAIRS,
            PARTS // 2,
        )
        _finish(
            right,
            first_row,
            first_column + HALF,
            out,
            out_tiles,
            bias,
            turn,
            num_rows,
            num_columns,
            EPILOGUE,
            HEAD,
            PAIRS,
            PARTS // 2,
        )
    else:
        COLUMNS: tl.constexpr = acc.shape[1]
        rows = first_row + tl.arange(0, ROWS)
        columns = first_column + tl.arange(0, COLUMNS)
        in_columns = columns < num_columns
        inside = (rows < num_rows)[:, None] & in_columns[None, :]
        values = acc
        if PAIRS:  # what undoes the scales lies beside the bias
            values *= tl.load(bias + num_columns + columns, mask=in_columns, other=0.0)[None, :]
        values += tl.load(bias + columns, mask=in_columns, other=0.0)[None, :]
        if EPILOGUE == "rotation":
            # The last third of the columns, values, is not turned: a cosine of 1 and a sine of 0.
            table = tl.load(
                turn + rows[:, None] * HEAD + (columns % HEAD)[None, :],
                mask=inside & (columns < num_columns // 3 * 2)[None, :],
                other=(1 - columns % 2).to(tl.float32)[None, :],
            )
            x, y = tl.split(tl.reshape(values, (ROWS, COLUMNS // 2, 2)))
            cos, sin = tl.split(tl.reshape(table, (ROWS, COLUMNS // 2, 2)))
            values = tl.reshape(tl.join(x * cos - y * sin, x * sin + y * cos), (ROWS, COLUMNS))
        if EPILOGUE == "gelu":
            values = exact_gelu(values) if PAIRS else _gelu(values)
        if PAIRS and EPILOGUE == "gelu":
            at = out + rows.to(tl.int64)[:, None] * (2 * num_columns) + columns[None, :]
            high, low = pair_of(values * PAIR_SCALE)
            tl.store(at, high, mask=inside)
            tl.store(at + num_columns, low, mask=inside)
        elif out_tiles is not None:
            if EPILOGUE == "residual":
                values = values * RESCALE + out_tiles.load([first_row, first_column]).to(tl.float32)
            out_tiles.store([first_row, first_column], values.to(out_tiles.dtype))
        else:
            at = out + rows.to(tl.int64)[:, None] * num_columns + columns[None, :]
            if EPILOGUE == "residual":
                before = tl.load(at, mask=inside, other=0.0).to(tl.float32)
                values = before + (values if PAIRS else values * RESCALE)
            tl.store(at, values.to(out.dtype.element_ty), mask=inside)


@triton.jit
def _load(at, inside, IS_EVEN: tl.constexpr):
    return tl.load(at) if IS_EVEN else tl.load(at, mask=inside, other=0.0)


@triton.jit
def _add_step(a_high, a_low, b_high, b_low, acc, PAIRS: tl.constexpr):
    if PAIRS:
        acc += tl.dot(a_high, b_high.T, tl.dot(a_high, b_low.T, tl.dot(a_low, b_high.T)))
    else:
        acc = tl.dot(a_high, b_high.T, acc)
    return acc


@triton.jit
def _place(tile, num_rows, num_columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr, GROUP: tl.constexpr = 8):
    # A group of tiles of rows goes through the columns together, so that its inputs stay in the L2 cache.
    across = tl.cdiv(num_columns, COLUMNS)
    first = tile // (GROUP * across) * GROUP
    in_group = min(tl.cdiv(num_rows, ROWS) - first, GROUP)
    index = tile % (GROUP * across)
    return (first + index % in_group) * ROWS, index // in_group * COLUMNS


@triton.jit(do_not_specialize=["num_rows"])
def _product(
    a,
    a_tiles,
    weight,
    weight_tiles,
    out,
    out_tiles,
    bias,
    turn,
    num_rows,
    num_columns,
    width,
    EPILOGUE: tl.constexpr,
    HEAD: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
    PARTS: tl.constexpr,
    IS_EVEN: tl.constexpr,
):
    if a_tiles is not None:
        num_tiles = tl.cdiv(num_rows, ROWS) * tl.cdiv(num_columns, COLUMNS)
        for tile in tl.range(tl.program_id(0), num_tiles, tl.num_programs(0), flatten=True):
            row, column = _place(tile, num_rows, num_columns, ROWS, COLUMNS)
            acc = tl.zeros((ROWS, COLUMNS), tl.float32)
            # A last step that reaches past the width meets zeros. With pairs it meets the first low parts of
            # both: their product is right, too, and left out elsewhere only since it is small.
            for k in range(0, width, DEPTH):
                a_high, b_high = a_tiles.load([row, k]), weight_tiles.load([column, k])
                a_low, b_low = a_high, b_high
                if PAIRS:
                    a_low, b_low = a_tiles.load([row, width + k]), weight_tiles.load([column, width + k])
                acc = _add_step(a_high, a_low, b_high, b_low, acc, PAIRS)
            _finish(
                acc,
                row,
                column,
                out,
                out_tiles,
                bias,
                turn,
                num_rows,
                num_columns,
                EPILOGUE,
                HEAD,
                PAIRS,
                PARTS,
            )
    else:
        row, column = _place(tl.program_id(0), num_rows, num_columns, ROWS, COLUMNS)
        acc = tl.zeros((ROWS, COLUMNS), tl.float32)
        stride = 2 * width if PAIRS else width
        offsets = tl.arange(0, DEPTH)
        a_rows = ((row + tl.arange(0, ROWS)) % num_rows).to(tl.int64)
        b_rows = ((column + tl.arange(0, COLUMNS)) % num_columns).to(tl.int64)
        a_at = a + a_rows[:, None] * stride + offsets[None, :]
        b_at = weight + b_rows[:, None] * stride + offsets[None, :]
        for k in range(0, width, DEPTH):
            in_width = (offsets < width - k)[None, :]
            a_high, b_high = _load(a_at, in_width, IS_EVEN), _load(b_at, in_width, IS_EVEN)
            a_low, b_low = a_high, b_high
            if PAIRS:
                a_low, b_low = _load(a_at + width, in_width, IS_EVEN), _load(b_at + width, in_width, IS_EVEN)
            acc = _add_step(a_high, a_low, b_high, b_low, acc, PAIRS)
            a_at += DEPTH
            b_at += DEPTH
        _finish(
            acc,
            row,
            column,
            out,
            out_tiles,
            bias,
            turn,
            num_rows,
            num_columns,
            EPILOGUE,
            HEAD,
            PAIRS,
            PARTS,
        )


def product(
    epilogue: str, a: Tensor, weight: Tensor, bias: Tensor, out: Tensor, turn_TH: Tensor | None = None
) -> None:
    """Compute out = epilogue(a @ weight.T + bias).

    Parameters
    ----------
    epilogue
        "rotation": queries and keys, the first two thirds of the columns, are rotated; "gelu"; or "residual":
        the product is added to `out`, which is the stream: scaled fp16, or fp32 with pairs.
    a : Tensor, shape (T, K)
        bf16 or fp16; or pairs as `triton_pairs.to_pairs` makes them, (T, 2 K).
    weight : Tensor, shape (C, K)
        Of the same dtype; or pairs as `triton_pairs.weight_pairs` makes them, (C, 2 K).
    bias : fp32 Tensor, shape (C,)
        For pairs (2, C): below the bias what undoes the scales.
    out : Tensor, shape (T, C)
        For pairs fp32, or with GELU pairs, (T, 2 C).
    turn_TH
        For a rotation cosine and sine of each pair of neighbouring columns of a head.
    """
    pairs = bias.dim() == 2
    tile = tile_of(a.device, epilogue, pairs)
    num_rows, (num_columns, width) = len(a), weight.shape
    if pairs:
        width //= 2
    programs = triton.cdiv(num_rows, tile.rows) * triton.cdiv(num_columns, tile.columns)
    a_tiles = weight_tiles = out_tiles = None
    if tile.by_tma:
        programs = min(programs, multiprocessors(a.device))
        a_tiles = TensorDescriptor.from_tensor(a, [tile.rows, tile.depth])
        weight_tiles = TensorDescriptor.from_tensor(weight, [tile.columns, tile.depth])
    if tile.stores_by_tma:
        out_tiles = TensorDescriptor.from_tensor(out, [tile.rows, tile.columns // tile.parts])
    _product[(programs,)](
        a,
        a_tiles,
        weight,
        weight_tiles,
        out,
        out_tiles,
        bias,
        turn_TH,
        num_rows,
        num_columns,
        width,
        **constants_of(tile, epilogue, 1 if turn_TH is None else turn_TH.shape[1], pairs, width),
        num_warps=tile.warps,
        num_stages=tile.stages,
    )


@cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors a GPU has."""
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def constants_of(
    tile: Tile, epilogue: str, head: int, pairs: bool, width: int
) -> dict[str, str | int | bool]:
    """Return the constants that a kernel is compiled with."""
    return {
        "EPILOGUE": epilogue,
        "HEAD": head,
        "PAIRS": pairs,
        "ROWS": tile.rows,
        "COLUMNS": tile.columns,
        "DEPTH": tile.depth,
        "PARTS": tile.parts,
        "IS_EVEN": width % tile.depth == 0,
    }
