"""The choice of device, dtype and kernels: the only module that asks what a device can do.

An implementation that is named runs, or raises. `auto` is a choice, made once here and logged by the caller.
The implementations themselves are in `attention` and `linear`.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from importlib.util import find_spec

import torch

from dist_esm.config import Attention, DeviceKind, Dtype, Fp8, LinearKind
from dist_esm.model.kernels.attention import AttentionFunction, load_triton, sdpa
from dist_esm.model.kernels.kernel_cache import import_runtime
from dist_esm.model.kernels.linear import LinearOps, TorchLinear
from dist_esm.model.kernels.quantized import E4M3


@dataclass(frozen=True)
class Kernels:
    """The implementations that a forward is computed with."""

    attention: str
    """Name of the implementation of attention."""
    attend: AttentionFunction
    linear: LinearOps
    """The rest of a block."""
    quantized: frozenset[str] = frozenset()
    """The layers of a block that multiply e4m3 numbers."""

    def __str__(self) -> str:
        e4m3 = f", e4m3 in {' '.join(sorted(self.quantized))}" if self.quantized else ""
        return f"attention={self.attention} linear={self.linear.name}{e4m3}"

    def get_ready(self, device: torch.device, width: int) -> None:
        """Import and load what the first pack would wait for, with one small sum on a GPU.

        Triton imports its compiler at the first launch, and reads all of its own files, which takes seconds
        and needs no model.
        """
        rows_TD = torch.zeros(1, width, device=device)
        with torch.cuda.device(device), torch.inference_mode():
            ends = torch.arange(2, dtype=torch.int32, device=device)
            self.linear.segment_sum(rows_TD, ends[:1], ends[1:])
        if self.linear.name == "quack":
            import_runtime()


PLAIN = Kernels("sdpa", sdpa, TorchLinear())
"""Runs everywhere."""

HOPPER = (9, 0)
AMPERE = (8, 0)
"""The first with bf16 tensor cores."""
VOLTA = (7, 0)
"""The first with fp16 tensor cores: V100, and T4 with 7.5."""
FP32_BY_PAIRS = ((8, 0), (9, 0), (10, 0))
"""A100, H100 and B200, whose tensor cores do at least 8 products of fp16 in the time of one of fp32. On other
cards, which do 2 to 4, three of fp16 may be slower."""
WIDTH_STEP = 8
"""Numbers of 16 bits that are loaded at once."""
LEAST_HEAD = 64
"""Heads narrower than this (8M, 35M, 150M) do not fit the tiles of ``quack``."""


def choose_kernels(
    attention: Attention,
    linear: LinearKind,
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    quantized: frozenset[str] = frozenset(),
) -> Kernels:
    """Choose the implementations for a device; `auto` is the fastest that the device can run.

    With layers that are `quantized`, see `quantized_products`, that is ``quack`` or none: ``torch`` computes
    them, too, if it is named, slowly, and on any device.

    Raises
    ------
    ValueError
        If an implementation that is named cannot run on this device with this dtype and model, or lacks its
        package.
    """
    no_triton = unmet_by_triton(device)
    unmet = {
        "quack": unmet_by_quack(device, dtype, head_dim),
        "triton": no_triton or unmet_width(head_dim),
        "cublas": no_triton or unmet_dtype(dtype),
        "torch": None,
    }
    attention_name = choose_by_name("attention", attention.name, {"triton": no_triton, "sdpa": None})
    if quantized and linear is not LinearKind.torch:
        linear_name = choose_for_quantized(linear, unmet["quack"])
    else:
        linear_name = choose_by_name(
            "linear", linear.name, {name: unmet[name] for name in fastest_first(device, dtype)}
        )
    attend = load_triton() if attention_name == "triton" else sdpa
    return Kernels(attention_name, attend, load_linear(linear_name, dtype), quantized)


def fastest_first(device: torch.device, dtype: torch.dtype) -> list[str]:
    """Return the names of `linear` in the order in which `auto` tries them on a device.

    In bf16 and fp16 Triton's products were measured on a Hopper GPU alone.
    """
    capability = torch.cuda.get_device_capability(device) if device.type == "cuda" else (0, 0)
    if dtype is torch.float32:
        first = ["triton", "torch"] if capability in FP32_BY_PAIRS else ["torch", "triton"]
        return [*first, "quack", "cublas"]
    return (
        ["quack", "triton", "cublas", "torch"]
        if capability == HOPPER
        else ["cublas", "triton", "torch", "quack"]
    )


def choose_for_quantized(linear: LinearKind, no_quack: str | None) -> str:
    """Return the name of the implementation for layers that multiply e4m3 numbers.

    Raises
    ------
    ValueError
        If it lacks something, or another is named.
    """
    if no_quack is not None:
        raise ValueError(f"dtype=fp8 needs {no_quack}: use dtype=auto, and leave fp8 out")
    if linear in (LinearKind.triton, LinearKind.cublas):
        raise ValueError(
            f"linear={linear.name} has no products of 8-bit numbers for dtype=fp8: use linear=auto"
        )
    return "quack"


def choose_by_name(key: str, wanted: str, unmet: dict[str, str | None]) -> str:
    """Return the name that is wanted, or for `auto` the first that can run.

    Parameters
    ----------
    key
        Key of the command line, for the message.
    wanted
        A name, or `auto`.
    unmet
        For each name, fastest first, what it lacks on this device; None: nothing.

    Raises
    ------
    ValueError
        If the implementation that is named lacks something.
    """
    if wanted == "auto":
        return next(name for name, reason in unmet.items() if reason is None)
    if unmet[wanted] is not None:
        raise ValueError(f"{key}={wanted} needs {unmet[wanted]}: use {key}=auto")
    return wanted


def unmet_by_triton(device: torch.device) -> str | None:
    """Name what Triton's kernels lack here; None if they can run."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) < AMPERE:
        return f"a CUDA GPU of compute capability 8.0 or newer, this is {capability_in_words(device)}"
    return None if is_installed("triton") else "the package triton"


