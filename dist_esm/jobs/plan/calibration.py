"""How fast this rank's device is with the model: a few packs of proteins as long as those of the input.

Speed does not depend on the weights, so they are random and no checkpoint is read. On a CPU, where a large
model takes minutes to draw and to run, only some of its layers are: all layers cost the same.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, cycle, islice

import torch

from dist_esm.config import Config, Include
from dist_esm.distributed import World
from dist_esm.fasta.segments import Span, make_segments
from dist_esm.jobs.setup import Setup
from dist_esm.launcher import num_cores
from dist_esm.model.checkpoints.locate import RANDOM
from dist_esm.model.engine import AHEAD, Engine, Submitted, is_out_of_memory
from dist_esm.model.memory import parameter_bytes
from dist_esm.model.speed import CPU_FLOPS, flops_of
from dist_esm.model.weights import architecture, load_model
from dist_esm.pipeline.packer import Packer
from dist_esm.types import Pack, Segment

SECONDS = 2.0
"""A measurement takes about so long, beside loading and the first pack."""
CPU_PARAMETERS = 100_000_000
"""Parameters of the layers that a CPU is measured with, unless one layer has more."""
CPU_PACK_SECONDS = 0.5
"""A protein of a measurement on a CPU takes about so long at most."""
CPU_PACKS, GPU_PACKS = 32, 4
"""Packs that are drawn; they are run again and again."""
AMINO_ACIDS = b"ACDEFGHIKLMNPQRSTVWY"
TYPICAL_LENGTHS = (100, 200, 300, 300, 400, 500, 700)
"""Residues of the proteins where the input gives none."""


@dataclass(frozen=True)
class Calibration:
    """What was measured on one rank."""

    flops_per_second: float
    """0 if a pack did not fit in memory."""
    tokens: int
    layers: int
    """Layers that were computed, of those that a run computes."""
    of_layers: int
    seconds: float
    peak_bytes: int | None
    """Of a GPU's memory, with the model and packs on their way."""

    @property
    def tokens_per_second(self) -> float:
        """Speed of all layers on the proteins that were measured."""
        return self.tokens / self.seconds * self.layers / self.of_layers if self.seconds else 0.0


def calibrate(config: Config, setup: Setup, lengths: Sequence[int], world: World) -> Calibration:
    """Measure the device of this rank.

    Parameters
    ----------
    config, setup
        Of the run.
    lengths
        Residues of what the device would see; any sample of them.
    world
        The ranks; those of one host share its cores.
    """
    arch = architecture(config.model)
    depth = max(1, *config.resolved_layers())
    layers = depth if setup.device.type == "cuda" else layers_for_cpu(config, depth)
    model = replace(config.model, weights=RANDOM, adapter=None, num_layers=layers)
    engine = Engine(
        load_model(model, setup.device, setup.dtype, setup.kernels),
        [layers],
        Include.per_tok in config.include,
        config.toks_per_batch,
        max(1, num_cores() // world.local_world_size),
        rows_dtype=getattr(torch, config.save_dtype.name),
    )
    most = 1 << 30
    if not engine.is_gpu:
        most = max(16, int(CPU_PACK_SECONDS * CPU_FLOPS / flops_of(arch, layers, 1, 0)))
    packs = draw_packs(draw_segments(lengths or TYPICAL_LENGTHS, most), engine)
    try:
        engine.warm_up()
        tokens, squares, seconds = run_packs(engine, packs)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        tokens, squares, seconds = 0, 0, 0.0
    finally:
        engine.close()
    flops = flops_of(arch, layers, tokens, squares)
    peak = torch.cuda.max_memory_allocated(setup.device) if engine.is_gpu else None
    return Calibration(flops / seconds if seconds else 0.0, tokens, layers, depth, seconds, peak)


def layers_for_cpu(config: Config, depth: int) -> int:
    """Return of how many layers a CPU is measured."""
    arch = architecture(config.model)
    of_layer = parameter_bytes(arch, torch.int8) / arch.num_layers
    return max(1, min(depth, int(CPU_PARAMETERS / of_layer)))


def draw_segments(lengths: Sequence[int], most: int) -> Iterator[Segment]:
    """Yield random proteins without end, of lengths drawn from a sample."""
    draws = random.Random(0)
    for index in count():
        length = max(1, min(draws.choice(lengths), most))
        residues = bytes(draws.choices(AMINO_ACIDS, k=length))
        yield from make_segments(index, residues, [Span(0, length, 0, length)])


def draw_packs(segments: Iterator[Segment], engine: Engine) -> list[Pack]:
    """Return full packs for a GPU; for a CPU small ones, so that the clock is looked at often."""
    if not engine.is_gpu:
        return [Pack(tuple(islice(segments, engine.num_threads))) for _ in range(CPU_PACKS)]
    packer = Packer(engine.toks_per_batch)
    return list(islice((pack for segment in segments for pack in packer.add(segment)), GPU_PACKS))


def run_packs(engine: Engine, packs: Sequence[Pack]) -> tuple[int, int, float]:
    """Run packs for a while, `AHEAD` of them submitted before a result is read.

    Returns
    -------
    tokens, the sum of the squared lengths, and the seconds that they took
    """
    engine.run(packs[0])  # the first is slower
    tokens = squares = 0
    submitted: list[Submitted] = []
    began = time.monotonic()
    for pack in cycle(packs):
        submitted.append(engine.submit(pack))
        if len(submitted) > AHEAD:
            submitted.pop(0).result()
        tokens += pack.num_tokens
        squares += sum(len(segment.tokens) ** 2 for segment in pack.segments)
        if time.monotonic() - began > SECONDS:
            break
    for pack_ahead in submitted:
        pack_ahead.result()
    return tokens, squares, time.monotonic() - began
