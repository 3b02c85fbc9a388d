"""LoRA adapters as the package peft writes them, merged into a checkpoint's tensors as these are read.

A merged weight is W + s B A: the product is taken in fp64 on the host and the sum is rounded once, to fp32,
so that it has the same bits on every host. Whatever changes a model in another way is refused by its name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dist_esm.fasta.tokens import token_table
from dist_esm.model.checkpoints.checkpoint import Checkpoint
from dist_esm.model.checkpoints.files import (
    is_safetensors,
    read_safetensors,
    read_torch,
    refuse_by_first_bytes,
)
from dist_esm.model.checkpoints.names import to_fair_esm

FILES = ("adapter_model.safetensors", "adapter_model.bin")
REMEDY = "merge it with peft's merge_and_unload(), save the model, and name that with model.weights"
PART = re.compile(r"(?P<module>.+)\.lora_(?P<embedding>embedding_)?(?P<part>[AB])(\.weight)?")
WRAPPER = "base_model.model."
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")
"""Values of `init_lora_weights` that leave the base's own weights as they are."""
VARIANTS = (
    "use_dora",
    "use_qalora",
    "use_bdlora",
    "lora_bias",
    "fan_in_fan_out",
    "layer_replication",
    "megatron_config",
    "trainable_token_indices",
    "alora_invocation_tokens",
    "target_parameters",
    "velora_config",
    "monteclora_config",
    "arrow_config",
    "kasa_config",
)
"""Keys of a LoRA's configuration that make it another computation than W + s B A, if they are set."""


@dataclass(frozen=True)
class Update:
    """What an adapter adds to one weight."""

    a: Tensor
    """Shape (rank, columns)."""
    b: Tensor
    """Shape (rows, rank)."""
    scale: float
    is_transposed: bool
    """True for the token embedding, whose weight is the transpose of the product."""

    def merged(self, weight: Tensor) -> Tensor:
        """Return the weight with the product added, in fp32."""
        product = self.b.double() @ self.a.double() * self.scale
        return (weight.double() + (product.T if self.is_transposed else product)[: len(weight)]).float()


class Merged(Mapping[str, Tensor]):
    """The tensors of a checkpoint; those that an adapter changes are merged each time they are asked for."""

    def __init__(self, tensors: Mapping[str, Tensor], updates: Mapping[str, Update]) -> None:
        self._tensors = tensors
        self._updates = updates

    def __getitem__(self, name: str) -> Tensor:
        tensor, update = self._tensors[name], self._updates.get(name)
        return tensor if update is None else update.merged(tensor)

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def with_adapter(base: Checkpoint, path: Path) -> Checkpoint:
    """Return a checkpoint with a LoRA adapter merged into it.

    Raises
    ------
    ValueError
        If the directory holds no adapter, another kind than LoRA, or one that does not fit the base.
    """
    config = read_config(path)
    refuse_variants(path, config)
    file = next((path / name for name in FILES if (path / name).is_file()), None)
    if file is None:
        raise ValueError(f"model.adapter={path} has no {FILES[0]}: fetch it again")
    first = refuse_by_first_bytes(file)
    tensors = read_safetensors(file) if is_safetensors(first) else read_torch(file)
    updates, left_out = find_updates(path, base, tensors, config)
    ranks = sorted({len(update.a) for update in updates.values()})
    words = f"fine-tuned from {base.words} with LoRA adapter (rank {', '.join(map(str, ranks))}, "
    words += f"{len(updates)} matrices merged{''.join(f', {head} left out' for head in left_out)})"
    return Checkpoint(
        base.arch,
        Merged(base.tensors, updates),
        (*base.files, path / "adapter_config.json", file),
        words,
        is_fair_esm=False,
    )


def read_config(path: Path) -> dict[str, Any]:
    """Read ``adapter_config.json``.

    Raises
    ------
    ValueError
        If it is not there, or is none.
    """
    place = path / "adapter_config.json"
    if not place.is_file():
        raise ValueError(
            f"model.adapter={path} is no adapter: name a directory with adapter_config.json and {FILES[0]}, "
            "as peft's save_pretrained writes it"
        )
    try:
        config = json.loads(place.read_text(encoding="utf-8"))
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise ValueError(f"{place} is no JSON object: fetch it again")
    return config


