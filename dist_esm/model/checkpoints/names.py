"""Names of tensors: fair-esm's, as every checkpoint gets them, from the names that other writers give.

A checkpoint's body is ESM-2 itself, found by its token embedding: all that stands before that name is a
prefix, such as ``encoder.sentence_encoder.``, ``model.esm.`` or ``module.``, and is taken off.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Generic, TypeVar

T = TypeVar("T")

FAIR_ESM, HUGGING_FACE = "fair-esm", "Hugging Face"
ANCHORS = {"embed_tokens.weight": FAIR_ESM, "embeddings.word_embeddings.weight": HUGGING_FACE}
"""Name of the token embedding in each dialect."""
MODULES = {
    "attention.self.query": "self_attn.q_proj",
    "attention.self.key": "self_attn.k_proj",
    "attention.self.value": "self_attn.v_proj",
    "attention.output.dense": "self_attn.out_proj",
    "attention.LayerNorm": "self_attn_layer_norm",
    "intermediate.dense": "fc1",
    "output.dense": "fc2",
    "LayerNorm": "final_layer_norm",
    "attention.self.rotary_embeddings": "self_attn.rot_emb",
}
"""Hugging Face's modules of a layer, and fair-esm's."""
PARTS = {"gamma": "weight", "beta": "bias"}
"""What some writers call the parts of a LayerNorm."""
INV_FREQ = "layers.0.self_attn.rot_emb.inv_freq"
BODY = ("embed_tokens.", "layers.", "emb_layer_norm_after.", "encoder.")
"""First words of the body's names; the last is of names that could not be translated, which are then
refused."""
SILENT = ("lm_head", "contact_head", "pooler", "embeddings")
"""Parts beside the body that need no mention: nobody expects them in an embedding."""
STRANGERS = (
    (r"lora_|\.base_layer\.", "a model with an adapter in it that is not merged"),
    (r"msa_position_embedding|row_self_attention", "an MSA Transformer"),
    (r"self_attn\.bias_k$", "an ESM-1"),
    (r"(^|\.)(embed_positions|emb_layer_norm_before|embeddings\.layer_norm)\.", "an ESM-1b or ESM-1v"),
    (r"layernorm_qkv\.layer_norm_weight", "an ESM-2 in the form of NVIDIA's transformer-engine"),
    (r"transformer\.blocks\.\d+\.attn", "an ESM C or ESM3"),
    (r"token_type_embeddings|embeddings\.LayerNorm", "a BERT, as ProtBert is"),
    (r"block\.\d+\.layer\.\d+\.(SelfAttention|DenseReluDense)", "a T5, as ProtT5 and Ankh are"),
    (r"(^|\.)(wte|h\.\d+\.attn)\.", "a GPT, as ProtGPT2 is"),
)
"""Names of tensors that tell what else a file is."""


@dataclass(frozen=True)
class Body(Generic[T]):
    """The part of a checkpoint that is ESM-2."""

    dialect: str
    prefix: str
    """What stood before its names."""
    tensors: dict[str, T]
    """By fair-esm's names."""
    heads: tuple[str, ...]
    """First words of the names that are not of the body."""

    @property
    def left_out(self) -> list[str]:
        """Heads that should be mentioned."""
        return [head for head in self.heads if head not in SILENT]


def find_body(tensors: Mapping[str, T]) -> Body[T]:
    """Find ESM-2 in a checkpoint.

    Raises
    ------
    ValueError
        If there is none or more than one; the message goes behind the name of the file.
    """
    places = [
        (key.removesuffix(anchor), dialect)
        for key in tensors
        for anchor, dialect in ANCHORS.items()
        if key == anchor or key.endswith(f".{anchor}")
    ]
    stranger = name_stranger(tensors)
    if stranger or not places:
        raise ValueError(f"holds {stranger or 'no ESM-2'}{named_tensors(tensors)}")
    if len(places) > 1:
        prefixes = " and ".join(repr(prefix) for prefix, _ in places)
        raise ValueError(f"holds {len(places)} models, under the prefixes {prefixes}: keep only one")
    ((prefix, dialect),) = places
    body: dict[str, T] = {}
    heads: dict[str, None] = {}
    for key, tensor in tensors.items():
        name = None
        if key.startswith(prefix):
            rest = key[len(prefix) :]
            name = rest if dialect == FAIR_ESM else (to_fair_esm(rest) or rest)
            name = name if name.startswith(BODY) else None
        if name is None:
            heads[first_word(key, prefix)] = None
        else:
            body[name] = tensor
    return Body(dialect, prefix, body, tuple(heads))


def first_word(key: str, prefix: str) -> str:
    """Return the module that a name outside the body belongs to, without the prefixes of the body."""
    shared = ""
    for part in re.findall(r"[^.]+\.", prefix):
        if not key.startswith(shared + part):
            break
        shared += part
    return key[len(shared) :].partition(".")[0]


def to_fair_esm(name: str) -> str | None:
    """Translate the name of a tensor in Hugging Face's `EsmModel`; None if fair-esm's ESM-2 has no such."""
    if name.endswith("rotary_embeddings.inv_freq") and not re.match(r"encoder\.layer\.[1-9]", name):
        return INV_FREQ  # once for each layer, once for all, or with a star in the place of the layer
    head, _, part = name.rpartition(".")
    if part not in ("weight", "bias", "inv_freq", *PARTS):
        head, part = name, ""
    tail = f".{PARTS.get(part, part)}" if part else ""
    if head == "embeddings.word_embeddings":
        return f"embed_tokens{tail}"
    if head == "encoder.emb_layer_norm_after":
        return f"emb_layer_norm_after{tail}"
    layer = re.fullmatch(r"encoder\.layer\.(\d+)\.(.+)", head)
    module = MODULES.get(layer[2]) if layer else None
    return f"layers.{layer[1]}.{module}{tail}" if layer and module else None


def name_stranger(keys: Iterable[str]) -> str | None:
    """Say what a checkpoint is that is no ESM-2, from the names of its tensors; None if they do not tell."""
    names = "\n".join(keys)
    return next((words for pattern, words in STRANGERS if re.search(pattern, names, re.MULTILINE)), None)


def named_tensors(keys: Iterable[str]) -> str:
    """Show some names of tensors, so that a reader knows the file."""
    names = list(keys)
    return f" (its tensors are {', '.join(names[:2])} ...)" if names else " (it holds no tensors)"
