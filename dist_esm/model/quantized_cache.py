"""A model whose layers were rounded to 8 bits, kept on disk beside the compiled kernels.

To round a model takes seconds on a GPU and minutes on a CPU, and gives the same bits each time. So the whole
of it is kept, embeddings and norms included: the next start reads this file in place of the checkpoint.

A file is used only if all that its bits depend on is in its name, if it is this user's own, and if all its
bytes have their checksums. It is made once for the weights, the products, the kernels and the device; that of
other code is removed first. Weights that are drawn at random are not kept: each seed would be another file.
"""

from __future__ import annotations

import logging
import os
import platform
import shutil
from contextlib import ExitStack
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, cast

import torch
from filelock import FileLock, Timeout
from torch import nn

from dist_esm.atomic import atomically, size_of
from dist_esm.attempt import as_value
from dist_esm.fasta import tokens
from dist_esm.model.checkpoints.files import check_archive, read_table, read_torch
from dist_esm.model.esm2 import ESM2, Architecture, Layer
from dist_esm.model.kernels import kernel_cache
from dist_esm.model.kernels.choose import Kernels
from dist_esm.model.kernels.quantized import E4M3, QuantizedLinear
from dist_esm.model.memory import size_in_words
from dist_esm.model.quantize import PROTEINS

log = logging.getLogger("dist_esm")

PACKAGES = ("triton", "quack-kernels", "nvidia-cutlass-dsl", "apache-tvm-ffi")
"""Besides torch, the packages that compute what is kept, where they are installed."""
NOT_KEPT = "the rounded weights cannot be kept, every start rounds them anew: %s"
OF_A_CPU = ("vendor_id", "model name", "flags", "CPU", "Features")
"""Beginnings of the lines of /proc/cpuinfo that tell one kind of CPU from another."""

SETTINGS = (
    *("ATEN_CPU_CAPABILITY", "DNNL_MAX_CPU_ISA", "ONEDNN_MAX_CPU_ISA", "MKL_CBWR", "MKL_ENABLE_INSTRUCTIONS"),
    *("CUBLAS_WORKSPACE_CONFIG", "NVIDIA_TF32_OVERRIDE"),
)
"""Environment variables that make the libraries below torch compute by other instructions or kernels."""


def kept_path(
    weights: str, arch: Architecture, dtype: torch.dtype, kernels: Kernels, device: torch.device
) -> Path | None:
    """Return where the rounded model is kept: ``e4m3-WHAT-CODE.pt`` in the cache.

    If this user has no place for a cache, that is None, and a warning says so.

    Parameters
    ----------
    weights
        Fingerprint of the weights.
    arch, dtype, kernels, device
        Of the model.
    """
    folder = as_value(kernel_cache.cache_dir)
    if isinstance(folder, Exception):
        log.warning(NOT_KEPT, folder)
        return None
    what = kernel_cache.short_hash(weights, str(arch), str(dtype), str(kernels), about_device(device))
    return folder / f"e4m3-{what}-{code_hash()}.pt"


def about_device(device: torch.device) -> tuple[object, ...]:
    """Return all that results depend on in a device and the environment's settings of its libraries.

    On a CPU products may differ with its threads.
    """
    settings = [os.environ.get(name) for name in SETTINGS]
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        precision = torch.backends.cuda.matmul.fp32_precision
        return about.name, about.major, about.minor, about.multi_processor_count, precision, settings
    text = as_value(Path("/proc/cpuinfo").read_text, "utf-8")
    first = platform.processor() if isinstance(text, Exception) else text.partition("\n\n")[0]
    kind = [line for line in first.splitlines() if line.startswith(OF_A_CPU)] or first
    precision = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    return kind, torch.get_num_threads(), precision, settings


@cache
def code_hash() -> str:
    """Return a hash of this folder's code, of the proteins that it rounds with, and of the packages."""
    folder = Path(__file__).parent
    files = [*sorted(folder.rglob("*.py")), PROTEINS, Path(tokens.__file__)]
    sources = [(file.name, file.read_bytes()) for file in files]
    versions = [str(as_value(version, package)) for package in PACKAGES]  # or that it is not installed
    return kernel_cache.short_hash(sources, torch.__version__, versions)


