"""Packs are made to fit the memory that a card has free."""

from __future__ import annotations

import pytest
import torch

from dist_esm.config import ModelConfig, model_config
from dist_esm.model.engine import default_toks_per_batch
from dist_esm.model.memory import LEAST_ROWS, parameter_bytes, rows_that_fit
from dist_esm.model.weights import architecture

GB = 10**9
FP16 = torch.float16


def model(name: str) -> ModelConfig:
    return model_config(f"esm2_{name}_UR50D")


@pytest.mark.parametrize(
    ("name", "free", "share"),
    [
        ("t36_3B", 80 * GB, 1),
        ("t36_3B", 15 * GB, 1),
        ("t36_3B", 9 * GB, 2),
        ("t36_3B", 7 * GB, 4),
        ("t33_650M", 15 * GB, 1),
        ("t33_650M", 4 * GB, 2),
        ("t48_15B", 80 * GB, 1),
        ("t48_15B", 34 * GB, 4),
    ],
)
def test_packs_are_halved_until_they_fit_beside_the_model(name, free, share):
    arch = architecture(model(name))
    default = default_toks_per_batch("cuda", arch.embed_dim)
    rows = rows_that_fit(arch, FP16, free, default)
    assert rows == default // share
    # What torch allocates for the products of one block alone: the stream, and both sides of the activation.
    assert parameter_bytes(arch, FP16) + rows * arch.embed_dim * (4 + 2 * 4 + 2 * 4) < free


def test_a_pack_never_becomes_smaller_than_a_protein_or_unknown_memory_a_reason():
    arch = architecture(model("t36_3B"))
    assert LEAST_ROWS <= rows_that_fit(arch, FP16, GB, 25_344) < 2 * LEAST_ROWS
    assert rows_that_fit(arch, FP16, None, 25_344) == 25_344