def unmet_by_quack(device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Name what the CuTe products lack here; None if they can run."""
    if device.type != "cuda" or torch.cuda.get_device_capability(device) != HOPPER:
        return f"a Hopper GPU (compute capability 9.0), this is {capability_in_words(device)}"
    if head_dim < LEAST_HEAD:
        return f"attention heads of {LEAST_HEAD} or wider, this model's have {head_dim}"
    missing = (
        None
        if has_hopper_extra()
        else "the packages quack-kernels and nvidia-cutlass-dsl (pip install 'dist_esm[hopper]')"
    )
    return unmet_dtype(dtype) or missing


def has_hopper_extra() -> bool:
    """Tell whether the packages of the extra `hopper` are installed."""
    return is_installed("quack") and is_installed("cutlass")


def what_would_be_faster(linear: LinearKind, device: torch.device, dtype: torch.dtype, head_dim: int) -> str:
    """Say what to install so that `linear=auto` is faster on this device; "" if nothing is known to help."""
    is_hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) == HOPPER
    wants_products = linear is LinearKind.auto and unmet_dtype(dtype) is None and head_dim >= LEAST_HEAD
    if not is_hopper or not wants_products or has_hopper_extra():
        return ""
    return (
        "pip install 'dist_esm[hopper]' makes this card up to 1.2 times as fast "
        "(1.21 with 650M and 1.12 with 3B, measured on an H100 against linear=cublas)"
    )


def is_installed(package: str) -> bool:
    """Tell whether a package can be imported."""
    return find_spec(package) is not None


def unmet_width(head_dim: int) -> str | None:
    """Name what Triton's products lack with heads of a width; None if they can compute them."""
    if head_dim % WIDTH_STEP == 0:
        return None
    return f"attention heads of a multiple of {WIDTH_STEP} channels, this model's have {head_dim}"


def unmet_dtype(dtype: torch.dtype) -> str | None:
    """Name what Triton's kernels and the CuTe products lack with a dtype; None if they can compute in it."""
    return (
        None
        if dtype in (torch.bfloat16, torch.float16)
        else f"dtype=bf16 or fp16, this is {str(dtype).removeprefix('torch.')}"
    )


def capability_in_words(device: torch.device) -> str:
    """Return the type of a device, and a GPU's compute capability."""
    return (
        "cuda with {}.{}".format(*torch.cuda.get_device_capability(device))
        if device.type == "cuda"
        else device.type
    )


def load_linear(name: str, dtype: torch.dtype) -> LinearOps:
    """Import an implementation of the rest of a block by its name, and return the one for a dtype."""
    if name == "quack":
        from dist_esm.model.kernels.linear_quack import QuackLinear

        return QuackLinear()
    if name == "triton" and dtype is torch.float32:
        from dist_esm.model.kernels.linear_pairs import PairsLinear

        return PairsLinear()
    if name in ("triton", "cublas"):
        from dist_esm.model.kernels.linear_triton import CublasLinear, TritonLinear

        return TritonLinear() if name == "triton" else CublasLinear()
    return TorchLinear()


def choose_device(wanted: DeviceKind, local_rank: int, local_world_size: int, host: str) -> torch.device:
    """Choose this rank's device. Nothing touches CUDA before this call.

    Raises
    ------
    ValueError
        If CUDA is wanted and absent, if the GPU cannot be used by this torch, or if this host has fewer
        visible GPUs than ranks.
    """
    if wanted is DeviceKind.cpu:
        return torch.device("cpu")
    num_gpus = torch.cuda.device_count()
    if num_gpus == 0:
        if wanted is DeviceKind.cuda:
            raise ValueError(no_gpu(host))
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(
            f"{host} has {num_gpus} GPU(s) that torch {torch.__version__} cannot use: update the driver or "
            f"install a torch for an older CUDA, {why_no_cuda()}; or use device=cpu"
        )
    if local_world_size > num_gpus:
        raise ValueError(
            f"{local_world_size} ranks were started on {host}, which has {num_gpus} visible GPU(s): "
            f"start torchrun with --nproc_per_node={num_gpus}, or use device=cpu"
        )
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    refuse_unless_built_for(device)
    return device


def no_gpu(host: str) -> str:
    """Say in one line why there is no GPU to use."""
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"device=cuda: torch {torch.__version__} is built without CUDA: "
            "install a torch that has it, or use device=cpu"
        )
    return (
        f"device=cuda: no CUDA GPU is visible on {host}: "
        "use device=cpu, or check CUDA_VISIBLE_DEVICES and the driver"
    )