def refuse_variants(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse all but plain LoRA and rsLoRA.

    Raises
    ------
    ValueError
        With the name of what it is.
    """
    method = config.get("peft_type")
    if method != "LORA":
        raise ValueError(
            f"model.adapter={path} is an adapter of the kind {method}, only LoRA is merged here: {REMEDY}"
        )
    variant = next((key for key in VARIANTS if config.get(key)), None)
    if variant is not None:
        name = "DoRA" if variant == "use_dora" else f"a LoRA with {variant}"
        raise ValueError(
            f"model.adapter={path} is {name}, only plain LoRA and rsLoRA are merged here: {REMEDY}"
        )
    start = config.get("init_lora_weights", True)
    if start not in PLAIN_STARTS:
        raise ValueError(
            f"model.adapter={path} was started by {start}, which changes the base's own weights: {REMEDY}"
        )
    if config.get("bias", "none") != "none":
        raise ValueError(f"model.adapter={path} has trained biases (bias={config['bias']}): {REMEDY}")


def find_updates(
    path: Path, base: Checkpoint, tensors: Mapping[str, Tensor], config: Mapping[str, Any]
) -> tuple[dict[str, Update], list[str]]:
    """Return the updates by the names of the weights they belong to, and the heads that are left out.

    Raises
    ------
    ValueError
        If a tensor belongs to no weight of the base, or does not fit its shape.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    modules: dict[str, str] = {}
    embeddings = set()
    left_out: dict[str, None] = {}
    for key, tensor in tensors.items():
        own = key.removeprefix(WRAPPER)
        match = PART.fullmatch(own)
        module = match["module"] if match else own.removesuffix(".weight").removesuffix(".base_layer")
        name = weight_name(module, base)
        if match and name:
            parts.setdefault(name, {})[match["part"]] = tensor
            modules[name] = module
            if match["embedding"]:
                embeddings.add(name)
        elif name and own.endswith(".weight") and is_same(tensor, base.tensors[name]):
            continue  # peft saves the base's own token embedding beside its update
        elif name or is_in_layers(own):
            raise ValueError(
                f"model.adapter={path} replaces {key} (modules_to_save), only LoRA's products are merged: "
                f"{REMEDY}"
            )
        else:
            left_out[own.partition(".")[0]] = None
    if not parts:
        raise ValueError(f"model.adapter={path} changes no weight of ESM-2: was it trained on another model?")
    updates = {}
    for name, pair in parts.items():
        rows, columns = base.tensors[name].shape
        is_embedding = name in embeddings
        if "A" not in pair or "B" not in pair or pair["A"].ndim != 2 or pair["B"].ndim != 2:
            raise ValueError(f"model.adapter={path} has no whole pair of matrices for {name}: fetch it again")
        a, b = pair["A"], pair["B"]
        shape = (a.shape[1], b.shape[0]) if is_embedding else (b.shape[0], a.shape[1])
        fits = shape[1] == columns and (
            shape[0] == rows or (is_embedding and shape[0] >= token_table().num_tokens)
        )
        if not fits or len(a) != b.shape[1]:
            raise ValueError(
                f"model.adapter={path} changes {name} by a matrix of {shape[0]} x {shape[1]}, the base has "
                f"{rows} x {columns}: name the base that it was trained on"
            )
        updates[name] = Update(a, b, scale_of(config, modules[name], len(a)), is_embedding)
    return updates, list(left_out)


def weight_name(module: str, base: Checkpoint) -> str | None:
    """Return fair-esm's name of the weight of a module; None if it is none of the base's."""
    for start in range(module.count(".") + 1):  # prefixes as `esm.` are taken off
        rest = module.split(".", start)[-1] if start else module
        for name in (to_fair_esm(f"{rest}.weight"), f"{rest}.weight"):
            if name in base.tensors:
                return name
    return None


def is_same(tensor: Tensor, other: Tensor) -> bool:
    """Tell whether a tensor has the numbers of the base's; rows past those of the base do not count."""
    return tensor.ndim == other.ndim and torch.equal(tensor[: len(other)].to(other.dtype), other)


def is_in_layers(key: str) -> bool:
    """Tell whether a tensor belongs to a layer of the model and not to a head on top of it."""
    return re.search(r"(^|\.)(layer|layers)\.\d+\.|embeddings\.|emb_layer_norm_after", key) is not None


def scale_of(config: Mapping[str, Any], module: str, rank: int) -> float:
    """Return the factor of a module's product: alpha / rank, or alpha / sqrt(rank) for rsLoRA."""
    alpha = config.get("lora_alpha", 8)
    for pattern, own in (config.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = own
            break
    return float(alpha) / (math.sqrt(rank) if config.get("use_rslora") else rank)
