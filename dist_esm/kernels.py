"""The named implementations of attention, and what the device at hand can run.

This is the only module that asks what a device can do. An implementation that is named runs, or raises; `auto` is a choice,
made once here and logged by the caller. All of them take a pack, whole proteins laid end to end, and attend within each protein:

``varlen``
    FlashAttention over ``cu_seqlens``, as shipped in torch (`torch.nn.attention.varlen`): CUDA, bf16 or fp16.
``sdpa``
    `torch.nn.functional.scaled_dot_product_attention`, one call for each protein: any device, any dtype, more launches.

Shape suffixes here and in `esm2`: T tokens of a pack, B proteins, N heads, H head width, D model width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from dist_esm.config import Attention, DeviceKind, Dtype


@dataclass(frozen=True)
class Seqlens:
    """Where each protein of a pack begins and ends."""

    bounds: list[int]
    """B + 1 token offsets on the host."""
    cu_seqlens: Tensor
    """The same as int32 on the device, FlashAttention's ``cu_seqlens``."""
    max_seqlen: int
    """Tokens of the longest protein."""

    @classmethod
    def of(cls, bounds: list[int], device: torch.device) -> Seqlens:
        """From token offsets on the host."""
        longest = max(stop - start for start, stop in pairwise(bounds))
        return cls(bounds, torch.tensor(bounds, dtype=torch.int32, device=device), longest)


AttentionFunction = Callable[[Tensor, Tensor, Tensor, Seqlens], Tensor]


def sdpa(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, seqlens: Seqlens) -> Tensor:
    """Attend within each protein by torch's own choice of kernel, one call for each; rows past the last protein are zero."""
    out_TNH = torch.zeros_like(q_TNH) if seqlens.bounds[-1] < len(q_TNH) else torch.empty_like(q_TNH)
    for start, stop in pairwise(seqlens.bounds):
        q, k, v = (x[start:stop].transpose(0, 1).unsqueeze(0) for x in (q_TNH, k_TNH, v_TNH))
        out_TNH[start:stop] = F.scaled_dot_product_attention(q, k, v).squeeze(0).transpose(0, 1)
    return out_TNH


def varlen(q_TNH: Tensor, k_TNH: Tensor, v_TNH: Tensor, seqlens: Seqlens) -> Tensor:
    """Attend within each protein in one FlashAttention launch; rows past the last protein are not defined."""
    from torch.nn.attention.varlen import varlen_attn

    cu, longest = seqlens.cu_seqlens, seqlens.max_seqlen
    out_TNH = varlen_attn(q_TNH, k_TNH, v_TNH, cu, cu, longest, longest)
    assert isinstance(out_TNH, Tensor)
    return out_TNH


def choose_attention(wanted: Attention, device: torch.device, dtype: torch.dtype) -> tuple[str, AttentionFunction]:
    """The attention to use on a device, and its name.

    Raises
    ------
    ValueError
        If the one that is wanted by name cannot run on this device with this dtype.
    """
    flash = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)
    able = flash and dtype in (torch.bfloat16, torch.float16)
    if wanted is Attention.varlen and not able:
        raise ValueError(
            f"attention=varlen needs a CUDA GPU of compute capability 8.0 or newer and dtype=bf16 or fp16, "
            f"this is {device.type} with {dtype}: use attention=auto"
        )
    if wanted is Attention.varlen or (wanted is Attention.auto and able):
        return "varlen", varlen
    return "sdpa", sdpa


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