def why_no_cuda() -> str:
    """Return what CUDA says of a GPU that cannot be used."""
    try:
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as error:  # the second in a torch without CUDA
        return f"which says: {' '.join(str(error).split('.')[0].split())}"
    return "which does not say why"


def refuse_unless_built_for(device: torch.device) -> None:
    """Refuse a GPU for which this torch has no kernels.

    Raises
    ------
    ValueError
        If it has none.
    """
    major, minor = torch.cuda.get_device_capability(device)
    built_for = [name for name in torch.cuda.get_arch_list() if name.startswith(("sm_", "compute_"))]
    if built_for and not any(runs_on(name, major, minor) for name in built_for):
        raise ValueError(
            f"torch {torch.__version__} has no kernels for {torch.cuda.get_device_name(device)} (compute "
            f"capability {major}.{minor}; it is built for {' '.join(built_for)}): install a torch that has "
            "them, or use device=cpu"
        )


def runs_on(architecture: str, major: int, minor: int) -> bool:
    """Return whether code for an architecture, such as `sm_80` or `compute_90`, runs on a GPU.

    Machine code (`sm`) runs on later minor versions, what is compiled on the spot (`compute`) on all later.
    """
    kind, number = re.match(r"(\w+)_(\d+)", architecture).groups()  # type: ignore[union-attr]
    built = divmod(int(number), 10)
    return built <= (major, minor) and (kind == "compute" or built[0] == major)


def quantized_products(dtype: Dtype, fp8: Fp8) -> frozenset[str]:
    """Return the layers of a block that multiply e4m3 numbers; none but for `dtype=fp8`."""
    if dtype is not Dtype.fp8:
        return frozenset()
    return frozenset({Fp8.all: ("qkv", "out", "fc1", "fc2"), Fp8.ffn: ("fc1", "fc2")}[fp8])


def precision_of(dtype: torch.dtype, kernels: Kernels) -> torch.dtype:
    """Return the dtype that decides how exact a model's numbers are: its own, or e4m3."""
    return E4M3 if kernels.quantized else dtype


def choose_dtype(wanted: Dtype, device: torch.device) -> torch.dtype:
    """Choose the dtype of parameters and matrix products; for fp8 that of all products but the quantized.

    `auto` is bf16 where the GPU has it, fp16 where it has tensor cores for that alone (V100, T4), else fp32.
    """
    if wanted is not Dtype.auto:
        return {
            Dtype.fp32: torch.float32,
            Dtype.bf16: torch.bfloat16,
            Dtype.fp16: torch.float16,
            Dtype.fp8: torch.bfloat16,
        }[wanted]
    if device.type != "cuda":
        return torch.float32
    if torch.cuda.is_bf16_supported(including_emulation=False):
        return torch.bfloat16
    return torch.float16 if torch.cuda.get_device_capability(device) >= VOLTA else torch.float32
