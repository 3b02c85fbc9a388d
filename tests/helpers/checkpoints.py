"""Checkpoints in fair-esm's on-disk format, and fair-esm's own model as the oracle."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from esm.model import esm2 as fair_esm

from dist_esm.model.checkpoints.checkpoint import tensor_shapes
from dist_esm.model.esm2 import Architecture
from dist_esm.model.weights import random_tensor

A8M, A35M = Architecture(6, 320, 20), Architecture(12, 480, 20)
A650M_SHAPED, A3B_SHAPED = Architecture(2, 1280, 20), Architecture(2, 2560, 40)


CONSTANT, CONSTANT_DEVIATION = (13.64, 2.69, 1.37), (0.21, 0.24, 0.40)
"""Means and standard deviations, over tokens, of the three constant channels of the real 3B after its last
LayerNorm (Synthyra/FastPLMs, commit 1f78282, tests/goldens)."""
LENGTH_OF_THE_REST = 3.75
"""Standard deviation of each of its other channels, times the square root of its width."""
IN_STREAM = (30.0, -20.0, 12.0)
"""What the first block adds to the outlier channels of every token; other channels are near 1."""


def random_state(arch: Architecture, seed: int = 0, hard: bool = False) -> dict[str, torch.Tensor]:
    """Seeded tensors under fair-esm's names; hard ones are `harden`ed."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: random_tensor(name, shape, arch.num_layers, generator)
        for name, shape in tensor_shapes(arch).items()
    }
    state |= {
        f"layers.{n}.self_attn.rot_emb.inv_freq": state["layers.0.self_attn.rot_emb.inv_freq"]
        for n in range(arch.num_layers)
    }
    if hard:
        harden(state, arch, generator)
    return state


def harden(state: dict[str, torch.Tensor], arch: Architecture, generator: torch.Generator) -> None:
    """Give tensors what makes the real models' numbers hard.

    Attention is peaky, three channels of the stream carry far more than the others, gains of LayerNorms
    differ, and after the last LayerNorm three channels are nearly constant: one carries nine tenths of the
    squared length of every vector.
    """
    channels = torch.randperm(arch.embed_dim, generator=generator)[:3]
    for name, tensor in state.items():
        if name.endswith(("q_proj.weight", "k_proj.weight")):
            tensor *= 1.5
        elif name.endswith("layer_norm.weight"):
            tensor *= torch.exp(0.3 * torch.randn(tensor.shape, generator=generator))
        elif name.endswith("fc2.weight"):
            tensor[channels] *= 4
    state["layers.0.fc2.bias"][channels] += torch.tensor(IN_STREAM)
    last_gain, last_bias = state["emb_layer_norm_after.weight"], state["emb_layer_norm_after.bias"]
    last_gain *= LENGTH_OF_THE_REST / arch.embed_dim**0.5
    last_bias *= LENGTH_OF_THE_REST / arch.embed_dim**0.5
    constant = torch.randperm(arch.embed_dim, generator=generator)
    constant = constant[~torch.isin(constant, channels)][:3]
    last_gain[constant], last_bias[constant] = torch.tensor(CONSTANT_DEVIATION), torch.tensor(CONSTANT)


def fair_esm_model(arch: Architecture, state: dict[str, torch.Tensor]) -> fair_esm.ESM2:
    """fair-esm's own module with these parameters, in fp32."""
    model = fair_esm.ESM2(arch.num_layers, arch.embed_dim, arch.attention_heads, "ESM-1b", token_dropout=True)
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert all(key.startswith(("lm_head", "contact_head")) for key in result.missing_keys)
    return model.eval()


def write_checkpoint(path: Path, arch: Architecture, state: dict[str, torch.Tensor]) -> Path:
    """A file as fair-esm ships them: Namespace, prefixes, LM head."""
    width = arch.embed_dim
    head = {
        "weight": state["embed_tokens.weight"],
        "bias": torch.zeros(33),
        "dense.weight": torch.eye(width),
        "dense.bias": torch.zeros(width),
    }
    head |= {"layer_norm.weight": torch.ones(width), "layer_norm.bias": torch.zeros(width)}
    tensors = {f"encoder.sentence_encoder.{name}": tensor for name, tensor in state.items()}
    tensors |= {f"encoder.lm_head.{name}": tensor for name, tensor in head.items()}
    settings = argparse.Namespace(
        arch="esm2",
        encoder_layers=arch.num_layers,
        encoder_embed_dim=width,
        encoder_attention_heads=arch.attention_heads,
        token_dropout=True,
    )
    torch.save({"args": argparse.Namespace(arch="esm2"), "cfg": {"model": settings}, "model": tensors}, path)
    return path
