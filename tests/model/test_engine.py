"""The engine's life: it starts no thread before it has work, and is closed at the end of a `with`."""

from __future__ import annotations

import threading

import pytest
import torch

from dist_esm.config import ModelConfig
from dist_esm.fasta.tokens import tokenize
from dist_esm.model.engine import Engine
from dist_esm.model.kernels.choose import PLAIN
from dist_esm.model.weights import load_model
from dist_esm.types import Pack, Segment
from helpers.checkpoints import A8M

PACK = Pack((Segment(0, 0, tokenize(b"MKTAYIAKQR"), (0, 10)),))


def engine() -> Engine:
    config = ModelConfig("esm2_t6_8M_UR50D", A8M.num_layers, A8M.embed_dim, A8M.attention_heads, "random")
    return Engine(load_model(config, torch.device("cpu"), torch.float32, PLAIN), [6], False, num_threads=2)


def forward_threads() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("forward")]


def test_threads_start_with_the_first_pack_and_end_with_the_engine():
    with engine() as entered:
        assert forward_threads() == []
        (embedding,) = entered.run(PACK)
        assert embedding.sums[6].shape == (A8M.embed_dim,)
        assert len(forward_threads()) == 1
    assert forward_threads() == []
    with pytest.raises(RuntimeError, match="after shutdown"):
        entered.submit(PACK)
    entered.close()


def test_an_engine_is_closed_when_its_run_ends_with_an_error():
    entered = engine()
    with pytest.raises(ValueError, match="too many"), entered:
        _, _ = entered.run(PACK) * 3
    assert forward_threads() == []
