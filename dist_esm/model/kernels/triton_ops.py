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
LOG2_E = tl.constexpr(1.4426950408889634)


def to_stream(x_TD: Tensor) -> Tensor:
    """Return fp32 values as the residual stream is kept: scaled, in fp16."""
    return (x_TD * SCALE).half()


def from_stream(x_TD: Tensor) -> Tensor:
    """Return the residual stream in fp32."""
    return x_TD.float() / SCALE


@triton.jit
def _norm(x, added, weight, bias, out, width, eps, ADDS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < width
    values = tl.load(x + row * width + columns, mask=inside, other=0.0).to(tl.float32) * UNSCALE
    if ADDS:
        values += tl.load(added + row * width + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(x + row * width + columns, (values * RESCALE).to(tl.float16), mask=inside)
    mean = tl.sum(values, 0) / width
    centred = tl.where(inside, values - mean, 0.0)
    rstd = tl.rsqrt(tl.sum(centred * centred, 0) / width + eps)
    gain = tl.load(weight + columns, mask=inside, other=0.0)
    shift = tl.load(bias + columns, mask=inside, other=0.0)
    tl.store(
        out + row * width + columns, (centred * rstd * gain + shift).to(out.dtype.element_ty), mask=inside
    )


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
    block = triton.next_power_of_2(width)
    warps = max(1, min(16, block // 512))
    added = x_TD if added_TD is None else added_TD
    _norm[(num_rows,)](
        x_TD,
        added,
        weight_D,
        bias_D,
        out_TD,
        width,
        eps,
        ADDS=added_TD is not None,
        BLOCK=block,
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
    HEAD: tl.constexpr,
    BLOCK: tl.constexpr,
    TILE: tl.constexpr,
    PAIRS: tl.constexpr,
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
    out_rows = (
        out + (first_query + rows).to(tl.int64)[:, None] * num_heads * HEAD + head * HEAD + columns[None, :]
    )
    tl.store(out_rows, (sums / total[:, None]).to(out.dtype.element_ty), mask=in_tile)


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


def attend(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, tiles_C3: Tensor, tile: int) -> Tensor:
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
    """
    _, num_heads, head = q_TNH.shape
    out_TNH = torch.empty(q_TNH.shape, dtype=q_TNH.dtype, device=q_TNH.device)
    strides = q_TNH.stride(0), k_TNH.stride(0), v_TNH.stride(0)
    block = max(16, triton.next_power_of_2(head))
    grid = (len(tiles_C3) * num_heads,)
    pairs = q_TNH.dtype is torch.float32
    warps, stages = attend_options(block, pairs)
    _attend[grid](
        q_TNH,
        k_TNH,
        v_TNH,
        out_TNH,
        tiles_C3,
        *strides,
        num_heads,
        HEAD=head,
        BLOCK=block,
        TILE=tile,
        PAIRS=pairs,
        num_warps=warps,
        num_stages=stages,
    )
    return out_TNH


def attend_options(block: int, pairs: bool) -> tuple[int, int]:
    """Return the warps and stages of attention with heads of a width, in fp32 if it works with pairs."""
    return (8, 1) if pairs and block > 64 else (4, 3)
