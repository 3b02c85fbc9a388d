"""fair-esm's checkpoints to an `ESM2` on a device: located or fetched, checked, copied to device and dtype.

The file is memory-mapped and each tensor is copied once, so a rank holds neither a random initialisation nor
an fp32 copy of the model. The contact-regression file that fair-esm asks for is not needed: contacts are not
computed here.

``weights=random`` draws seeded weights on the device itself, for tests and benchmarks. They are the same on
every device of a kind.
"""

from __future__ import annotations

import argparse
import hashlib
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from pickle import UnpicklingError
from urllib.error import URLError

import torch
from torch import Tensor, nn

from dist_esm.config import ModelConfig
from dist_esm.fasta.tokens import token_table
from dist_esm.model.esm2 import ESM2, TOKEN_DROPOUT_FACTOR, Architecture, Layer
from dist_esm.model.kernels.choose import Kernels

URL = "https://dl.fbaipublicfiles.com/fair-esm/models/{name}.pt"
RANDOM = "random"
KNOWN = {
    Architecture(6, 320, 20): "esm2_t6_8M_UR50D",
    Architecture(12, 480, 20): "esm2_t12_35M_UR50D",
    Architecture(30, 640, 20): "esm2_t30_150M_UR50D",
    Architecture(33, 1280, 20): "esm2_t33_650M_UR50D",
    Architecture(36, 2560, 40): "esm2_t36_3B_UR50D",
    Architecture(48, 5120, 40): "esm2_t48_15B_UR50D",
}
_PREFIX = re.compile(r"^encoder\.(sentence_encoder\.)?")


def architecture(config: ModelConfig) -> Architecture:
    """Return the architecture that a configuration names."""
    return Architecture(config.num_layers, config.embed_dim, config.attention_heads)


def locate(config: ModelConfig) -> Path | None:
    """Return where the checkpoint is or will be; None for random weights.

    That is the path given, or fair-esm's own place in torch hub's cache.
    """
    if config.weights == RANDOM:
        return None
    if config.weights is not None:
        return Path(config.weights).expanduser()
    return Path(torch.hub.get_dir()) / "checkpoints" / f"{config.name}.pt"


