"""fair-esm's own model in fp32, for `job=selfcheck`: on this rank's device if it fits there, else on the CPU.

Its parameters are the tensors that our model is made of, under fair-esm's names. Its tokens come from
fair-esm's own batch converter. A segment is a forward of its own, without padding.
"""

from __future__ import annotations

import gc
import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from dist_esm.config import Config, Include
from dist_esm.distributed import World
from dist_esm.fair_esm import fair_esm_hidden, fair_esm_model, fair_esm_tokens
from dist_esm.jobs.selfcheck.sample import SampledProtein, segments_of
from dist_esm.jobs.setup import describe
from dist_esm.launcher import num_cores
from dist_esm.model.checkpoints.checkpoint import tensor_shapes
from dist_esm.model.esm2 import Architecture
from dist_esm.model.weights import architecture, fair_esm_tensors
from dist_esm.types import ProteinEmbedding, Segment

log = logging.getLogger("dist_esm")


@dataclass(frozen=True)
class FairEsmResult:
    """The embeddings by fair-esm's own model."""

    embeddings: list[ProteinEmbedding]
    other_tokens: list[int]
    """Indices of the proteins whose tokens are not ours."""
    device: str


def embed_with_fair_esm(
    config: Config, device: torch.device, proteins: Sequence[SampledProtein], world: World, free: int | None
) -> FairEsmResult:
    """Build fair-esm's model on the device, or on the CPU if it does not fit there, and embed the sample.

    Parameters
    ----------
    config
        Checked configuration.
    device
        The device of our model.
    proteins
        The sample.
    world
        The ranks, those of one host sharing its memory.
    free
        Bytes that this host could still give out before any rank began; None if it does not say.

    Raises
    ------
    ValueError
        If it does not fit on the CPU either.
    """
    torch.set_float32_matmul_precision("highest")  # no TF32, whatever the environment asks for
    if device.type == "cuda":
        try:
            return run_fair_esm(config, device, device, proteins)
        except torch.OutOfMemoryError:
            pass  # the memory is given back outside the handler, whose traceback holds the model
        log.warning(
            "fair-esm's model in fp32 does not fit on %s: it runs on the CPU, which takes long",
            describe(device),
        )
        free_device(device)
    longest = max(span.stop - span.start for protein in proteins for span in protein.spans)
    refuse_what_does_not_fit(needed_bytes(architecture(config.model), longest), free, longest, world)
    torch.set_num_threads(max(1, num_cores() // world.local_world_size))
    return run_fair_esm(config, device, torch.device("cpu"), proteins)


@torch.inference_mode()
def run_fair_esm(
    config: Config, device: torch.device, oracle_device: torch.device, proteins: Sequence[SampledProtein]
) -> FairEsmResult:
    """Build fair-esm's model on `oracle_device`, of the tensors of ours on `device`, and embed the sample."""
    arch = architecture(config.model)
    tensors = fair_esm_tensors(config.model, device)
    model = fair_esm_model(arch.num_layers, arch.embed_dim, arch.attention_heads, tensors, oracle_device)
    other_tokens = [
        index
        for index, protein in enumerate(proteins)
        if not all(has_fair_esm_tokens(protein, segment) for segment in segments_of(index, protein))
    ]
    representations = compared_representations(config)
    embeddings = [fair_esm_embedding(model, oracle_device, protein, representations) for protein in proteins]
    return FairEsmResult(embeddings, other_tokens, describe(oracle_device))


def has_fair_esm_tokens(protein: SampledProtein, segment: Segment) -> bool:
    """Return whether fair-esm's converter makes the same tokens of a segment's residues."""
    span = protein.spans[segment.part]
    tokens_1T = fair_esm_tokens(protein.residues[span.start : span.stop])
    return np.array_equal(tokens_1T[0].numpy(), segment.tokens)


def fair_esm_embedding(
    model: nn.Module,
    device: torch.device,
    protein: SampledProtein,
    representations: Sequence[tuple[Include, int]],
) -> ProteinEmbedding:
    """Embed a protein with fair-esm's model, pooled as its own scripts do: `mean(0)` over the residues."""
    layers = sorted({layer for _, layer in representations})
    bos: list[dict[int, Tensor]] = []
    rows: list[dict[int, Tensor]] = []
    for span in protein.spans:
        tokens_1T = fair_esm_tokens(protein.residues[span.start : span.stop]).to(device)
        hidden = fair_esm_hidden(model, tokens_1T, layers)
        first, stop = 1 + span.keep_start - span.start, 1 + span.keep_stop - span.start  # BOS is row 0
        bos.append({layer: x_TD[0].cpu() for layer, x_TD in hidden.items()})
        rows.append({layer: x_TD[first:stop].cpu() for layer, x_TD in hidden.items()})
    x_LD = {layer: torch.cat([segment[layer] for segment in rows]) for layer in layers}
    pooled = {
        Include.mean: lambda layer: x_LD[layer].mean(0),
        Include.bos: lambda layer: bos[0][layer],
        Include.per_tok: x_LD.__getitem__,
    }
    return {(include, layer): pooled[include](layer).numpy() for include, layer in representations}


def compared_representations(config: Config) -> list[tuple[Include, int]]:
    """Return the representations to compare: those included, and the mean, which every output has."""
    includes = dict.fromkeys((Include.mean, *config.include))
    return [(include, layer) for include in includes for layer in config.resolved_layers()]


def needed_bytes(arch: Architecture, num_residues: int) -> int:
    """Return the bytes of fair-esm's model in fp32: its parameters, and about four attention matrices."""
    attention = 4 * arch.attention_heads * (num_residues + 2) ** 2
    return 4 * (sum(math.prod(shape) for shape in tensor_shapes(arch).values()) + attention)


def refuse_what_does_not_fit(needed: int, free: int | None, longest: int, world: World) -> None:
    """Refuse before the system ends a process that takes too much.

    Raises
    ------
    ValueError
        If the ranks of this host together need more than is free.
    """
    if free is not None and needed * world.local_world_size > free:
        ranks = f" for each of {world.local_world_size} ranks" if world.local_world_size > 1 else ""
        needs = f"needs {needed / 1e9:.1f} GB{ranks} with proteins of {longest} residues"
        remedy = "check with fewer ranks, a smaller truncation_seq_length, or on a machine with more memory"
        raise ValueError(
            f"fair-esm's model in fp32 {needs}, {world.host} has {free / 1e9:.1f} GB free: {remedy}"
        )


def free_device(device: torch.device) -> None:
    """Give the memory of a model that is no longer used back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
