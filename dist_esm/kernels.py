"""What the device at hand can run, and the choice of what a forward is computed with.

This is the only module that asks what a device can do. An implementation that is named runs, or raises; `auto` is a choice, made
once here and logged by the caller. The implementations themselves: `attention` and `linear`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from dist_esm.attention import AttentionFunction, load_flash4, sdpa, varlen
from dist_esm.config import Attention, DeviceKind, Dtype, LinearKind
from dist_esm.linear import LinearOps, TorchLinear
from dist_esm.preload import is_installed, preload


@dataclass(frozen=True)
class Kernels:
    """What a forward is computed with."""

    attention: str
    """Name of the implementation."""
    attend: AttentionFunction
    linear: LinearOps

    def __str__(self) -> str:
        return f"attention={self.attention} linear={self.linear.name}"


PLAIN = Kernels("sdpa", sdpa, TorchLinear())
"""Runs everywhere."""

HOPPER = (9, 0)
AMPERE = (8, 0)
LEAST_HEAD = 64
"""Heads narrower than this (8M, 35M, 150M) do not fit the tiles of the Hopper kernels."""


def choose_kernels(attention: Attention, linear: LinearKind, device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernels:
    """The implementations to use on a device; `auto` is the fastest that it can run.

    Raises
    ------
    ValueError
        If one that is wanted by name cannot run on this device with this dtype and model, or lacks its package.
    """
    able = {
        "flash4": unmet(device, dtype, HOPPER, head_dim, "flash_attn.cute", "flash-attn-4"),
        "varlen": unmet(device, dtype, AMPERE),
        "quack": unmet(device, dtype, HOPPER, head_dim, "quack", "quack-kernels"),
        "triton": unmet(device, dtype, AMPERE, package="triton", name="triton"),
    }
    for key, wanted in (("attention", attention), ("linear", linear)):
        reason = able.get(wanted.name)
        if reason is not None:
            raise ValueError(f"{key}={wanted.name} needs {reason}: use {key}=auto")
    attends = [name for name in ("flash4", "varlen", "sdpa") if attention.name == name or (attention is Attention.auto and able.get(name) is None)]
    linears = [name for name in ("quack", "triton", "torch") if linear.name == name or (linear is LinearKind.auto and able.get(name) is None)]
    return Kernels(attends[0], load_attention(attends[0]), load_linear(linears[0]))


def unmet(
    device: torch.device, dtype: torch.dtype, capability: tuple[int, int], head_dim: int = LEAST_HEAD, package: str | None = None, name: str | None = None
) -> str | None:
    """What a kernel needs and does not find, in words; None if it can run."""
    found = torch.cuda.get_device_capability(device) if device.type == "cuda" else None
    if found is None or found < capability or (capability == HOPPER and found[0] != HOPPER[0]):
        which = "a Hopper GPU (compute capability 9.0)" if capability == HOPPER else "a CUDA GPU of compute capability 8.0 or newer"
        return f"{which}, this is {device.type}" + (f" with {found[0]}.{found[1]}" if found else "")
    if dtype not in (torch.bfloat16, torch.float16):
        return f"dtype=bf16 or fp16, this is {str(dtype).removeprefix('torch.')}"
    if head_dim < LEAST_HEAD:
        return f"attention heads of {LEAST_HEAD} or wider, this model's have {head_dim}"
    if package is not None and not is_installed(package):
        return f"the package {name} (pip install 'dist_esm[hopper]')"
    return None


def load_attention(name: str) -> AttentionFunction:
    """An implementation of attention by its name."""
    return load_flash4() if name == "flash4" else {"varlen": varlen, "sdpa": sdpa}[name]


def load_linear(name: str) -> LinearOps:
    """An implementation of the rest of a block by its name; each is imported only where it is used."""
    if name == "quack":
        from dist_esm.linear_quack import QuackLinear

        return QuackLinear()
    if name == "triton":
        from dist_esm.linear_triton import TritonLinear

        return TritonLinear()
    return TorchLinear()


def choose_device(wanted: DeviceKind, local_rank: int, local_world_size: int, host: str) -> torch.device:
    """This rank's device. The first place where CUDA is touched.

    Raises
    ------
    ValueError
        If CUDA is wanted and absent, or if this host has fewer visible GPUs than ranks.
    """
    if wanted is DeviceKind.cpu:
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if num_gpus == 0:
        if wanted is DeviceKind.cuda:
            raise ValueError(f"device=cuda: no CUDA GPU is visible on {host}: use device=cpu, or check CUDA_VISIBLE_DEVICES and the driver")
        return torch.device("cpu")
    if local_world_size > num_gpus:
        raise ValueError(
            f"{local_world_size} ranks were started on {host}, which has {num_gpus} visible GPU(s): "
            f"start torchrun with --nproc_per_node={num_gpus}, or use device=cpu"
        )
    preload()
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device


def choose_dtype(wanted: Dtype, device: torch.device) -> torch.dtype:
    """The dtype of parameters and matrix products: `auto` is bf16 where the GPU has it in hardware, else fp32."""
    if wanted is not Dtype.auto:
        return {Dtype.fp32: torch.float32, Dtype.bf16: torch.bfloat16, Dtype.fp16: torch.float16}[wanted]
    if device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float32
