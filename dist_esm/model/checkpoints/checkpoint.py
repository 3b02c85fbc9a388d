"""A checkpoint of any kind as one thing: architecture, tensors by fair-esm's names, and what it is in words.

Read are fair-esm's ``.pt``, state dicts of torch and Lightning, and Hugging Face's directories and files. All
are mapped into memory: a tensor is read when it is copied to the device.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_esm.fair_esm import ALPHABET
from dist_esm.fasta.tokens import token_table
from dist_esm.model.checkpoints.files import (
    is_safetensors,
    read_safetensors,
    read_torch,
    refuse_by_first_bytes,
)
from dist_esm.model.checkpoints.names import HUGGING_FACE, INV_FREQ, Body, find_body, name_stranger
from dist_esm.model.esm2 import Architecture

KNOWN = {
    Architecture(6, 320, 20): "esm2_t6_8M_UR50D",
    Architecture(12, 480, 20): "esm2_t12_35M_UR50D",
    Architecture(30, 640, 20): "esm2_t30_150M_UR50D",
    Architecture(33, 1280, 20): "esm2_t33_650M_UR50D",
    Architecture(36, 2560, 40): "esm2_t36_3B_UR50D",
    Architecture(48, 5120, 40): "esm2_t48_15B_UR50D",
}
HEADS_OF_WIDTH = {arch.embed_dim: arch.attention_heads for arch in KNOWN}
USE = "use an ESM-2, for example model.weights=null, or the directory of a Hugging Face EsmForMaskedLM"
WHOLE = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
"""Hugging Face's names for all weights of a model, in the order in which they are looked for."""
ENTRIES = ("model", "state_dict", "model_state_dict", "module")
"""Where a torch file keeps its state dict, if that is not all of it."""
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
LAYER_NORM_EPS = 1e-5
ROTARY_BASE = 10000.0


@dataclass(frozen=True)
class Checkpoint:
    """A model as its files hold it."""

    arch: Architecture
    tensors: Mapping[str, Tensor]
    """By fair-esm's names, on the host."""
    files: tuple[Path, ...]
    """All files that the numbers come from, in the order in which they are fingerprinted."""
    words: str
    """What it is: "Hugging Face EsmForMaskedLM, 33 layers"."""
    is_fair_esm: bool
    """True for a file in fair-esm's own form."""


@dataclass(frozen=True)
class Source:
    """What the files of a checkpoint hold, before any tensor is understood."""

    tensors: Mapping[str, Tensor]
    files: tuple[Path, ...]
    config: Mapping[str, Any]
    """Hugging Face's ``config.json``; empty without one."""
    heads: int | None
    """Attention heads, if the files say so."""
    token_dropout: bool
    entry: str | None = None
    """Entry of a torch file that holds the tensors; None if that is all of it."""
    is_fair_esm: bool = False


def read_checkpoint(path: Path) -> Checkpoint:
    """Read an ESM-2 of any size, from a file or a directory.

    Raises
    ------
    ValueError
        One line that names the path, what it is instead, and what to use.
    """
    source = read_directory(path) if path.is_dir() else read_file(path)
    refuse_other_models(path, source)
    try:
        body = find_body(source.tensors)
    except ValueError as error:
        raise ValueError(f"{path} {error}: {USE}") from None
    arch = architecture_of(path, body, source)
    tensors = complete_tensors(path, body.tensors, arch, source.config)
    if not source.token_dropout:
        raise ValueError(
            f"{path} was trained without token dropout: no ESM-2 is, "
            "and its embeddings would be scaled wrongly"
        )
    return Checkpoint(arch, tensors, source.files, describe(body, source, arch), source.is_fair_esm)


def read_directory(path: Path) -> Source:
    """Find the weights in a directory as Hugging Face writes it.

    Raises
    ------
    ValueError
        If it has none, or it is an adapter or a tokenizer.
    """
    for name in WHOLE:
        if (path / name).is_file():
            return read_file(path / name)
    if (path / "adapter_config.json").is_file():
        raise ValueError(
            f"{path} is an adapter and no model: name it with model.adapter={path}, "
            "and its base with model.weights"
        )
    files = sorted(
        file for pattern in ("*.safetensors", "*.pt", "*.bin", "*.ckpt") for file in path.glob(pattern)
    )
    if len(files) == 1:
        return read_file(files[0])
    names = sorted(file.name for file in path.iterdir())
    if files:
        raise ValueError(
            f"{path} has {len(files)} files of weights: name one of {', '.join(f.name for f in files)}"
        )
    if any(name.startswith(("tf_model", "flax_model")) for name in names):
        raise ValueError(
            f"{path} has weights for TensorFlow or Flax alone: save it with PyTorch's save_pretrained"
        )
    if {"tokenizer_config.json", "vocab.txt"} & set(names):
        raise ValueError(f"{path} is a tokenizer and no model, it has no {WHOLE[0]}: {USE}")
    raise ValueError(f"{path} is a directory without weights ({WHOLE[0]} or {WHOLE[2]}): {USE}")


