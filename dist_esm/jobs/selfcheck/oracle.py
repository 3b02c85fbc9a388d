"""fair-esm's own model in fp32, as `job=selfcheck` asks it: on this rank's device if it fits there, else on the CPU.

Its parameters are the tensors that our model was made of, one by one under fair-esm's names, its tokens come from fair-esm's own batch
converter, and a protein is a forward of its own, without padding.
"""

from __future__ import annotations

import gc
import logging
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from dist_esm.config import Config, Include
from dist_esm.distributed import World
from dist_esm.fair_esm import fair_esm_hidden, fair_esm_model, fair_esm_tokens
from dist_esm.jobs.selfcheck.sample import Sampled, segments_of
from dist_esm.jobs.setup import describe
from dist_esm.model.engine import num_cores
from dist_esm.model.esm2 import Architecture
from dist_esm.model.pool import ProteinEmbedding
from dist_esm.model.weights import architecture, fair_esm_tensors, tensor_shapes
from dist_esm.types import Segment

log = logging.getLogger("dist_esm")


@dataclass(frozen=True)
class Theirs:
    """What fair-esm's own model answered."""

    vectors: list[ProteinEmbedding]
    other_tokens: list[int]
    """Indices of the proteins whose tokens are not ours."""
    device: str


def fair_esm_answers(
    config: Config, device: torch.device, proteins: Sequence[Sampled], world: World, free: int | None
) -> Theirs:
    """Build fair-esm's model on the device, or on the CPU if it does not fit there, and ask it.

    Parameters
    ----------
    config
        Checked configuration.
    device
        Our model's.
    proteins
        What to ask for.
    world
        The ranks, those of one host sharing its memory.
    free
        `free_memory` before any rank began.

    Raises
    ------
    ValueError
        If it does not fit on the CPU either.
    """
    torch.set_float32_matmul_precision("highest")  # no TF32, whatever the environment asks for
    place = device
    if device.type == "cuda":
        try:
            return ask_fair_esm(config, device, place, proteins)
        except torch.OutOfMemoryError:
            place = torch.device("cpu")
        log.warning(
            "fair-esm's model in fp32 does not fit on %s: it runs on the CPU, which takes long",
            describe(device),
        )
        free_device(device)
    longest = max(stop - start for one in proteins for start, stop, _, _ in one.spans)
    refuse_what_does_not_fit(needed_bytes(architecture(config.model), longest), free, longest, world)
    torch.set_num_threads(max(1, num_cores() // world.local_world_size))
    return ask_fair_esm(config, device, place, proteins)


@torch.inference_mode()
def ask_fair_esm(
    config: Config, device: torch.device, place: torch.device, proteins: Sequence[Sampled]
) -> Theirs:
    """Build fair-esm's model at a place, of the tensors that ours has on its device, and ask it."""
    arch = architecture(config.model)
    model = fair_esm_model(
        arch.num_layers, arch.embed_dim, arch.attention_heads, fair_esm_tensors(config.model, device), place
    )
    other_tokens = [
        number
        for number, one in enumerate(proteins)
        if any(not has_fair_esm_tokens(one, segment) for segment in segments_of(number, one))
    ]
    return Theirs(
        [fair_esm_vectors(model, place, one, wanted(config)) for one in proteins],
        other_tokens,
        describe(place),
    )


def has_fair_esm_tokens(one: Sampled, segment: Segment) -> bool:
    """Whether fair-esm's converter makes the same tokens of a segment's residues."""
    start, stop, _, _ = one.spans[segment.part]
    return np.array_equal(fair_esm_tokens(one.residues[start:stop])[0].numpy(), segment.tokens)


def fair_esm_vectors(
    model: nn.Module, place: torch.device, one: Sampled, what: Sequence[tuple[Include, int]]
) -> ProteinEmbedding:
    """A protein's representations by fair-esm's model, pooled as its own scripts do: `mean(0)` over the residues."""
    layers = sorted({layer for _, layer in what})
    parts = []
    for start, stop, first, last in one.spans:
        hidden = fair_esm_hidden(model, fair_esm_tokens(one.residues[start:stop]).to(place), layers)
        parts.append(
            {
                layer: (x_TD[0].cpu(), x_TD[1 + first - start : 1 + last - start].cpu())
                for layer, x_TD in hidden.items()
            }
        )
    rows = {layer: torch.cat([part[layer][1] for part in parts]) for layer in layers}
    pooled = {
        Include.mean: lambda layer: rows[layer].mean(0),
        Include.bos: lambda layer: parts[0][layer][0],
        Include.per_tok: rows.__getitem__,
    }
    return {(kind, layer): pooled[kind](layer).numpy() for kind, layer in what}


def wanted(config: Config) -> list[tuple[Include, int]]:
    """Kinds and layers to compare: what is included, and the mean, which every output has."""
    kinds = dict.fromkeys((Include.mean, *config.include))
    return [(kind, layer) for kind in kinds for layer in config.resolved_layers()]


def needed_bytes(arch: Architecture, num_residues: int) -> int:
    """What fair-esm's model takes in fp32: its parameters, and for one forward about four attention matrices of a layer."""
    attention = 4 * arch.attention_heads * (num_residues + 2) ** 2
    return 4 * (sum(math.prod(shape) for shape in tensor_shapes(arch).values()) + attention)


def free_memory() -> int | None:
    """Bytes that this host can still give out; None where the system does not say."""
    path = Path("/proc/meminfo")
    found = re.search(r"MemAvailable:\s+(\d+) kB", path.read_text()) if path.is_file() else None
    return int(found[1]) << 10 if found else None


def refuse_what_does_not_fit(needed: int, free: int | None, longest: int, world: World) -> None:
    """Refuse before the system ends a process that takes too much.

    Raises
    ------
    ValueError
        If the ranks of this host together need more than is free.
    """
    if free is not None and needed * world.local_world_size > free:
        ranks = f" for each of {world.local_world_size} ranks" if world.local_world_size > 1 else ""
        raise ValueError(
            f"fair-esm's model in fp32 needs {needed / 1e9:.1f} GB{ranks} with proteins of {longest} residues, {world.host} has {free / 1e9:.1f} GB free: "
            f"check with fewer ranks, a smaller truncation_seq_length, or on a machine with more memory"
        )


def free_device(device: torch.device) -> None:
    """Give the memory of a model that is no longer used back to the device."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