def recall(path: Path, arch: Architecture, kernels: Kernels, device: torch.device) -> ESM2 | None:
    """Return the model that is kept there, on its device; None if there is none that can be used."""
    if isinstance(as_value(kernel_cache.refuse_if_not_ours, path.parent), Exception):
        return None  # `keep` says why
    content = as_value(read_kept, path)
    if isinstance(content, Exception):
        if not isinstance(content, FileNotFoundError):
            reason = f"{path} is damaged" if isinstance(content, ValueError) else content
            log.warning("the weights are rounded again, not taken from disk: %s", reason)
        return None
    with torch.device("meta"):
        model = ESM2(arch, kernels)
        for name, input_scale in content["input_scales"].items():
            linear = cast(nn.Linear, model.get_submodule(name))
            weight_CK, factor_C = torch.empty_like(linear.weight, dtype=E4M3), torch.empty_like(linear.bias)
            model.set_submodule(name, QuantizedLinear(weight_CK, factor_C, factor_C, input_scale))
    # Copied, so that the model does not depend on the file any more.
    state = {name: tensor.to(device, copy=True) for name, tensor in content["state"].items()}
    model.load_state_dict(state, assign=True)
    for layer in cast(list[Layer], list(model.layers)):
        layer.attention_norm.rounds_to = layer.qkv.weight.dtype
        layer.ffn_norm.rounds_to = layer.fc1.weight.dtype
    model.final_norm.rounds_to = model.final_norm.weight.dtype
    log.info("rounded weights are taken from %s", path)
    return model


def read_kept(path: Path) -> dict[str, Any]:
    """Read what `write` wrote; tensors are mapped into memory.

    Raises
    ------
    OSError
        If it is not there, or others can write to it.
    ValueError
        If some of its bytes are not those that were written, or they were written under another name.
    """
    kernel_cache.refuse_if_not_ours(path)
    check_archive(path, read_table(path))
    content = read_torch(path)
    if not isinstance(content, dict) or content.get("name") != path.name:
        raise ValueError(f"{path} is not what its name says")
    return content


def keep(model: ESM2, path: Path) -> None:
    """Keep a model that was rounded. If it cannot be kept, a warning says so."""
    error = as_value(write, model, path)
    if isinstance(error, Exception):
        log.warning(NOT_KEPT, f"{path}: {error}")


def write(model: ESM2, path: Path) -> None:
    """Write a model into the cache, unless another rank does or did so; remove those of other code.

    Raises
    ------
    Exception
        If it cannot be written.
    """
    kernel_cache.make_own_folder(path.parent)
    with ExitStack() as held:
        # Without a lock (a file system that has none) ranks write side by side, whole files by a rename.
        lock = FileLock(path.with_suffix(".lock"), timeout=0)
        if isinstance(as_value(held.enter_context, lock), Timeout):
            return  # another rank is writing it
        if isinstance(as_value(read_kept, path), dict):
            return  # another rank has written it meanwhile
        what = path.stem.rpartition("-")[0]
        for pattern in (f"{what}-*", f".{what}-*.tmp"):
            for other in path.parent.glob(pattern):
                if other.stem != path.stem:
                    other.unlink(missing_ok=True)
        state, modules = model.state_dict(), model.named_modules()
        num_bytes, free = sum(tensor.nbytes for tensor in state.values()), shutil.disk_usage(path.parent).free
        if free < num_bytes:
            raise OSError(f"it takes {size_in_words(num_bytes)}, and {size_in_words(free)} are free")
        content = {
            "name": path.name,
            "state": {name: tensor.cpu() for name, tensor in state.items()},
            "input_scales": {
                name: one.input_scale for name, one in modules if isinstance(one, QuantizedLinear)
            },
        }
        with atomically(path) as beside:
            with beside.open("wb") as file:
                torch.save(content, file)
            beside.chmod(0o600)  # whatever the umask: what others could write is not loaded
    log.info("rounded weights are kept for the next start: %s (%s)", path, size_in_words(size_of(path)))
