"""Every Triton kernel, compiled for every kind of card that it is for; no GPU is needed.

A kernel that does not compile, or asks for more shared memory than a card has, fails here and not on a
user's card.
"""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton", reason="compiling needs the package triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from dist_esm.model.kernels import triton_ops, triton_pairs, triton_products  # noqa: E402
from dist_esm.model.kernels.attention import TILE  # noqa: E402

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory that a program may have, by compute capability (CUDA C++ Programming Guide, technical
specifications): A100; RTX 3090 and A40; L40S and RTX 4090; H100; B200; RTX 5090."""
TWINS = {86: pytest.mark.slow}
"""It has the shared memory and the instructions of 89."""
CARDS = [pytest.param(card, marks=TWINS.get(card, ())) for card in SHARED_KIB]


def build(
    card: int, kernel, constants: dict, options: dict, unaligned: tuple[str, ...] = (), **types: str
) -> int:
    """Compile a kernel, and return the bytes of shared memory of a program.

    Addresses and sizes are multiples of 16, as they are in a model, but for those that are unaligned.
    """
    kinds = {**types, **dict.fromkeys(constants, "constexpr")}
    signature = {name: kinds[name] for name in kernel.arg_names}
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, (name, kind) in enumerate(signature.items())
        if kind.startswith(("*", "i")) and name not in unaligned
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)
    assert f"sm_{card}" in compiled.asm["ptx"]
    assert compiled.asm["cubin"]
    return compiled.metadata.shared


@pytest.fixture(autouse=True)
def cold_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("card", CARDS)
def test_the_passes_between_products_are_compiled_and_fit(card, dtype):
    values, floats, ints = f"*{dtype}", "*fp32", "*i32"
    shared = [
        build(
            card,
            triton_ops._norm,
            {"ADDS": True, "WIDTH": 5120, "CHUNK": 1024},  # 15B, the widest
            {"num_warps": 4},
            x="*fp16",
            added=values,
            weight=floats,
            bias=floats,
            out=values,
            eps="fp32",
        ),
        build(
            card,
            triton_ops._rotate,
            {"HALF": 64, "BLOCK": 64, "HEADS": 16},
            {"num_warps": 4},
            qkv=values,
            cos=floats,
            sin=floats,
            stride="i32",
            num_heads="i32",
        ),
        build(card, triton_ops._gelu, {"BLOCK": 4096}, {"num_warps": 8}, x=values, size="i32"),
        build(
            card,
            triton_ops._segment_sum,
            {"ROWS": 16, "COLUMNS": 128},
            {"num_warps": 4},
            ("starts", "stops"),
            x=floats,
            starts=ints,
            stops=ints,
            out=floats,
            width="i32",
        ),
    ]
    assert max(shared) <= SHARED_KIB[card] << 10


@pytest.mark.parametrize("card", CARDS)
def test_the_passes_in_fp32_are_compiled_and_fit(card):
    floats, pairs = "*fp32", "*fp16"
    shared = [
        build(
            card,
            triton_pairs._norm,
            {"BLOCK": 8192, "PAIRS": is_for_product},
            {"num_warps": 16},
            x=floats,
            weight=floats,
            bias=floats,
            out=pairs if is_for_product else floats,
            width="i32",
            eps="fp32",
        )
        for is_for_product in (False, True)
    ]
    shared.append(
        build(
            card, triton_pairs._to_pairs, {"BLOCK": 1024}, {"num_warps": 4}, x=floats, out=pairs, width="i32"
        )
    )
    assert max(shared) <= SHARED_KIB[card] << 10


LARGE_HEADS = [(128, "bf16"), (128, "fp32")]
"""Of the 15B model, which take the most shared memory."""
OTHER_HEADS = [(16, "bf16"), (24, "bf16"), (32, "bf16"), (64, "bf16"), (24, "fp32"), (64, "fp32")]
TENSOR_CORES = [80, 90, 100]
"""A card of each kind: mma (as have 86, 89 and 120), wgmma, tcgen05."""


@pytest.mark.parametrize(
    ("card", "head", "dtype"),
    [
        *(
            pytest.param(card, *case, marks=TWINS.get(card, ()))
            for card in SHARED_KIB
            for case in LARGE_HEADS
        ),
        *((card, *case) for card in TENSOR_CORES for case in OTHER_HEADS),
    ],
)
def test_attention_is_compiled_and_fits(card, head, dtype):
    block = max(16, triton.next_power_of_2(head))
    pairs = dtype == "fp32"
    warps, stages = triton_ops.attend_options(block, pairs)
    shared = build(
        card,
        triton_ops._attend,
        {"HEAD": head, "BLOCK": block, "TILE": TILE, "PAIRS": pairs, "SCALES": False},
        {"num_warps": warps, "num_stages": stages},
        ("tiles", "num_heads"),
        **dict.fromkeys(("q", "k", "v", "out"), f"*{dtype}"),
        tiles="*i32",
        scale="fp32",
        **dict.fromkeys(("q_stride", "k_stride", "v_stride", "num_heads"), "i32"),
    )
    assert 0 < shared <= SHARED_KIB[card] << 10


@pytest.mark.parametrize("head", [64, 128], ids=["650M-3B", "15B"])
def test_what_fp8_needs_is_compiled_for_hopper_and_fits(head):
    shared = [
        build(
            90,
            triton_ops._attend,
            {"HEAD": head, "BLOCK": head, "TILE": TILE, "PAIRS": False, "SCALES": True},
            {"num_warps": 4, "num_stages": 3},
            ("tiles", "num_heads"),
            **dict.fromkeys(("q", "k", "v"), "*bf16"),
            out="*u16",
            tiles="*i32",
            scale="fp32",
            **dict.fromkeys(("q_stride", "k_stride", "v_stride", "num_heads"), "i32"),
        ),
        build(
            90,
            triton_ops._round_block,
            {"WIDTH": 128, "BLOCK": 128, "ROWS": 16},
            {"num_warps": 4},
            **dict.fromkeys(("weight", "factors", "errors"), "*fp32"),
            rounded="*fp8e4nv",
            num_rows="i32",
        ),
    ]
    assert max(shared) <= SHARED_KIB[90] << 10


@pytest.mark.parametrize("dtype", ["bf16", "pairs"])
@pytest.mark.parametrize("epilogue", ["gelu", "residual", "rotation"])
@pytest.mark.parametrize("card", CARDS)
def test_products_are_compiled_and_fit(card, epilogue, dtype):
    pairs = dtype == "pairs"
    tile = triton_products.tile_for(divmod(card, 10), epilogue, pairs)
    operand = "fp16" if pairs else dtype
    out = {"gelu": operand, "residual": "fp32" if pairs else "fp16", "rotation": "fp32" if pairs else dtype}
    absent = [] if tile.by_tma else ["a_tiles", "weight_tiles"]
    absent += [] if tile.stores_by_tma else ["out_tiles"]
    absent += [] if epilogue == "rotation" else ["turn"]
    constants = triton_products.constants_of(tile, epilogue, 64, pairs, width=1280) | dict.fromkeys(absent)
    types = {
        "a": f"*{operand}",
        "a_tiles": f"tensordesc<{operand}[{tile.rows},{tile.depth}]>",
        "weight": f"*{operand}",
        "weight_tiles": f"tensordesc<{operand}[{tile.columns},{tile.depth}]>",
        "out": f"*{out[epilogue]}",
        "out_tiles": f"tensordesc<{out[epilogue]}[{tile.rows},{tile.columns // tile.parts}]>",
        "bias": "*fp32",
        "turn": "*fp32",
        **dict.fromkeys(("num_rows", "num_columns", "width"), "i32"),
    }
    shared = build(
        card,
        triton_products._product,
        constants,
        {"num_warps": tile.warps, "num_stages": tile.stages},
        ("num_rows",),
        **{name: kind for name, kind in types.items() if name not in absent},
    )
    assert 0 < shared <= SHARED_KIB[card] << 10
