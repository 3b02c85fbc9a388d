"""`job=selfcheck`: how far the numbers of these settings, weights and GPUs are from fair-esm's, on a sample of the user's own proteins.

Two questions. *Are the numbers fair-esm's?* The configured path (device, dtype, attention, packs) against fair-esm's own module in fp32, built
of the same tensors, on the tokens of fair-esm's own converter. *Same protein, same bits?* Each protein alone against the same protein in full
packs, in two orders; and every rank against the other ranks on the same kind of device.

Every rank does all of it on its own device, one model after the other, so a device needs room for the larger of the two, not for both.
Where fair-esm's does not fit all the same, it runs on the CPU.
"""

from __future__ import annotations

import hashlib
import json
import math
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from dist_esm.atomic import atomically
from dist_esm.config import Config, to_dict
from dist_esm.distributed import RefusedError, World
from dist_esm.jobs.report import versions
from dist_esm.jobs.selfcheck.compare import (
    Limits,
    RankCheck,
    arrays,
    bit_difference,
    compare,
    problems,
    table,
)
from dist_esm.jobs.selfcheck.oracle import Theirs, fair_esm_answers, free_device, free_memory, wanted
from dist_esm.jobs.selfcheck.sample import Sampled, choose, draw, segments_of
from dist_esm.jobs.setup import Setup, choose_setup, describe, find_inputs, load_engine
from dist_esm.model.engine import Engine, is_out_of_memory
from dist_esm.model.pool import combine
from dist_esm.model.weights import RANDOM, locate
from dist_esm.pipeline.packer import Packer
from dist_esm.planning.agree import agree_on_plan
from dist_esm.planning.pipes import remove_copies
from dist_esm.types import FastaFile, Pack, Segment, SegmentEmbedding

MAX_UNREAD = 5
"""Inputs that could not be read that are printed."""


def selfcheck(config: Config, world: World) -> int:
    """Measure, print a table, and write `selfcheck.json`; nothing else in `output_dir` is touched.

    Returns
    -------
    int
        Rank 0: 0 if everything is within the limits, 1 if anything is over. Other ranks: 0.

    Raises
    ------
    RefusedError
        On every rank, if the check cannot be made on one of them.
    """
    files = find_inputs(config, world).files
    setup = choose_setup(config, world)
    proteins, num_seen, unread = sample_together(config, files, world)
    remove_copies(files)
    began = time.monotonic()
    own = world.all_or_none(own_answers, config, setup, proteins, world)
    free = world.all_or_none(free_memory)
    theirs = world.all_or_none(fair_esm_answers, config, setup.device, proteins, world, free)
    mine = world.all_or_none(judge, config, setup, proteins, own, theirs, world, time.monotonic() - began)
    ranks: list[RankCheck] = world.all_gather(mine)
    if not world.is_main:
        return 0
    found = problems(ranks, [named(one) for one in proteins])
    write(config, setup, proteins, num_seen, unread, ranks, found)
    lengths = f"{proteins[0].embedded} to {proteins[-1].embedded} residues"
    print(
        f"{config.model.name} against fair-esm's own model in fp32: {len(proteins)} of {num_seen} proteins, {lengths}\n{table(ranks)}"
    )
    if config.model.weights == RANDOM:
        print("WEIGHTS ARE RANDOM: this says nothing of real ones")
    for line in unread[:MAX_UNREAD]:
        print(f"not read to its end: {line}")
    if len(unread) > MAX_UNREAD:
        print(f"and {len(unread) - MAX_UNREAD} more, all in selfcheck.json")
    for line in found:
        print(f"over: {line}")
    print("over the limits" if found else "ok: within the limits", flush=True)
    return 1 if found else 0


def sample_together(
    config: Config, files: list[FastaFile], world: World
) -> tuple[list[Sampled], int, list[str]]:
    """The sample, how many proteins it was drawn from, and what could not be read. Each rank reads its bin of the plan."""
    plan = agree_on_plan(config, files, [], world)
    sampler, unread = draw((plan.units[index] for index in plan.bins[world.rank]), files, config)
    told = world.all_gather((sampler.candidates(), sampler.num_seen, unread))
    proteins = choose((one for kept, _, _ in told for one in kept), config.selfcheck.proteins)
    every_unread = sorted(line for _, _, lines in told for line in lines)
    if not proteins:
        raise RefusedError(
            [
                f"input has no protein to check: {every_unread[0] if every_unread else 'all records are empty or left out'}"
            ]
        )
    return proteins, sum(number for _, number, _ in told), every_unread


@dataclass(frozen=True)
class Own:
    """What our forward answered."""

    alone: list[list[SegmentEmbedding]]
    """For each protein the answers of its segments, each embedded alone."""
    other_bits: dict[int, float]
    """Index of a protein with other bits in some pack, and the largest difference."""
    num_packs: int
    num_answers: int
    toks_per_batch: int


def own_answers(config: Config, setup: Setup, proteins: Sequence[Sampled], world: World) -> Own:
    """Load the configured model, check its bits, and let it go.

    Raises
    ------
    ValueError
        If it does not fit.
    """

    def work() -> Own:  # a frame of its own, so that nothing holds the model when its memory is given back
        engine = load_engine(config, setup, world)
        try:
            return check_bits(engine, proteins)
        finally:
            engine.close()

    try:
        return work()
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    finally:
        free_device(setup.device)
    raise ValueError(
        f"{config.model.name} ran out of memory on {describe(setup.device)}: use a smaller toks_per_batch or truncation_seq_length"
    )


