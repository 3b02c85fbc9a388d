"""Attention, and the element-wise passes between matrix products, one Triton kernel each.

One program reduces a row, a head or a protein, in an order that depends on its own length alone. So its bits
depend neither on its neighbours nor on its place in the pack.
"""

# mypy: ignore-errors
# Triton traces its kernels and does not run them: their values have not the types that Python sees.

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from dist_esm.model.kernels.triton_pairs import dot_of_pairs

SCALE = 2.0**-6
"""The residual stream is kept in fp16 times this: it reaches 4 million, with 11 significant bits.
A power of two rounds nothing."""
UNSCALE = tl.constexpr(1 / SCALE)
RESCALE = tl.constexpr(SCALE)
LARGEST_E4M3 = tl.constexpr(448.0)
LOG2_E = tl.constexpr(1.4426950408889634)


def to_stream(x_TD: Tensor) -> Tensor:
    """Return fp32 values as the residual stream is kept: scaled, in fp16."""
    return (x_TD * SCALE).half()


def from_stream(x_TD: Tensor) -> Tensor:
    """Return the residual stream in fp32."""
    return x_TD.float() / SCALE


@triton.jit
def _norm(x, added, weight, bias, out, eps, WIDTH: tl.constexpr, CHUNK: tl.constexpr, ADDS: tl.constexpr):
    """Normalize a row, which stays in registers. With chunks of 256 columns a warp needs no other warp."""
    row = tl.program_id(0).to(tl.int64) * WIDTH
    columns = tl.arange(0, CHUNK)
    chunks = ()
    total = 0.0
    for first in tl.static_range(0, WIDTH, CHUNK):
        inside = first + columns < WIDTH
        values = tl.load(x + row + first + columns, mask=inside, other=0.0).to(tl.float32) * UNSCALE
        if ADDS:
            values += tl.load(added + row + first + columns, mask=inside, other=0.0).to(tl.float32)
            tl.store(x + row + first + columns, (values * RESCALE).to(tl.float16), mask=inside)
        chunks = chunks + (values,)  # noqa: RUF005 - Triton knows no other way
        total += tl.sum(values, 0)
    mean = total / WIDTH
    squares = 0.0
    for first in tl.static_range(0, WIDTH, CHUNK):
        centred = tl.where(first + columns < WIDTH, chunks[first // CHUNK] - mean, 0.0)
        squares += tl.sum(centred * centred, 0)
    rstd = tl.rsqrt(squares / WIDTH + eps)
    for first in tl.static_range(0, WIDTH, CHUNK):
        inside = first + columns < WIDTH
        gain = tl.load(weight + first + columns, mask=inside, other=0.0)
        shift = tl.load(bias + first + columns, mask=inside, other=0.0)
        values = (chunks[first // CHUNK] - mean) * rstd * gain + shift
        tl.store(out + row + first + columns, values.to(out.dtype.element_ty), mask=inside)


WIDEST_ROW_OF_A_WARP = 2560
"""Columns of a row that the registers of one warp hold."""


def norm(
    x_TD: Tensor,
    weight_D: Tensor,
    bias_D: Tensor,
    eps: float,
    dtype: torch.dtype,
    added_TD: Tensor | None = None,
) -> Tensor:
    """Return the LayerNorm of the residual stream, computed in fp32, rounded once to `dtype`; shape (T, D).

    With `added_TD`, that is first added to the stream, in place.
    """
    num_rows, width = x_TD.shape
    out_TD = torch.empty_like(x_TD, dtype=dtype)
    warps = 1 if width <= WIDEST_ROW_OF_A_WARP else 4
    added = x_TD if added_TD is None else added_TD
    _norm[(num_rows,)](
        x_TD,
        added,
        weight_D,
        bias_D,
        out_TD,
        eps,
        WIDTH=width,
        CHUNK=256 * warps,
        ADDS=added_TD is not None,
        num_warps=warps,
    )
    return out_TD


@triton.jit
def _rotate(qkv, cos, sin, stride, num_heads, HALF: tl.constexpr, BLOCK: tl.constexpr, HEADS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    heads = tl.program_id(1) * HEADS + tl.arange(0, HEADS)[:, None]
    offsets = tl.arange(0, BLOCK)[None, :]
    inside = (heads < num_heads) & (offsets < HALF)
    turn_cos = tl.load(cos + row * HALF + offsets, mask=offsets < HALF, other=0.0)
    turn_sin = tl.load(sin + row * HALF + offsets, mask=offsets < HALF, other=0.0)
    first_half = qkv + row * stride + heads * 2 * HALF + offsets
    first = tl.load(first_half, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(first_half + HALF, mask=inside, other=0.0).to(tl.float32)
    tl.store(first_half, (first * turn_cos - second * turn_sin).to(qkv.dtype.element_ty), mask=inside)
    tl.store(first_half + HALF, (second * turn_cos + first * turn_sin).to(qkv.dtype.element_ty), mask=inside)


def rotate_(qkv_TC: Tensor, cos_TH: Tensor, sin_TH: Tensor, num_heads: int) -> None:
    """Apply rotary embedding to the first `num_heads` heads of each row, in place, computed in fp32.

    Parameters
    ----------
    qkv_TC : Tensor, shape (T, C)
        Rows of heads laid end to end; queries and keys come first.
    cos_TH, sin_TH : fp32 Tensor, shape (T, H / 2)
        Cosine and sine for each token's position.
    num_heads
        Heads to rotate.
    """
    num_rows, half = cos_TH.shape
    heads = 16
    grid = (num_rows, triton.cdiv(num_heads, heads))
    block = triton.next_power_of_2(half)
    _rotate[grid](
        qkv_TC, cos_TH, sin_TH, qkv_TC.stride(0), num_heads, HALF=half, BLOCK=block, HEADS=heads, num_warps=4
    )


@triton.jit
def exact_gelu(values):
    """Return x (1 + erf(x / sqrt 2)) / 2."""
    return 0.5 * values * (1.0 + tl.erf(values * 0.7071067811865476))


@triton.jit
def _gelu(x, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = offsets < size
    values = tl.load(x + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(x + offsets, exact_gelu(values).to(x.dtype.element_ty), mask=inside)


def gelu_(x: Tensor) -> Tensor:
    """Apply the exact (erf) GELU in place, computed in fp32; `x` is contiguous."""
    block = 4096
    _gelu[(triton.cdiv(x.numel(), block),)](x, x.numel(), BLOCK=block, num_warps=8)
    return x


@triton.jit(do_not_specialize_on_alignment=["starts", "stops"])
def _segment_sum(x, starts, stops, out, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    segment = tl.program_id(0)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    first, stop = tl.load(starts + segment), tl.load(stops + segment)
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for row in range(first, stop, ROWS):
        rows = row + tl.arange(0, ROWS)
        mask = (rows < stop)[:, None] & inside[None, :]
        total += tl.load(x + rows.to(tl.int64)[:, None] * width + columns[None, :], mask=mask, other=0.0).to(
            tl.float32
        )
    tl.store(out + segment.to(tl.int64) * width + columns, tl.sum(total, 0), mask=inside)


def segment_sum(x_TD: Tensor, starts_B: Tensor, stops_B: Tensor) -> Tensor:
    """Sum the rows `starts_B[i]` up to `stops_B[i]` in fp32; shape (B, D).

    The order of additions depends on the segment's length alone.
    """
    out_BD = x_TD.new_empty(len(starts_B), x_TD.shape[1], dtype=torch.float32)
    columns = 128
    grid = (len(starts_B), triton.cdiv(x_TD.shape[1], columns))
    _segment_sum[grid](x_TD, starts_B, stops_B, out_BD, x_TD.shape[1], ROWS=16, COLUMNS=columns, num_warps=4)
    return out_BD


@triton.jit(do_not_specialize_on_alignment=["tiles"])
def _attend(
    q,
    k,
    v,
    out,
    tiles,
    q_stride,
    k_stride,
    v_stride,
    num_heads,
    scale,
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PAIRS: tl.constexpr,
    SCALES: tl.constexpr,
):
    head, tile = tl.program_id(0) % num_heads, tl.program_id(0) // num_heads
    first_query, start, stop = (
        tl.load(tiles + tile * 3),
        tl.load(tiles + tile * 3 + 1),
        tl.load(tiles + tile * 3 + 2),
    )
    columns, rows = tl.arange(0, BLOCK), tl.arange(0, TILE)
    in_head = columns < HEAD
    in_tile = (first_query + rows < stop)[:, None] & in_head[None, :]
    q_rows = (
        q + first_query.to(tl.int64) * q_stride + head * HEAD + rows[:, None] * q_stride + columns[None, :]
    )
    queries = tl.load(q_rows, mask=in_tile, other=0.0)
    keys_at = k + start.to(tl.int64) * k_stride + head * HEAD + rows[None, :] * k_stride + columns[:, None]
    values_at = v + start.to(tl.int64) * v_stride + head * HEAD + rows[:, None] * v_stride + columns[None, :]
    most = tl.full((TILE,), float("-inf"), tl.float32)
    total = tl.zeros((TILE,), tl.float32)
    sums = tl.zeros((TILE, BLOCK), tl.float32)
    length = stop - start
    whole = length // TILE * TILE
    for _ in range(0, whole, TILE):
        keys = tl.load(keys_at, mask=in_head[:, None], other=0.0)
        values = tl.load(values_at, mask=in_head[None, :], other=0.0)
        most, total, sums = _attend_to(queries, keys, values, TILE, most, total, sums, PAIRS, MASKS=False)
        keys_at += TILE * k_stride
        values_at += TILE * v_stride
    if whole < length:
        left = length - whole
        keys = tl.load(keys_at, mask=(rows < left)[None, :] & in_head[:, None], other=0.0)
        values = tl.load(values_at, mask=(rows < left)[:, None] & in_head[None, :], other=0.0)
        most, total, sums = _attend_to(queries, keys, values, left, most, total, sums, PAIRS, MASKS=True)
    result = sums / total[:, None]
    if SCALES:
        # Two numbers of 8 bits are stored as one of 16: the layout of single ones takes twice the registers.
        result *= scale
        result = tl.where(tl.abs(result) <= LARGEST_E4M3, result, float("nan"))  # the rounding saturates
        low, high = tl.split(tl.reshape(result, [TILE, BLOCK // 2, 2]))
        both = tl.inline_asm_elementwise(
            "cvt.rn.satfinite.e4m3x2.f32 $0, $2, $1;",
            "=h,f,f",
            [low, high],
            dtype=tl.uint16,
            is_pure=True,
            pack=1,
        )
        pairs = tl.arange(0, BLOCK // 2)[None, :]
        at = out + ((first_query + rows).to(tl.int64)[:, None] * num_heads + head) * (HEAD // 2) + pairs
        tl.store(at, both, mask=(first_query + rows < stop)[:, None] & (pairs < HEAD // 2))
    else:
        at = out + (first_query + rows).to(tl.int64)[:, None] * num_heads * HEAD + head * HEAD
        tl.store(at + columns[None, :], result.to(out.dtype.element_ty), mask=in_tile)


@triton.jit
def _attend_to(queries, keys, values, left, most, total, sums, PAIRS: tl.constexpr, MASKS: tl.constexpr):
    scores = (dot_of_pairs(queries, keys) if PAIRS else tl.dot(queries, keys)) * LOG2_E
    if MASKS:
        scores = tl.where((tl.arange(0, keys.shape[1]) < left)[None, :], scores, float("-inf"))
    new_most = tl.maximum(most, tl.max(scores, 1))
    # Pairs hold 22 bits down to 2**-14: weights up to 1024 instead of 1 keep as many further down.
    weights = tl.exp2(scores - (new_most - 10 if PAIRS else new_most)[:, None])
    shrinks = tl.exp2(most - new_most)
    if PAIRS:
        sums = sums * shrinks[:, None] + dot_of_pairs(weights, values)
    else:
        sums = tl.dot(weights.to(values.dtype), values, sums * shrinks[:, None])
    return new_most, total * shrinks + tl.sum(weights, 1), sums


def attend(
    q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, tiles_C3: Tensor, tile: int, scale: float | None = None
) -> Tensor:
    """Attend within each protein; shape (T, N, H).

    Scores and their softmax are computed in fp32; the softmax is rounded to the dtype of the values. A query
    goes through the keys of its protein in order, `tile` at a time; its sums are rescaled whenever a larger
    score comes. Source: Dao 2023, arXiv:2307.08691, algorithm 1.

    Parameters
    ----------
    q_TNH, k_TNH, v_TNH
        bf16, fp16, or fp32, whose products are those of pairs of fp16. The heads of a row lie end to end; the
        rows may lie further apart. Queries are scaled already.
    tiles_C3
        Tiles as in `Seqlens`; every row belongs to exactly one.
    tile
        Rows of a tile.
    scale
        The result is multiplied by this and rounded to e4m3, what is too large to NaN; None: it is rounded to
        the dtype of the values.
    """
    _, num_heads, head = q_TNH.shape
    dtype = q_TNH.dtype if scale is None else torch.float8_e4m3fn
    out_TNH = torch.empty(q_TNH.shape, dtype=dtype, device=q_TNH.device)
    strides = q_TNH.stride(0), k_TNH.stride(0), v_TNH.stride(0)
    block = max(16, triton.next_power_of_2(head))
    grid = (len(tiles_C3) * num_heads,)
    pairs = q_TNH.dtype is torch.float32
    warps, stages = attend_options(block, pairs)
    _attend[grid](
        q_TNH,
        k_TNH,
        v_TNH,
        out_TNH if scale is None else out_TNH.view(torch.uint16),
        tiles_C3,
        *strides,
        num_heads,
        1.0 if scale is None else scale,
        HEAD=head,
        BLOCK=block,
        TILE=tile,
        PAIRS=pairs,
        SCALES=scale is not None,
        num_warps=warps,
        num_stages=stages,
    )
    return out_TNH


def attend_options(block: int, pairs: bool) -> tuple[int, int]:
    """Return the warps and stages of attention with heads of a width, in fp32 if it works with pairs."""
    return (8, 1) if pairs and block > 64 else (4, 3)


@triton.jit
def _round_block(
    weight, factors, rounded, errors, num_rows, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BLOCK)
    inside = (rows < num_rows)[:, None] & (columns < WIDTH)[None, :]
    at = rows[:, None] * WIDTH + columns[None, :]
    values = tl.load(weight + at, mask=inside, other=0.0)
    found = tl.zeros((ROWS, BLOCK), tl.float32)
    passed_on = tl.zeros((ROWS, BLOCK), tl.float32)
    for column in range(0, WIDTH):
        is_it = (columns == column)[None, :]
        taken = tl.load(factors + column * WIDTH + columns, mask=columns < WIDTH, other=0.0)
        own = tl.load(factors + column * WIDTH + column)
        value = tl.sum(tl.where(is_it, values, 0.0), 1)
        nearest = tl.clamp(value, -LARGEST_E4M3, LARGEST_E4M3).to(tl.float8e4nv).to(tl.float32)
        error = (value - nearest) / own
        values -= error[:, None] * taken[None, :]
        found = tl.where(is_it, nearest[:, None], found)
        passed_on = tl.where(is_it, error[:, None], passed_on)
    tl.store(rounded + at, found.to(tl.float8e4nv), mask=inside)
    tl.store(errors + at, passed_on, mask=inside)


def round_block(weight_CB: Tensor, factors_BB: Tensor, rounded_CB: Tensor) -> Tensor:
    """Round the columns of a block to e4m3, see `rounding.RoundBlock`."""
    num_rows, width = weight_CB.shape
    errors_CB = torch.empty_like(weight_CB)
    rows = 16
    _round_block[(triton.cdiv(num_rows, rows),)](
        weight_CB,
        factors_BB,
        rounded_CB,
        errors_CB,
        num_rows,
        WIDTH=width,
        BLOCK=triton.next_power_of_2(width),
        ROWS=rows,
        num_warps=4,
    )
    return errors_CB