def read_file(path: Path) -> Source:
    """Read one file, or all shards that an index names, and the ``config.json`` beside it.

    Raises
    ------
    ValueError
        If it cannot be read, or a shard is missing.
    """
    if path.name.endswith(".index.json"):
        return read_shards(path)
    first = refuse_by_first_bytes(path)
    if is_safetensors(first):
        return from_hugging_face(path, read_safetensors(path), (path,))
    content = read_torch(path)
    entry = next((name for name in ENTRIES if is_state(content, name)), None)
    tensors = content[entry] if entry is not None else content
    if not isinstance(tensors, dict) or not any(isinstance(value, Tensor) for value in tensors.values()):
        keys = (
            f": its entries are {', '.join(map(str, list(content)[:5]))}" if isinstance(content, dict) else ""
        )
        raise ValueError(f"{path} is no checkpoint of ESM-2, it holds no tensors by name{keys}; {USE}")
    tensors = {str(name): value for name, value in tensors.items() if isinstance(value, Tensor)}
    if entry is None:
        return from_hugging_face(path, tensors, (path,))
    settings = content.get("cfg", {}).get("model") if isinstance(content.get("cfg"), dict) else None
    heads = getattr(settings, "encoder_attention_heads", None)
    return Source(
        tensors,
        (path,),
        {},
        heads if isinstance(heads, int) else None,
        bool(getattr(settings, "token_dropout", True)),
        entry,
        is_fair_esm=entry == "model" and settings is not None,
    )


def is_state(content: Any, entry: str) -> bool:
    """Tell whether an entry of a torch file is a state dict."""
    state = content.get(entry) if isinstance(content, dict) else None
    return isinstance(state, dict) and any(isinstance(value, Tensor) for value in state.values())


def read_shards(index: Path) -> Source:
    """Read all files that an index of Hugging Face names.

    Raises
    ------
    ValueError
        If the index cannot be read, or a file is missing.
    """
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        is_right = all(isinstance(name, str) and Path(name).name == name for name in names)
    except (ValueError, KeyError, TypeError, AttributeError):
        is_right = False
    if not is_right:
        raise ValueError(
            f"{index} is no index of weights: it needs an entry weight_map with names of files beside it"
        )
    tensors: dict[str, Tensor] = {}
    files = tuple(index.with_name(name) for name in names)
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ValueError(f"{index.parent} lacks {missing[0]}{more} of {len(files)} files: fetch it again")
    for file in files:
        tensors.update(read_file(file).tensors)
    return from_hugging_face(index, tensors, files)