def check_bits(engine: Engine, proteins: Sequence[Sampled]) -> Own:
    """Embed each protein alone, then all of them in full packs in two orders, and compare."""
    segments = [segment for number, one in enumerate(proteins) for segment in segments_of(number, one)]
    alone: list[list[SegmentEmbedding]] = [[] for _ in proteins]
    for segment in segments:
        alone[segment.protein] += engine.run(Pack((segment,)))
    other_order = random.Random(0).sample(segments, len(segments))
    packs = [pack for order in (segments, other_order) for pack in full_packs(order, engine.toks_per_batch)]
    other_bits: dict[int, float] = {}
    for pack in packs:
        for segment, answer in zip(pack.segments, engine.run(pack), strict=True):
            difference = bit_difference(alone[segment.protein][segment.part], answer)
            if difference is not None:
                other_bits[segment.protein] = max(difference, other_bits.get(segment.protein, 0.0))
    return Own(
        alone, other_bits, len(packs), sum(len(pack.segments) for pack in packs), engine.toks_per_batch
    )


def full_packs(segments: Sequence[Segment], capacity: int) -> list[Pack]:
    """Packs of all segments, each filled up with more of the same segments, as in the midst of a long run."""
    packer = Packer(capacity)
    packs = [pack for segment in segments for pack in packer.add(segment)]
    full = []
    for pack in (*packs, *packer.flush()):
        company, room = list(pack.segments), capacity - pack.num_tokens
        fitting = list(segments)
        while fitting := [segment for segment in fitting if len(segment.tokens) <= room]:
            for segment in fitting:
                if len(segment.tokens) <= room:
                    company.append(segment)
                    room -= len(segment.tokens)
        full.append(Pack(tuple(company)))
    return full


def judge(
    config: Config,
    setup: Setup,
    proteins: Sequence[Sampled],
    own: Own,
    theirs: Theirs,
    world: World,
    seconds: float,
) -> RankCheck:
    """Compare what both models answered."""
    names = [named(one) for one in proteins]
    ours = [
        combine(answers, one.embedded, wanted(config))
        for answers, one in zip(own.alone, proteins, strict=True)
    ]
    comparisons = [
        compare(
            kind,
            layer,
            names,
            [one[kind, layer] for one in ours],
            [one[kind, layer] for one in theirs.vectors],
            limits,
        )
        for kind, layer in wanted(config)
        for limits in (Limits.of(config.selfcheck, setup.dtype, kind),)
    ]
    is_gpu = setup.device.type == "cuda"
    return RankCheck(
        rank=world.rank,
        host=world.host,
        device=describe(setup.device),
        kind_of_device=torch.cuda.get_device_name(setup.device)
        if is_gpu
        else f"cpu with {torch.backends.cpu.get_cpu_capability()}",
        dtype=str(setup.dtype).removeprefix("torch."),
        kernels=str(setup.kernels),
        toks_per_batch=own.toks_per_batch,
        fair_esm_device=theirs.device,
        comparisons=tuple(comparisons),
        num_packs=own.num_packs,
        num_answers=own.num_answers,
        other_bits={names[number]: difference for number, difference in own.other_bits.items()},
        other_tokens=tuple(names[number] for number in theirs.other_tokens),
        bits=tuple(digest(answers) for answers in own.alone),
        seconds=round(seconds, 3),
    )


def digest(answers: Sequence[SegmentEmbedding]) -> str:
    """A fingerprint of the bits of a protein's answers."""
    found = hashlib.sha256()
    for answer in answers:
        for values in arrays(answer):
            found.update(values.tobytes())
    return found.hexdigest()


def named(one: Sampled) -> str:
    """A protein in words."""
    return f"{one.id} ({one.source}, {one.embedded} residues)"


def write(
    config: Config,
    setup: Setup,
    proteins: Sequence[Sampled],
    num_seen: int,
    unread: Sequence[str],
    ranks: Sequence[RankCheck],
    found: Sequence[str],
) -> None:
    """Write `selfcheck.json`; a number that is not finite is null."""
    content = {
        "status": "over" if found else "ok",
        "over": found,
        "model": {"weights_from": config.model.weights or str(locate(config.model)), **setup.provenance},
        "limits": {
            kind.name: asdict(Limits.of(config.selfcheck, setup.dtype, kind)) for kind, _ in wanted(config)
        },
        "proteins_seen": num_seen,
        "not_read": unread,
        "sample": [
            {
                "id": one.id,
                "source": one.source,
                "residues": one.length,
                "embedded": one.embedded,
                "segments": len(one.spans),
            }
            for one in proteins
        ],
        "ranks": [asdict(rank) for rank in ranks],
        "config": to_dict(config),
        "versions": versions(),
    }
    with atomically(config.output_dir / "selfcheck.json") as beside:
        beside.write_text(json.dumps(finite(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")


def finite(value: Any) -> Any:
    """Plain values, with None for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
