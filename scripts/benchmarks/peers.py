"""Other ways to the same embeddings, each with the same weights: fair-esm, transformers, esm-efficient.

A contestant gets proteins and returns the mean of the last layer over each protein's residues. It batches
as its own users would.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.metadata import PackageNotFoundError, version
from types import ModuleType
from typing import Any

import numpy as np
import torch
from esm.data import FastaBatchedDataset
from esm.model.esm2 import ESM2 as FairESM  # noqa: N811
from torch import Tensor, nn

from benchmarks.proteins import MAX_RESIDUES, Protein, make_packs
from dist_esm.config import ModelConfig
from dist_esm.fair_esm import ALPHABET
from dist_esm.fasta.tokens import tokenize
from dist_esm.model.esm2 import TOKEN_DROPOUT_FACTOR
from dist_esm.model.weights import fair_esm_tensors

Means = dict[str, np.ndarray]
"""A protein's id to its mean, shape (D,)."""
Embed = Callable[[Sequence[Protein]], Means]
FAIR_ESM_TOKENS = 4096
"""`--toks_per_batch` of fair-esm's extract script."""
PACKED_TOKENS = 16384


@dataclass(frozen=True)
class Peer:
    """A contestant with its model on the device."""

    name: str
    dtype: torch.dtype
    embed: Embed
    note: str = ""


def copy_weights(
    module: nn.Module,
    model: ModelConfig,
    device: torch.device,
    peer_name: Callable[[str], str] = str,
    embedding_factor: float = 1.0,
) -> None:
    """Fill a module with this tool's weights.

    Parameters
    ----------
    module
        On the device.
    model
        Names the weights.
    device
        Where random weights are drawn.
    peer_name
        Gives the module's name for a tensor of fair-esm's.
    embedding_factor
        Multiplies the embedding of tokens, for a peer that leaves fair-esm's token dropout out.
    """
    own = module.state_dict(keep_vars=True)
    with torch.no_grad():
        for name, tensor in fair_esm_tensors(model, device):
            if peer_name(name) not in own and name.endswith("inv_freq"):
                continue  # a constant that some peers do not keep
            factor = embedding_factor if name == "embed_tokens.weight" else 1.0
            own[peer_name(name)].copy_(tensor * factor)


