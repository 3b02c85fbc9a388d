"""Weights to an `ESM2` on a device: opened, checked, and copied straight to device and dtype.

Files are memory-mapped and each tensor is copied once, so a rank holds neither a random initialisation nor an
fp32 copy of the model. The contact-regression file that fair-esm asks for is not needed: contacts are not
computed here.

``weights=random`` draws seeded weights on the device itself, for tests and benchmarks. They are the same on
every device of a kind.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dist_esm.config import ModelConfig
from dist_esm.model import quantized_cache
from dist_esm.model.checkpoints.adapter import with_adapter
from dist_esm.model.checkpoints.checkpoint import KNOWN, Checkpoint, read_checkpoint, tensor_shapes
from dist_esm.model.checkpoints.files import check_and_fingerprint
from dist_esm.model.checkpoints.hub import is_id
from dist_esm.model.checkpoints.locate import AUTO, OFFICIAL, RANDOM, is_official, locate, locate_adapter
from dist_esm.model.esm2 import ESM2, TOKEN_DROPOUT_FACTOR, Architecture, Layer
from dist_esm.model.kernels.choose import Kernels
from dist_esm.model.quantize import quantize_


class WeightsId(NamedTuple):
    """What a set of weights is."""

    fingerprint: str
    """Of the bytes of all files that the numbers come from."""
    words: str
    """For people: "Hugging Face EsmForMaskedLM, 33 layers, from facebook/esm2_t33_650M_UR50D"."""


def architecture(config: ModelConfig) -> Architecture:
    """Return the architecture that a configuration names; for `model=auto` that is known after `complete`."""
    return Architecture(config.num_layers, config.embed_dim, config.attention_heads)


def complete(config: ModelConfig) -> None:
    """Make sure that the weights are those of the model that is named; fill in `model=auto`.

    Raises
    ------
    ValueError
        If the weights cannot be read, or are not those of the model.
    """
    if config.weights == RANDOM:
        return
    arch = open_weights(config).arch
    if config.name == AUTO:
        config.name = KNOWN.get(arch) or f"esm2_t{arch.num_layers}_d{arch.embed_dim}_h{arch.attention_heads}"
        config.num_layers, config.embed_dim = arch.num_layers, arch.embed_dim
        config.attention_heads = arch.attention_heads


def open_weights(config: ModelConfig) -> Checkpoint:
    """Open the checkpoint of a configuration, with its adapter if it has one. No tensor is read yet.

    Raises
    ------
    ValueError
        If it cannot be read, is no ESM-2, or not the model that is named.
    """
    path = locate(config)
    assert path is not None
    checkpoint = read_checkpoint(path)
    if config.name != AUTO and checkpoint.arch != architecture(config):
        known = KNOWN.get(checkpoint.arch)
        raise ValueError(
            f"{path} holds {known or 'another model'} ({checkpoint.arch}), but model={config.name} has "
            f"{architecture(config)}: use model={known or AUTO}"
        )
    adapter = locate_adapter(config)
    return checkpoint if adapter is None else with_adapter(checkpoint, adapter)


def check_weights(config: ModelConfig, is_kept: bool = True) -> WeightsId:
    """Check the bytes of the weights, and return what they are. All are read: once for a host is enough.

    What takes long to find out is kept for the next launch, unless nothing is to be written.

    Raises
    ------
    ValueError
        If some bytes do not have the checksum that their file states, or as `open_weights`.
    """
    if config.weights == RANDOM:
        return WeightsId(f"random-{config.seed}", f"random weights (seed {config.seed})")
    checkpoint = open_weights(config)
    fingerprint = fingerprint_of(checkpoint)
    place = str(config.weights or checkpoint.files[0])
    if (
        config.weights is not None
        and is_id(config.weights)
        and checkpoint.files[0].parent.parent.name == "snapshots"
    ):
        place += f" (revision {checkpoint.files[0].parent.name[:12]})"
    if config.adapter is not None:
        place += f" and {config.adapter}"
    if not checkpoint.is_fair_esm:
        return WeightsId(fingerprint, f"{checkpoint.words}, from {place}")
    name = KNOWN.get(checkpoint.arch, "")
    if is_official(checkpoint.files[0], name, fingerprint, is_kept):
        return WeightsId(fingerprint, f"fair-esm's own {name} (sha256 verified)")
    caveat = ", not one of fair-esm's own files" if name in OFFICIAL else ""
    return WeightsId(fingerprint, f"{checkpoint.words}{caveat}, from {place}")


def fingerprint_of(checkpoint: Checkpoint) -> str:
    """Return a fingerprint of the bytes of all files that the numbers come from, after a check of these.

    Raises
    ------
    ValueError
        If some bytes do not have the checksum that their file states.
    """
    prints = [check_and_fingerprint(file) for file in checkpoint.files]
    if checkpoint.is_fair_esm:
        return prints[0]
    return hashlib.sha256(repr((prints, str(checkpoint.arch))).encode()).hexdigest()[:32]


def load_model(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    kernels: Kernels,
    fingerprint: str | None = None,
) -> ESM2:
    """Return an ESM-2 in eval mode: matrix products in `dtype`, norms and embeddings in fp32 or wider.

    The layers that the kernels want so multiply e4m3 numbers. A model of a checkpoint with a `fingerprint`
    (see `check_weights`; None: not known) is then kept on disk, and taken from there by the next call.

    Raises
    ------
    ValueError
        If the checkpoint is damaged, incomplete or of another architecture, or is not that of the fingerprint
        any more when it would be kept.
    """
    arch, path = architecture(config), None
    if kernels.quantized and fingerprint is not None and config.weights != RANDOM:
        path = quantized_cache.kept_path(fingerprint, arch, dtype, kernels, device)
    model = None if path is None else quantized_cache.recall(path, arch, kernels, device)
    if model is None:
        with torch.device("meta"):
            model = ESM2(arch, kernels)
        fill_parameters(model, tensor_source(config, device), device, dtype)
        if kernels.quantized:
            quantize_(model, kernels.quantized)
        if path is not None:
            refuse_if_changed(config, fingerprint)
            quantized_cache.keep(model, path)
    return model.eval().requires_grad_(False)


def refuse_if_changed(config: ModelConfig, fingerprint: str | None) -> None:
    """Make sure that a checkpoint is still what it was when its fingerprint was taken.

    Others may put new weights in its place meanwhile, and what is kept under the fingerprint serves every
    later start.

    Raises
    ------
    ValueError
        If it is not.
    """
    if fingerprint_of(open_weights(config)) != fingerprint:
        raise ValueError(f"{locate(config)} was changed while it was read: start again")


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
    if config.weights != RANDOM:
        return open_weights(config).tensors.__getitem__
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
        for product in (layer.qkv, layer.out, layer.fc1, layer.fc2):
            assert isinstance(product, nn.Linear)
            ops.prepare(product)
        layer.attention_norm.rounds_to = layer.qkv.weight.dtype
        layer.ffn_norm.rounds_to = layer.fc1.weight.dtype
    model.final_norm.rounds_to = wide
    for part in ("weight", "bias"):
        put(model.final_norm, part, wide, get(f"emb_layer_norm_after.{part}"))
    model.inv_freq = get("layers.0.self_attn.rot_emb.inv_freq").to(wide)
