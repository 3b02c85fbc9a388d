"""Hugging Face's own ESM-2 with given weights: written by the real transformers, and the oracle for tuned
models."""

from __future__ import annotations

import pytest
import torch

from dist_esm.model.esm2 import Architecture

transformers = pytest.importorskip("transformers", reason="transformers is not installed")

NAMES = {
    "q_proj": "attention.self.query",
    "k_proj": "attention.self.key",
    "v_proj": "attention.self.value",
    "out_proj": "attention.output.dense",
    "self_attn_layer_norm": "attention.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "LayerNorm",
}


def to_hugging_face(name: str) -> str | None:
    """Hugging Face's name of a tensor of fair-esm's; None for rotary frequencies, which are set apart."""
    if name.endswith("inv_freq"):
        return None
    if name.startswith("layers."):
        _, layer, *_, module, part = name.split(".")
        return f"encoder.layer.{layer}.{NAMES[module]}.{part}"
    return {"embed_tokens.weight": "embeddings.word_embeddings.weight"}.get(name, f"encoder.{name}")


def hugging_face_config(arch: Architecture, **changes: object) -> object:
    """The configuration of an ESM-2, as facebook's own have it."""
    values = {
        "vocab_size": 33,
        "pad_token_id": 1,
        "mask_token_id": 32,
        "hidden_size": arch.embed_dim,
        "num_hidden_layers": arch.num_layers,
        "num_attention_heads": arch.attention_heads,
        "intermediate_size": 4 * arch.embed_dim,
        "position_embedding_type": "rotary",
        "token_dropout": True,
        "emb_layer_norm_before": False,
        "layer_norm_eps": 1e-5,
        "max_position_embeddings": 1026,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }
    return transformers.EsmConfig(**{**values, **changes})


def hugging_face_model(
    arch: Architecture, state: dict[str, torch.Tensor], kind: str = "EsmForMaskedLM", **changes: object
) -> torch.nn.Module:
    """A model of transformers with fair-esm's tensors in its body."""
    model = getattr(transformers, kind)(hugging_face_config(arch, **changes)).eval()
    body = model if kind == "EsmModel" else model.esm
    tensors = {to_hugging_face(name): tensor for name, tensor in state.items() if to_hugging_face(name)}
    result = body.load_state_dict(tensors, strict=False)
    assert not result.unexpected_keys
    assert not [
        key
        for key in result.missing_keys
        if not key.startswith(("contact", "pooler")) and "inv_freq" not in key
    ]
    for name, buffer in body.named_buffers():
        if name.endswith("inv_freq"):
            buffer.copy_(state["layers.0.self_attn.rot_emb.inv_freq"])
    return model


def hidden_states(model: torch.nn.Module, tokens: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """All hidden states of one protein, shape (T, D) each; the last one is behind the final LayerNorm."""
    body = getattr(model, "esm", model)
    with torch.inference_mode():
        result = body(tokens[None], attention_mask=torch.ones_like(tokens[None]), output_hidden_states=True)
    return tuple(hidden[0].float() for hidden in result.hidden_states)
