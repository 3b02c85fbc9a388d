"""The memory that a model needs on its device, against what the device has."""

from __future__ import annotations

import math
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from dist_esm.model.checkpoints.checkpoint import tensor_shapes
from dist_esm.model.esm2 import Architecture

GROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
"""Files in which Linux says how much memory this group of processes may have."""
PACK_NUMBERS = 14
"""Numbers of the model's width that the forward holds for each token of a pack at its largest, about: the
stream, its norm, and four widths before and after the activation."""

PACKS_IN_MEMORY = 2
"""Times a pack's need is counted: the allocator keeps blocks that fit no later tensor."""
SHARE_OF_FREE = 0.95
LEAST_ROWS = 1024
"""Of a pack; a protein of 1,022 residues has 1,024 tokens."""


class Memory(NamedTuple):
    """Bytes of memory that a device has; None where the system does not say."""

    total: int | None
    free: int | None


def device_memory(device: torch.device) -> Memory:
    """Return the memory of a GPU, or of this host as far as this process may have it."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(total, free)
    limits = [limit for limit in map(group_limit, GROUP_LIMITS) if limit is not None]
    of_host = meminfo("MemTotal")
    if of_host is not None:
        limits.append(of_host + (meminfo("SwapTotal") or 0))
    return Memory(min(limits, default=None), meminfo("MemAvailable"))


def meminfo(name: str) -> int | None:
    """Return a figure of this host's memory in bytes, where Linux says it."""
    path = Path("/proc/meminfo")
    found = re.search(rf"^{name}:\s+(\d+) kB", path.read_text(), re.MULTILINE) if path.is_file() else None
    return int(found[1]) << 10 if found else None


def group_limit(path: str) -> int | None:
    """Return the limit that a file states; None if there is none."""
    with suppress(OSError, ValueError):
        return int(Path(path).read_text())
    return None


def parameter_bytes(arch: Architecture, dtype: torch.dtype) -> int:
    """Return the bytes of a model's parameters: nearly all of them are in `dtype`."""
    return dtype.itemsize * sum(math.prod(shape) for shape in tensor_shapes(arch).values())


def pack_bytes(arch: Architecture, dtype: torch.dtype, num_tokens: int) -> int:
    """Return about the bytes that the forward of one pack needs beside the parameters."""
    return PACK_NUMBERS * arch.embed_dim * dtype.itemsize * num_tokens


def rows_that_fit(arch: Architecture, dtype: torch.dtype, free: int | None, num_rows: int) -> int:
    """Halve the rows of a pack until it fits beside the model, with the memory that kernels need besides.

    Parameters
    ----------
    arch, dtype
        Of the model.
    free
        Bytes of the device's memory that are free; None: not known, and nothing is halved.
    num_rows
        Rows to begin with.
    """
    if free is None:
        return num_rows
    room = SHARE_OF_FREE * free - parameter_bytes(arch, dtype)
    while num_rows >= 2 * LEAST_ROWS and pack_bytes(arch, dtype, PACKS_IN_MEMORY * num_rows) > room:
        num_rows //= 2
    return num_rows


def refuse_what_does_not_fit(
    name: str, arch: Architecture, device: torch.device, dtype: torch.dtype, num_models: int
) -> None:
    """Refuse a model whose parameters alone are more than the device has.

    Parameters
    ----------
    name
        Of the model, for the message.
    arch, dtype
        Of the model.
    device
        A GPU, which holds one model, or the CPU.
    num_models
        Ranks of this host, each of which holds a model in the memory of a CPU.

    Raises
    ------
    ValueError
        If it does not fit.
    """
    needed = parameter_bytes(arch, dtype)
    total, free = device_memory(device)
    words = f"{name} in {str(dtype).removeprefix('torch.')} needs {size_in_words(needed)} for its parameters"
    smaller = "a smaller model, for example model=esm2_t12_35M_UR50D"
    if device.type == "cuda":
        if total is not None and needed > total:
            half = "dtype=bf16 or " if dtype.itemsize > 2 else ""
            raise ValueError(f"{words}, and {device} has {size_in_words(total)}: use {half}{smaller}")
        if free is not None and needed > free:
            rest = f"{size_in_words(free)} of {device} are free"
            raise ValueError(f"{words}, and {rest}: end what else runs on it, or use {smaller}")
    elif total is not None and needed * num_models > total:
        ranks = f" for each of {num_models} ranks" if num_models > 1 else ""
        fewer = "start fewer ranks, or " if num_models > 1 else ""
        has = f"this host has {size_in_words(total)} of memory"
        raise ValueError(f"{words}{ranks}, and {has}: {fewer}use {smaller}")


def size_in_words(num_bytes: float) -> str:
    """Return a number of bytes as people say it: 512 B, 3.4 kB, 12.5 MB, 5.7 GB, 1.2 TB."""
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.5:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.3g} TB"
