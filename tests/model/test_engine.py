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


class SmallCard:
    """Stands for a GPU that has room for packs of so many rows; there is none at hand to fill."""

    def __init__(self, most: int) -> None:
        self.most, self.tried = most, []

    def run(self, pack: Pack, num_rows: int) -> list:
        self.tried.append(num_rows)
        if num_rows > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return []


@pytest.mark.parametrize(("most", "rows"), [(50_000, 25_344), (20_000, 12_672), (1_000, 792), (396, 396)])
def test_a_pack_that_does_not_fit_at_the_start_is_halved(most, rows):
    card = SmallCard(most)
    with engine() as entered:
        entered.is_gpu, entered.toks_per_batch, entered.run = True, 25_344, card.run
        entered.warm_up()
        entered.is_gpu = False
    assert entered.toks_per_batch == card.tried[-1] == rows
    assert card.tried == [25_344 >> i for i in range(len(card.tried))]


def test_what_is_no_lack_of_memory_or_has_no_remedy_is_an_error():
    with engine() as entered:
        entered.is_gpu, entered.toks_per_batch, entered.run = True, 25_344, SmallCard(100).run
        with pytest.raises(torch.OutOfMemoryError):
            entered.warm_up()
        entered.toks_per_batch = 25_344

        def fail(pack: Pack, num_rows: int) -> list:
            raise RuntimeError("no kernel image")

        entered.run = fail
        with pytest.raises(RuntimeError, match="no kernel image"):
            entered.warm_up()
        assert entered.toks_per_batch == 25_344
        entered.is_gpu = False
