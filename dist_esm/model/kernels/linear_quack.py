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
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dist_esm.model.kernels import kernel_cache
from dist_esm.model.kernels.linear import angles
from dist_esm.model.kernels.linear_triton import TritonPasses


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
    "rotation": Tile(192, 128, 1, 2, True),
    "gelu": Tile(192, 128, 1, 2, True),
    "residual": Tile(192, 128, 1, 2, True),
}
"""Measured on an H100, see LOG.md."""


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
        self, h_TD: Tensor, linear: nn.Linear, rotary: Tensor, num_heads: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Multiply by one matrix for all three; queries and keys are rotated inside the product."""
        num_rows, width = h_TD.shape
        qkv_TC = h_TD.new_empty(num_rows, 3 * width)
        launch(
            "rotation", a=h_TD, weight=linear.weight, bias=linear.bias.unsqueeze(0), turn=rotary, out=qkv_TC
        )
        q_TNH, k_TNH, v_TNH = qkv_TC.view(num_rows, 3, num_heads, -1).unbind(1)
        return q_TNH, k_TNH, v_TNH

    def gelu(self, h_TD: Tensor, linear: nn.Linear) -> Tensor:
        """Apply GELU inside the product."""
        out_TF = h_TD.new_empty(len(h_TD), len(linear.weight))
        launch("gelu", a=h_TD, weight=linear.weight, bias=linear.bias.unsqueeze(0), out=out_TF)
        return out_TF

    def residual(
        self, x_TD: Tensor, h_TD: Tensor, linear: nn.Linear, norm: nn.LayerNorm | None
    ) -> tuple[Tensor, Tensor]:
        """Add the product to the stream in place, inside the product."""
        launch("residual", a=h_TD, weight=linear.weight, bias=linear.bias.unsqueeze(0), out=x_TD)
        return x_TD, x_TD if norm is None else self.norm(x_TD, norm, h_TD.dtype)


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

        return compile_product(epilogue, tensors, TILES[epilogue])

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