def fetch(config: ModelConfig) -> None:
    """Make sure that the checkpoint is there, downloading it into torch hub's cache if need be.

    Raises
    ------
    ValueError
        If a path that was given does not exist, or if the download fails.
    """
    path = locate(config)
    if path is None or path.is_file():
        return
    if config.weights is not None:
        raise ValueError(
            f"model.weights={config.weights} is not a file: "
            "name a fair-esm checkpoint, or use null (download) or random"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    url = URL.format(name=config.name)
    try:
        torch.hub.download_url_to_file(url, str(path), progress=False)
    except (URLError, OSError) as error:
        reason = getattr(error, "reason", error)
        remedy = "put the file there, or name it with model.weights=PATH"
        raise ValueError(f"{path} is missing and {url} cannot be downloaded ({reason}): {remedy}") from None


def weights_id(config: ModelConfig) -> str:
    """Return a fingerprint of the weights.

    It is taken from the checksums that the checkpoint's archive holds of each tensor, so no tensor is read.
    """
    path = locate(config)
    if path is None:
        return f"random-{config.seed}"
    digest = hashlib.sha256()
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for entry in sorted(archive.infolist(), key=lambda entry: entry.filename.partition("/")[2]):
                digest.update(
                    f"{entry.filename.partition('/')[2]} {entry.file_size} {entry.CRC:08x}\n".encode()
                )
    else:
        with path.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
    return digest.hexdigest()[:32]


def load_model(config: ModelConfig, device: torch.device, dtype: torch.dtype, kernels: Kernels) -> ESM2:
    """Return an ESM-2 in eval mode: matrix products in `dtype`, norms and embeddings in fp32 or wider.

    Raises
    ------
    ValueError
        If the checkpoint is damaged, incomplete or of another architecture.
    """
    with torch.device("meta"):
        model = ESM2(architecture(config), kernels)
    fill_parameters(model, tensor_source(config, device), device, dtype)
    return model.eval().requires_grad_(False)


def tensor_source(config: ModelConfig, device: torch.device) -> Callable[[str], Tensor]:
    """Return a function that gives each tensor by fair-esm's name.

    A checkpoint's tensors may be asked for in any order. Random ones are drawn in the order in which they are
    asked for.

    Raises
    ------
    ValueError
        If the checkpoint is damaged, incomplete or of another architecture.
    """
    arch = architecture(config)
    path = locate(config)
    if path is not None:
        return read_checkpoint(path, arch, config.name).__getitem__
    shapes = tensor_shapes(arch)
    generator = torch.Generator(device).manual_seed(config.seed)
    return lambda name: random_tensor(name, shapes[name], arch.num_layers, generator)


def fair_esm_tensors(config: ModelConfig, device: torch.device) -> Iterator[tuple[str, Tensor]]:
    """Yield fair-esm's names and tensors: the numbers of `load_model` on the same device, random ones too.

    Raises
    ------
    ValueError
        As `load_model`.
    """
    shapes = tensor_shapes(architecture(config))
    asked: list[str] = []

    def ask(name: str) -> Tensor:
        asked.append(name)
        return torch.empty(shapes[name], device="meta")

    with torch.device("meta"):
        model = ESM2(architecture(config))
    fill_parameters(model, ask, torch.device("meta"), torch.float32)
    tensor = tensor_source(config, device)
    for name in dict.fromkeys((*asked, *shapes)):
        yield name, tensor(name)


def tensor_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Return fair-esm's names of the tensors that the forward needs, with their shapes."""
    width = arch.embed_dim
    norm = {"weight": (width,), "bias": (width,)}
    layer: dict[str, tuple[int, ...]] = {}
    for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
        layer |= {f"self_attn.{name}.weight": (width, width), f"self_attn.{name}.bias": (width,)}
    for name, rows, columns in (("fc1", 4 * width, width), ("fc2", width, 4 * width)):
        layer |= {f"{name}.weight": (rows, columns), f"{name}.bias": (rows,)}
    for name in ("self_attn_layer_norm", "final_layer_norm"):
        layer |= {f"{name}.{part}": shape for part, shape in norm.items()}
    layer["self_attn.rot_emb.inv_freq"] = (arch.head_dim // 2,)
    shapes: dict[str, tuple[int, ...]] = {"embed_tokens.weight": (token_table().num_tokens, width)}
    shapes |= {
        f"layers.{index}.{name}": shape for index in range(arch.num_layers) for name, shape in layer.items()
    }
    return shapes | {f"emb_layer_norm_after.{part}": shape for part, shape in norm.items()}


def read_checkpoint(path: Path, arch: Architecture, name: str) -> Mapping[str, Tensor]:
    """Return fair-esm's tensors of a checkpoint, memory-mapped, by their names without the encoder prefixes.

    Raises
    ------
    ValueError
        If the file is not a readable checkpoint of this architecture with all its tensors.
    """
    with open(path, "rb") as file:
        starts_as_zip = file.read(2) == b"PK"
    is_zip = zipfile.is_zipfile(path)
    if starts_as_zip and not is_zip:
        raise ValueError(
            f"{path} is truncated: {path.stat().st_size} bytes without the end of the archive; "
            "remove it and fetch it again"
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except (RuntimeError, UnpicklingError, EOFError, ValueError, KeyError, zlib.error) as error:
        raise ValueError(
            f"{path} cannot be read as a fair-esm checkpoint: {str(error).splitlines()[0]}"
        ) from None
    tensors = content.get("model") if isinstance(content, dict) else None
    if not isinstance(tensors, dict):
        raise ValueError(f"{path} is no fair-esm checkpoint: it has no entry 'model'")
    state = {_PREFIX.sub("", key): value for key, value in tensors.items()}
    _check_architecture(path, state, arch, name)
    shapes = tensor_shapes(arch)
    missing = [key for key in shapes if key not in state]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(f"{path} lacks {shown}: it is not a whole {name}")
    wrong = next((key for key, shape in shapes.items() if tuple(state[key].shape) != shape), None)
    if wrong is not None:
        raise ValueError(
            f"{path}: {wrong} has shape {tuple(state[wrong].shape)}, {name} wants {shapes[wrong]}"
        )
    settings = content.get("cfg", {}).get("model") if isinstance(content.get("cfg"), dict) else None
    if not getattr(settings, "token_dropout", True):
        raise ValueError(
            f"{path} was trained without token dropout: no ESM-2 is, and its embeddings would be "
            "scaled wrongly"
        )
    return state


def _check_architecture(path: Path, state: Mapping[str, Tensor], arch: Architecture, name: str) -> None:
    embedding = state.get("embed_tokens.weight")
    layers = [int(key.split(".")[1]) for key in state if re.match(r"layers\.\d+\.", key)]
    frequencies = state.get("layers.0.self_attn.rot_emb.inv_freq")
    if embedding is None or embedding.ndim != 2 or not layers or frequencies is None:
        raise ValueError(
            f"{path} is no ESM-2 checkpoint: it lacks embed_tokens, layers or rotary frequencies"
        )
    width = embedding.shape[1]
    actual = Architecture(max(layers) + 1, width, width // (2 * len(frequencies)))
    if actual != arch:
        known = KNOWN.get(actual)
        remedy = f"use model={known}" if known else "name the checkpoint of that model"
        raise ValueError(
            f"{path} holds {known or 'another model'} ({actual}), but model={name} has {arch}: {remedy}"
        )


def random_tensor(name: str, shape: tuple[int, ...], num_layers: int, generator: torch.Generator) -> Tensor:
    """Draw a seeded tensor for fair-esm's name, scaled so that activations stay near 1 at any depth."""
    device = generator.device
    if name.endswith("inv_freq"):
        return 1.0 / (10000 ** (torch.arange(shape[0], device=device).float() / shape[0]))
    if "layer_norm" in name:
        values = torch.randn(shape, generator=generator, device=device) * 0.1
        return values + 1 if name.endswith("weight") else values
    scale = 0.02 if name.endswith("bias") else 1.0 if name.startswith("embed") else shape[1] ** -0.5
    if "out_proj" in name or "fc2" in name:
        scale /= (2 * num_layers) ** 0.5
    return torch.randn(shape, generator=generator, device=device) * scale


def fill_parameters(
    model: ESM2, tensor: Callable[[str], Tensor], device: torch.device, dtype: torch.dtype
) -> None:
    """Create the model's parameters on the device from fair-esm's tensors, in the order its kernels want.

    The softmax scale becomes part of the query's projection.
    """
    ops, heads = model.kernels.linear, model.arch.attention_heads
    scale, wide = model.arch.head_dim**-0.5, torch.promote_types(dtype, torch.float32)

    def get(name: str) -> Tensor:
        return tensor(name).to(device)

    def put(module: nn.Module, part: str, to: torch.dtype, *sources: Tensor) -> None:
        target = torch.empty(
            (sum(len(source) for source in sources), *sources[0].shape[1:]), dtype=to, device=device
        )
        first = 0
        for source in sources:
            target[first : first + len(source)].copy_(source)
            first += len(source)
        setattr(module, part, nn.Parameter(target, requires_grad=False))

    def turned(name: str) -> Tensor:
        """Return the rows of queries or keys; pairs that rotate lie side by side if kernels want that."""
        rows = get(name).to(wide)
        return (
            rows.view(heads, 2, -1, *rows.shape[1:]).transpose(1, 2).flatten(0, 2)
            if ops.interleaves
            else rows
        )

    put(model.embed_tokens, "weight", wide, get("embed_tokens.weight").to(wide) * TOKEN_DROPOUT_FACTOR)
    model.stream_table = ops.to_stream(model.embed_tokens.weight)
    for index, layer in enumerate(model.layers):
        assert isinstance(layer, Layer)
        prefix = f"layers.{index}"
        for part, to in (("weight", dtype), ("bias", ops.bias_dtype or dtype)):
            queries, keys = (
                turned(f"{prefix}.self_attn.q_proj.{part}") * scale,
                turned(f"{prefix}.self_attn.k_proj.{part}"),
            )
            put(layer.qkv, part, to, queries, keys, get(f"{prefix}.self_attn.v_proj.{part}"))
            put(layer.out, part, to, get(f"{prefix}.self_attn.out_proj.{part}"))
            put(layer.fc1, part, to, get(f"{prefix}.fc1.{part}"))
            put(layer.fc2, part, to, get(f"{prefix}.fc2.{part}"))
            put(layer.attention_norm, part, wide, get(f"{prefix}.self_attn_layer_norm.{part}"))
            put(layer.ffn_norm, part, wide, get(f"{prefix}.final_layer_norm.{part}"))
    for part in ("weight", "bias"):
        put(model.final_norm, part, wide, get(f"emb_layer_norm_after.{part}"))
    model.inv_freq = get("layers.0.self_attn.rot_emb.inv_freq").to(wide)
