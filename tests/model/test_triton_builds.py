"""Every Triton kernel, compiled for every kind of card that it is for; no GPU is needed.

A kernel that does not compile, or asks for more shared memory than a card has, fails here and not on a
user's card.
"""

from __future__ import annotations

import pytest

triton = pytest.importorskip("triton", reason="compiling needs the package triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from dist_esm.model.kernels import triton_ops  # noqa: E402
from dist_esm.model.kernels.attention import TILE  # noqa: E402

SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""Shared memory that a program may have, by compute capability (CUDA C++ Programming Guide, technical
specifications): A100; RTX 3090 and A40; L40S and RTX 4090; H100; B200; RTX 5090."""


def build(card: int, kernel, constants: dict, options: dict, **types: str) -> int:
    """Compile a kernel, and return the bytes of shared memory of a program."""
    signature = {**types, **dict.fromkeys(constants, "constexpr")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", card, 32), options=options)
    assert f"sm_{card}" in compiled.asm["ptx"]
    assert compiled.asm["cubin"]
    return compiled.metadata.shared


@pytest.fixture(autouse=True)
def cold_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
@pytest.mark.parametrize("card", SHARED_KIB)
def test_the_passes_between_products_are_compiled_and_fit(card, dtype):
    values, floats, ints = f"*{dtype}", "*fp32", "*i32"
    shared = [
        build(
            card,
            triton_ops._norm,
            {"ADDS": True, "BLOCK": 8192},  # 15B, the widest
            {"num_warps": 16},
            x="*fp16",
            added=values,
            weight=floats,
            bias=floats,
            out=values,
            width="i32",
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
            x=floats,
            starts=ints,
            stops=ints,
            out=floats,
            width="i32",
        ),
    ]
    assert max(shared) <= SHARED_KIB[card] << 10


@pytest.mark.parametrize("head", [16, 24, 32, 64, 128], ids=["8M", "35M", "150M", "650M-3B", "15B"])
@pytest.mark.parametrize("card", SHARED_KIB)
def test_attention_is_compiled_and_fits(card, head):
    block = max(16, triton.next_power_of_2(head))
    pointers = dict.fromkeys(("q", "k", "v", "out"), "*bf16")
    numbers = dict.fromkeys(("q_stride", "k_stride", "v_stride", "num_heads"), "i32")
    shared = build(
        card,
        triton_ops._attend,
        {"HEAD": head, "BLOCK": block, "TILE": TILE},
        {"num_warps": 4, "num_stages": 3},
        **pointers,
        tiles="*i32",
        **numbers,
    )
    assert 0 < shared <= SHARED_KIB[card] << 10
