"""The ``quack`` implementation of a block: CuTe matrix products that include the step after them.

A product is accumulated in fp32 registers. Bias, GELU, rotation or residual are applied there in fp32
(`quack_epilogues`), so values are rounded once, on the way out. Products are not split along their inner
dimension, so a row's bits depend neither on its place nor on the number of rows.

Compiled kernels are kept on disk (`kernel_cache`): the package quack-kernels is imported only to compile a
kernel that is not there.
"""

from __future__ import annotations

from functools import cache
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from dist_esm.model.kernels import kernel_cache
from dist_esm.model.kernels.linear import angles
from dist_esm.model.kernels.linear_triton import TritonPasses
from dist_esm.model.kernels.quantized import E4M3, QuantizedLinear


class Tile(NamedTuple):
    """How a product is cut: rows and columns of a tile and of a cluster of tiles.

    With `pingpong` two tiles take turns on a multiprocessor.
    """

    tile_M: int  # noqa: N815 - quack's names
    tile_N: int  # noqa: N815
    cluster_M: int  # noqa: N815
    cluster_N: int  # noqa: N815
    pingpong: bool


TILES = {
    ("rotation", False): Tile(192, 128, 1, 2, True),
    ("gelu", False): Tile(192, 128, 1, 2, True),
    ("residual", False): Tile(192, 128, 1, 2, True),
    ("rotation", True): Tile(192, 128, 1, 2, True),
    ("gelu", True): Tile(128, 160, 2, 1, True),
    ("residual", True): Tile(192, 128, 2, 1, True),
}
"""For each epilogue, and for products of e4m3 numbers (True) or of wider ones; measured, see LOG.md."""


class QuackLinear(TritonPasses):
    """A block computed with CuTe products; the remaining steps are Triton's."""

    name = "quack"
    interleaves = True
    any_rows = True
    bias_dtype: torch.dtype | None = torch.float32

    def rotary(self, positions_T: Tensor, inv_freq: Tensor) -> Tensor:
        """Return cosine and sine of each pair side by side, then as many ones and zeros; shape (T, 2 H)."""
        angles_TH = angles(positions_T, inv_freq)
        angles_TH = torch.cat((angles_TH, torch.zeros_like(angles_TH)), 1)
        return torch.stack((angles_TH.cos(), angles_TH.sin()), -1).flatten(1)

    def qkv(
        self, h_TD: Tensor, linear: nn.Linear | QuantizedLinear, rotary: Tensor, num_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Multiply by one matrix for all three; queries and keys are rotated inside the product."""
        num_rows, width = h_TD.shape
        qkv_TC = torch.empty(num_rows, 3 * width, dtype=attention_dtype(h_TD), device=h_TD.device)
        launch("rotation", a=h_TD, out=qkv_TC, turn=rotary, **parameters(linear))
        q_TNH, k_TNH, v_TNH = qkv_TC.view(num_rows, 3, num_heads, -1).unbind(1)
        return q_TNH, k_TNH, v_TNH

    def gelu(self, h_TD: Tensor, linear: nn.Linear | QuantizedLinear) -> Tensor:
        """Apply GELU inside the product."""
        out_TF = h_TD.new_empty(len(h_TD), len(linear.weight))
        gain = {"half_gain": linear.half_gain} if isinstance(linear, QuantizedLinear) else {}
        launch("gelu", a=h_TD, out=out_TF, **parameters(linear), **gain)
        return out_TF

    def residual(
        self, x_TD: Tensor, h_TD: Tensor, linear: nn.Linear | QuantizedLinear, norm: Any | None
    ) -> tuple[Tensor, Tensor]:
        """Add the product to the stream in place, inside the product."""
        launch("residual", a=h_TD, out=x_TD, **parameters(linear))
        return x_TD, x_TD if norm is None else self.norm(x_TD, norm)


def attention_dtype(h_TD: Tensor) -> torch.dtype:
    """Return the dtype of queries, keys and values: attention is not computed in e4m3."""
    return torch.bfloat16 if h_TD.dtype is E4M3 else h_TD.dtype


def parameters(linear: nn.Linear | QuantizedLinear) -> dict[str, Tensor]:
    """Return a layer's parameters by the names that products have for them."""
    if isinstance(linear, QuantizedLinear):
        return {"weight": linear.weight, "bias": linear.bias, "factor": linear.factor}
    return {"weight": linear.weight, "bias": linear.bias.unsqueeze(0)}


_kernels: dict[tuple[object, ...], kernel_cache.Kernel] = {}


def launch(epilogue: str, **tensors: Tensor) -> None:
    """Compute out = epilogue(a @ weight.T, the other tensors)."""
    shape = tensors["weight"].shape if epilogue == "rotation" else ()
    key = (epilogue, tensors["a"].dtype, tensors["out"].dtype, shape, tensors["a"].device)
    kernel = _kernels.get(key)
    if kernel is None:
        kernel = _kernels[key] = load_product(epilogue, tensors)
    kernel(tensors)


def load_product(epilogue: str, tensors: dict[str, Tensor]) -> kernel_cache.Kernel:
    """Return the kernel of a product with its epilogue for tensors of these dtypes.

    A kernel that rotates serves a single width of the model and of its heads; the others serve any.
    """
    dtypes = [str(tensors[name].dtype).removeprefix("torch.") for name in ("a", "out")]
    widths = (
        [str(tensors["a"].shape[1]), str(tensors["turn"].shape[1] // 2)] if epilogue == "rotation" else []
    )

    def compiler() -> kernel_cache.Compiled:
        from dist_esm.model.kernels.quack_epilogues import compile_product

        return compile_product(epilogue, tensors, TILES[epilogue, tensors["a"].dtype is E4M3])

    name = "-".join(["quack", epilogue, *dtypes, *widths])
    return kernel_cache.load_or_compile(name, build_fingerprint(tensors["a"].device), compiler)


@cache
def build_fingerprint(device: torch.device) -> str:
    """Return a hash of all that compiled kernels depend on: this code, the packages, the GPU."""
    about = torch.cuda.get_device_properties(device)
    packages = [version(name) for name in ("quack-kernels", "nvidia-cutlass-dsl", "apache-tvm-ffi")]
    runtime = find_spec("tvm_ffi")
    sources = [
        Path(__file__).with_name(name).read_text(encoding="utf-8")
        for name in ("linear_quack.py", "quack_epilogues.py", "kernel_cache.py")
    ]
    where = runtime.origin if runtime is not None else None
    return kernel_cache.short_hash(
        sources, packages, where, about.name, about.major, about.minor, about.multi_processor_count
    )
