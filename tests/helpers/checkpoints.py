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


def random_state(arch: Architecture, seed: int = 0, hard: bool = False) -> dict[str, torch.Tensor]:
    """Seeded tensors under fair-esm's names.

    Hard ones have peaky attention, outlier channels and large LayerNorm gains.
    """
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
        channels = torch.randperm(arch.embed_dim, generator=generator)[:4]
        for name, tensor in state.items():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                tensor *= 1.5
            elif name.endswith("layer_norm.weight"):
                tensor[channels] *= 4
            elif name.endswith("fc2.weight"):
                tensor[channels] *= 8
    return state


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