def fair_esm(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> Embed:
    """fair-esm's own model as it is shipped, LM head and all, in the steps of its extract script.

    Batches of 4,096 tokens sorted by length and padded; all of a layer is copied to the host, and means are
    taken there.
    """
    with torch.device(device):
        module: nn.Module = FairESM(
            model.num_layers, model.embed_dim, model.attention_heads, ALPHABET, token_dropout=True
        )
    copy_weights(module, model, device)
    module = module.to(dtype).eval()
    layer = model.num_layers

    @torch.inference_mode()
    def embed(proteins: Sequence[Protein]) -> Means:
        dataset = FastaBatchedDataset(
            [protein.id for protein in proteins], [protein.residues for protein in proteins]
        )
        batches = dataset.get_batch_indices(FAIR_ESM_TOKENS, extra_toks_per_seq=1)
        loader = torch.utils.data.DataLoader(
            dataset, collate_fn=ALPHABET.get_batch_converter(MAX_RESIDUES), batch_sampler=batches
        )
        means: Means = {}
        for labels, texts, tokens in loader:
            outputs = module(tokens.to(device, non_blocking=True), repr_layers=[layer], return_contacts=False)
            hidden = outputs["representations"][layer].cpu()
            for row, (label, text) in enumerate(zip(labels, texts, strict=True)):
                means[label] = hidden[row, 1 : min(MAX_RESIDUES, len(text)) + 1].float().mean(0).numpy()
        return means

    return embed


def fair_esm_peers(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> Iterator[Peer]:
    """fair-esm in fp32, and with bf16 weights where the device has bf16."""
    yield Peer("fair-esm", torch.float32, fair_esm(model, device, torch.float32))
    if device.type == "cuda" or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        yield Peer("fair-esm", torch.bfloat16, fair_esm(model, device, torch.bfloat16))


TRANSFORMERS_NAMES = {
    "self_attn.q_proj": "attention.self.query",
    "self_attn.k_proj": "attention.self.key",
    "self_attn.v_proj": "attention.self.value",
    "self_attn.out_proj": "attention.output.dense",
    "self_attn.rot_emb": "attention.self.rotary_embeddings",
    "self_attn_layer_norm": "attention.LayerNorm",
    "fc1": "intermediate.dense",
    "fc2": "output.dense",
    "final_layer_norm": "LayerNorm",
}


def transformers_name(name: str) -> str:
    """Return the name that transformers gives to a tensor of fair-esm's."""
    if name == "embed_tokens.weight":
        return "embeddings.word_embeddings.weight"
    if name.startswith("emb_layer_norm_after"):
        return f"encoder.{name}"
    _, layer, rest = name.split(".", 2)
    module, _, parameter = rest.rpartition(".")
    return f"encoder.layer.{layer}.{TRANSFORMERS_NAMES[module]}.{parameter}"


def padded_batches(proteins: Sequence[Protein], budget: int) -> Iterator[list[Protein]]:
    """Yield proteins of similar length, at most `budget` tokens at a time, padding counted."""
    batch: list[Protein] = []
    for protein in sorted(proteins, key=lambda protein: protein.num_tokens):
        if batch and protein.num_tokens * (len(batch) + 1) > budget:
            yield batch
            batch = []
        batch.append(protein)
    if batch:
        yield batch


def transformers_peers(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> Iterator[Peer]:
    """Hugging Face's EsmModel with torch's own attention, in batches of similar length.

    Raises
    ------
    ImportError
        If transformers is not installed.
    """
    hugging_face: Any = import_module("transformers")
    settings = hugging_face.EsmConfig(
        vocab_size=33,
        mask_token_id=32,
        pad_token_id=1,
        hidden_size=model.embed_dim,
        num_hidden_layers=model.num_layers,
        num_attention_heads=model.attention_heads,
        intermediate_size=4 * model.embed_dim,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        max_position_embeddings=1026,
        layer_norm_eps=1e-5,
        position_embedding_type="rotary",
        emb_layer_norm_before=False,
        token_dropout=True,
    )
    settings._attn_implementation = "sdpa"
    with torch.device(device):
        module = hugging_face.EsmModel(settings, add_pooling_layer=False)
    copy_weights(module, model, device, transformers_name)
    module = module.to(dtype).eval()
    budget = PACKED_TOKENS if device.type == "cuda" else PACKED_TOKENS // 8

    @torch.inference_mode()
    def embed(proteins: Sequence[Protein]) -> Means:
        means: Means = {}
        for batch in padded_batches(proteins, budget):
            tokens = torch.full((len(batch), batch[-1].num_tokens), ALPHABET.padding_idx)
            is_residue = torch.zeros_like(tokens, dtype=torch.bool)
            for row, protein in enumerate(batch):
                tokens[row, : protein.num_tokens] = torch.from_numpy(tokenize(protein.residues.encode()))
                is_residue[row, 1 : protein.num_tokens - 1] = True
            mask = tokens.ne(ALPHABET.padding_idx)
            hidden = module(tokens.to(device), attention_mask=mask.to(device)).last_hidden_state
            weights = is_residue.to(device).unsqueeze(-1)
            pooled: Tensor = (hidden.float() * weights).sum(1) / weights.sum(1)
            means |= dict(zip((protein.id for protein in batch), pooled.cpu().numpy(), strict=True))
        return means

    yield Peer("transformers", dtype, embed, f"EsmModel {version('transformers')}, SDPA")


def esm_efficient_name(name: str) -> str:
    """Return the name that esm-efficient gives to a tensor of fair-esm's."""
    for ours, theirs in (
        ("self_attn_layer_norm", "self_attn.norm"),
        ("_proj", ""),
        ("final_layer_norm", "final.0"),
        ("fc1", "final.1"),
        ("fc2", "final.3"),
    ):
        name = name.replace(ours, theirs)
    return name


def flash_attention_2() -> str:
    """Name the FlashAttention-2 that esm-efficient calls: flash-attn's, where it is installed, else torch's.

    torch has a copy of flash-attn's kernels, which is put in its place.
    """
    with suppress(PackageNotFoundError):
        return f"flash-attn {version('flash-attn')}"
    from torch.nn.attention.varlen import varlen_attn

    def flash_attn_varlen_func(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor,
        max_seqlen_q: int,
        max_seqlen_k: int,
        dropout_p: float,
        causal: bool,
    ) -> Any:
        assert dropout_p == 0
        assert not causal
        return varlen_attn(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)

    package, unused = ModuleType("flash_attn"), ModuleType("flash_attn.bert_padding")
    vars(package).update(
        __spec__=ModuleSpec("flash_attn", None), flash_attn_varlen_func=flash_attn_varlen_func
    )
    vars(unused).update(pad_input=None, unpad_input=None)
    sys.modules |= {package.__name__: package, unused.__name__: unused}
    return "FlashAttention-2 of torch"


def esm_efficient_peers(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> Iterator[Peer]:
    """esm-efficient, packed; it has bf16 alone.

    Raises
    ------
    ImportError
        If esm-efficient is not installed.
    """
    installed, attention = version("esm-efficient"), flash_attention_2()
    esme: Any = import_module("esme")
    with torch.device(device):
        module = esme.ESM2(model.num_layers, model.embed_dim, model.attention_heads, dtype=torch.bfloat16)
    copy_weights(module, model, device, esm_efficient_name, TOKEN_DROPOUT_FACTOR)
    module = module.eval()

    @torch.inference_mode()
    def embed(proteins: Sequence[Protein]) -> Means:
        means: Means = {}
        for pack in make_packs(proteins, PACKED_TOKENS):
            bounds = np.cumsum([0, *(len(segment.tokens) for segment in pack.segments)])
            tokens = torch.from_numpy(np.concatenate([segment.tokens for segment in pack.segments]))
            cu_seqlens = torch.from_numpy(bounds).int().to(device)
            hidden = module.forward_representation(
                tokens.long().to(device), (cu_seqlens, int(np.diff(bounds).max()))
            )
            for segment, first, stop in zip(pack.segments, bounds[:-1], bounds[1:], strict=True):
                mean = hidden[first + 1 : stop - 1].float().mean(0)
                means[proteins[segment.protein].id] = mean.cpu().numpy()
        return means

    yield Peer("esm-efficient", torch.bfloat16, embed, f"{installed}, packed, {attention}")


PEERS = {
    "fair-esm": fair_esm_peers,
    "transformers": transformers_peers,
    "esm-efficient": esm_efficient_peers,
}
"""Contestants by name. Each yields one model at a time, so that two are never on the device together."""
