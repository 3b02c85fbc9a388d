"""What a rank's device says of itself while it works: memory, temperature and power."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from dist_esm.attempt import as_value


class DeviceState(NamedTuple):
    """What a device says of itself; None for what it does not say."""

    memory: int | None = None
    """Bytes: that torch holds of a GPU's memory, or of the process."""
    memory_total: int | None = None
    temperature: float | None = None
    """Degrees Celsius."""
    watts: float | None = None


def device_state(device: torch.device) -> DeviceState:
    """Ask a device how it is, without waiting for what it computes.

    Temperature and power need NVML's Python module (nvidia-ml-py). A GPU that is not in use yet says nothing,
    so that CUDA is not started by asking.
    """
    if device.type != "cuda":
        return DeviceState(memory=process_memory())
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        return DeviceState()
    temperature = as_value(torch.cuda.temperature, device)
    milliwatts = as_value(torch.cuda.power_draw, device)
    return DeviceState(
        torch.cuda.memory_reserved(device),
        torch.cuda.get_device_properties(device).total_memory,
        None if isinstance(temperature, Exception) else float(temperature),
        None if isinstance(milliwatts, Exception) else milliwatts / 1000,
    )


def process_memory() -> int | None:
    """Return the bytes of memory that this process has in use, where Linux says it."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return None
