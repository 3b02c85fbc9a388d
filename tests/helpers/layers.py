"""Every layer of our model and of fair-esm's, for the same sequences."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import torch
from esm.data import Alphabet

from dist_esm.fasta.tokens import tokenize
from dist_esm.model.esm2 import ESM2
from dist_esm.model.kernels.attention import Seqlens
from dist_esm.types import Segment

CPU = torch.device("cpu")
SEQUENCES = (
    b"M",
    b"MKTAYIAKQRQISFVKSHFSRQLEERLGLIEVQAPILSRVGDGTQDNLSGAEKAVQVKVKALPDAQFEVV",
    b"ACDEFGHIKLMNPQRSTVWYXBUZO" * 4,
    b"GAVLIPFMW" * 21,
)


@torch.inference_mode()
def packed_layers(model: ESM2, sequences) -> list[dict[int, torch.Tensor]]:
    """Every layer of each protein, all in one pack."""
    tokens = [tokenize(sequence) for sequence in sequences]
    bounds = [0, *np.cumsum([len(protein_tokens) for protein_tokens in tokens]).tolist()]
    positions = np.concatenate([np.arange(len(protein_tokens)) for protein_tokens in tokens])
    layers = range(model.arch.num_layers + 1)
    hidden = model(
        torch.from_numpy(np.concatenate(tokens)).long(),
        torch.from_numpy(positions),
        Seqlens.of(bounds, CPU),
        layers,
    )
    return [{layer: hidden[layer][start:stop] for layer in layers} for start, stop in pairwise(bounds)]


@torch.inference_mode()
def fair_esm_layers(model, sequence: bytes) -> dict[int, torch.Tensor]:
    """Every layer of one protein, with BOS and EOS, by fair-esm's own model."""
    _, _, tokens = Alphabet.from_architecture("ESM-1b").get_batch_converter()([("id", sequence.decode())])
    hidden = model(tokens, repr_layers=list(range(model.num_layers + 1)))["representations"]
    return {layer: tensor[0] for layer, tensor in hidden.items()}


def segment_of(sequence: bytes, protein_index: int) -> Segment:
    """A whole protein as one segment."""
    return Segment(protein_index, 0, tokenize(sequence), (0, len(sequence)))