def from_hugging_face(path: Path, tensors: Mapping[str, Tensor], files: tuple[Path, ...]) -> Source:
    """Return tensors with what the ``config.json`` beside them says.

    Raises
    ------
    ValueError
        If ``config.json`` is no JSON, or ``vocab.txt`` is of other tokens.
    """
    place = path.with_name("config.json")
    config: Any = {}
    if place.is_file():
        try:
            config = json.loads(place.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{place} is no JSON ({error}): fetch it again") from None
        if not isinstance(config, dict):
            raise ValueError(f"{place} is no JSON object: fetch it again")
    refuse_other_vocabulary(path.with_name("vocab.txt"))
    heads = config.get("num_attention_heads")
    return Source(
        tensors,
        files,
        config,
        heads if isinstance(heads, int) else None,
        config.get("token_dropout") is not False,
    )


def refuse_other_vocabulary(path: Path) -> None:
    """Refuse a model whose tokens are not fair-esm's, if a ``vocab.txt`` beside it says so.

    Raises
    ------
    ValueError
        If the first 33 tokens are others, or in another order.
    """
    tokens = path.read_text(encoding="utf-8").split() if path.is_file() else ALPHABET.all_toks
    expected = list(ALPHABET.all_toks)
    if tokens[: len(expected)] != expected:
        index = next(i for i, token in enumerate(expected) if tokens[i : i + 1] != [token])
        raise ValueError(
            f"{path} has other tokens than ESM-2: {expected[index]} is not its token {index}; {USE}"
        )


def refuse_other_models(path: Path, source: Source) -> None:
    """Refuse what a ``config.json`` says is no ESM-2, or what has learned positions and no ``config.json``.

    Raises
    ------
    ValueError
        If it is another model, or an ESM-2 that was changed in a way that its shapes do not tell.
    """
    config = source.config
    family = config.get("model_type", "esm")
    name = ", ".join(config.get("architectures") or [str(family)])
    if family != "esm":
        raise ValueError(f"{path} holds a Hugging Face {name} (model_type {family}) and no ESM-2: {USE}")
    keys = " ".join(source.tensors)
    is_learned = (
        "position_embeddings.weight" in keys and "inv_freq" not in keys and not name_stranger(source.tensors)
    )
    # Early files of ESM-2 have learned positions that nothing reads beside their rotary frequencies.
    positions = config.get("position_embedding_type", "learned" if is_learned else "rotary")
    if positions != "rotary" or config.get("emb_layer_norm_before"):
        raise ValueError(f"{path} holds an ESM-1b or ESM-1v ({positions} positions) and no ESM-2: {USE}")
    for key, expected in (
        ("layer_norm_eps", LAYER_NORM_EPS),
        ("is_decoder", False),
        ("add_cross_attention", False),
    ):
        if config.get(key, expected) != expected:
            raise ValueError(
                f"{path} has {key}={config[key]} in config.json, every ESM-2 has {expected}: {USE}"
            )


def architecture_of(path: Path, body: Body[Tensor], source: Source) -> Architecture:
    """Take the architecture from the shapes, and the heads from what the files say of them.

    Raises
    ------
    ValueError
        If there are no layers, or the number of heads is not known or does not fit.
    """
    embedding = body.tensors["embed_tokens.weight"]
    layers = {int(match[1]) for name in body.tensors if (match := re.match(r"layers\.(\d+)\.", name))}
    if embedding.ndim != 2 or not layers:
        raise ValueError(
            f"{path} is no ESM-2 checkpoint: it lacks layers, or its token embedding has no width: {USE}"
        )
    width = embedding.shape[1]
    frequencies = body.tensors.get(INV_FREQ)
    rotary = None if frequencies is None or not len(frequencies) else width // (2 * len(frequencies))
    heads = source.heads or rotary or HEADS_OF_WIDTH.get(width)
    if heads is None:
        raise ValueError(
            f"{path} does not tell its number of attention heads, and no ESM-2 of fair-esm is {width} wide: "
            "put the model's config.json beside it"
        )
    if (rotary is not None and rotary != heads) or heads < 1 or width % (2 * heads):
        raise ValueError(
            f"{path} says that it has {heads} attention heads, which does not fit its rotary frequencies "
            f"or its width {width}: put the right config.json beside it"
        )
    return Architecture(max(layers) + 1, width, heads)


def complete_tensors(
    path: Path, tensors: Mapping[str, Tensor], arch: Architecture, config: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return all tensors of an ESM-2, each of its shape and a float.

    Rotary frequencies that a file leaves out are computed as fair-esm does. Embeddings of tokens that were
    added behind fair-esm's 33 are left out: no residue has them.

    Raises
    ------
    ValueError
        If some are missing, have other shapes or dtypes, or belong to no ESM-2.
    """
    name = KNOWN.get(arch, f"ESM-2 of {arch}")
    state = dict(tensors)
    state["embed_tokens.weight"] = state["embed_tokens.weight"][: token_table().num_tokens]
    if INV_FREQ not in state:
        base = float(config.get("rope_theta") or ROTARY_BASE)
        state[INV_FREQ] = 1.0 / (base ** (torch.arange(0, arch.head_dim, 2).float() / arch.head_dim))
    for layer in range(arch.num_layers):
        state.setdefault(INV_FREQ.replace("0", str(layer), 1), state[INV_FREQ])
    shapes = tensor_shapes(arch)
    missing = [key for key in shapes if key not in state]
    if missing:
        shown = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise ValueError(f"{path} lacks {shown}: it is not a whole {name}")
    for key, tensor in state.items():
        if key not in shapes:
            raise ValueError(f"{path} has {key}, which no ESM-2 has: {USE}")
        if tuple(tensor.shape) != shapes[key]:
            raise ValueError(f"{path}: {key} has shape {tuple(tensor.shape)}, {name} wants {shapes[key]}")
        if tensor.dtype not in FLOATS:
            dtype = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(
                f"{path}: {key} is {dtype}, quantized or no weight: save the model in fp16, bf16 or fp32"
            )
    return {key: state[key] for key in shapes}


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


def describe(body: Body[Tensor], source: Source, arch: Architecture) -> str:
    """Say in words what was read; where it lies is for the caller to add."""
    if body.dialect == HUGGING_FACE:
        names = ", ".join(source.config.get("architectures") or ["EsmModel"])
        words = f"Hugging Face {names}, {arch.num_layers} layers"
        expected = ["", "esm."]
    else:
        words = f"{'fair-esm checkpoint' if source.is_fair_esm else 'state dict'} of {KNOWN.get(arch, arch)}"
        expected = ["encoder.sentence_encoder.", "encoder."] if source.is_fair_esm else [""]
    if body.prefix not in expected:
        words += f", under the prefix {body.prefix!r}"
    if body.left_out:
        words += f", its body alone ({', '.join(body.left_out)} left out)"
    return words
