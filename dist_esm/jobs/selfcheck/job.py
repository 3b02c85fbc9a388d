"""`job=selfcheck`: how far the numbers of these settings, weights and GPUs are from fair-esm's, on a sample.

Two questions. *Are the numbers fair-esm's?* The configured path (device, dtype, attention, packs) against
fair-esm's own module in fp32, built of the same tensors, on the tokens of fair-esm's own converter. *Same
protein, same bits?* Each protein alone against the same protein in full packs, in two orders; and every
rank against the other ranks on the same kind of device.

Every rank does all of it on its own device, one model after the other, so a device needs room for the
larger of the two, not for both. Where fair-esm's does not fit all the same, it runs on the CPU.
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

import numpy as np
import torch
from numpy.typing import NDArray

from dist_esm.atomic import atomically
from dist_esm.config import Config, plain_values
from dist_esm.distributed import RefusedError, World
from dist_esm.jobs.report.write import versions
from dist_esm.jobs.selfcheck.compare import (
    Comparison,
    Limits,
    RankCheck,
    arrays_of,
    bit_difference,
    compare,
    list_problems,
    make_table,
    more_exact,
)
from dist_esm.jobs.selfcheck.oracle import (
    FairEsmResult,
    compared_representations,
    embed_with_fair_esm,
    free_device,
)
from dist_esm.jobs.selfcheck.sample import (
    SampledProtein,
    choose_sample,
    read_candidates,
    segments_of,
    with_spans,
)
from dist_esm.jobs.setup import Setup, choose_setup, describe, find_inputs, load_engine
from dist_esm.model.checkpoints.locate import RANDOM, locate
from dist_esm.model.engine import Engine, is_out_of_memory
from dist_esm.model.memory import meminfo
from dist_esm.model.pool import combine
from dist_esm.names import printable
from dist_esm.pipeline.packer import Packer
from dist_esm.pipeline.retry import widen
from dist_esm.planning.agree import agree_on_plan
from dist_esm.planning.pipes import remove_copies
from dist_esm.types import FastaFile, Pack, RankResult, Segment, SegmentEmbedding

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
    proteins, num_seen, unread = agree_on_sample(config, files, world)
    remove_copies(files)
    began = time.monotonic()
    ours = world.all_or_none(embed_and_check_bits, config, setup, proteins, world)
    free = world.all_or_none(meminfo, "MemAvailable")
    theirs = world.all_or_none(embed_with_fair_esm, config, setup.device, proteins, world, free)
    seconds = time.monotonic() - began
    mine = world.all_or_none(compare_models, config, setup, proteins, ours, theirs, world, seconds)
    ranks: list[RankCheck] = world.all_gather(mine, RankCheck, Comparison, Limits)
    if not world.is_main:
        return 0
    over = list_problems(ranks, [describe_protein(protein) for protein in proteins])
    write_selfcheck(config, setup, proteins, num_seen, unread, ranks, over)
    sample = f"{len(proteins)} of {num_seen} proteins"
    lengths = f"{proteins[0].embedded} to {proteins[-1].embedded} residues"
    print(
        f"{config.model.name} against fair-esm's own model in fp32: {sample}, {lengths}\n{make_table(ranks)}"
    )
    if config.model.weights == RANDOM:
        print("WEIGHTS ARE RANDOM: this says nothing of real ones")
    for line in unread[:MAX_UNREAD]:
        print(printable(f"not read to its end: {line}"))
    if len(unread) > MAX_UNREAD:
        print(f"and {len(unread) - MAX_UNREAD} more, all in selfcheck.json")
    for line in over:
        print(f"over: {line}")
    closer = more_exact(setup.precision, config.fp8)
    if closer and any(not comparison.is_within for rank in ranks for comparison in rank.comparisons):
        print(f"closer to fair-esm's numbers: {closer}")
    print("over the limits" if over else "ok: within the limits", flush=True)
    return 1 if over else 0


def agree_on_sample(
    config: Config, files: list[FastaFile], world: World
) -> tuple[list[SampledProtein], int, list[str]]:
    """Draw the sample together: each rank reads its bin of the plan.

    Returns
    -------
    the sample; how many proteins it was drawn from; a line for each unit that could not be read to its end
    """
    plan = agree_on_plan(config, files, [], world)
    sampler, unread = read_candidates((plan.units[index] for index in plan.bins[world.rank]), files, config)
    told = world.all_gather((sampler.candidates(), sampler.num_seen, unread), SampledProtein)
    candidates = (with_spans(protein) for kept, _, _ in told for protein in kept)
    proteins = choose_sample(candidates, config.selfcheck.proteins)
    every_unread = sorted(line for _, _, lines in told for line in lines)
    if not proteins:
        reason = every_unread[0] if every_unread else "all records are empty or left out"
        raise RefusedError([f"input has no protein to check: {reason}"])
    return proteins, sum(num_seen for _, num_seen, _ in told), every_unread


@dataclass(frozen=True)
class EngineResult:
    """The embeddings by our own forward, and whether their bits depend on the company in a pack."""

    alone: list[list[SegmentEmbedding]]
    """For each protein the embeddings of its segments, each embedded alone; what is not finite is computed
    again in a wider dtype, as in a run."""
    other_bits: dict[int, float]
    """Index of each protein with other bits in some pack, and the largest difference."""
    recomputed: list[int]
    """Indices of the proteins that were computed again."""
    num_packs: int
    num_answers: int
    toks_per_batch: int


def embed_and_check_bits(
    config: Config, setup: Setup, proteins: Sequence[SampledProtein], world: World
) -> EngineResult:
    """Load the configured model, check its bits, and let it go.

    Raises
    ------
    ValueError
        If it does not fit.
    """
    try:
        return _load_and_check_bits(config, setup, proteins, world)
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
    finally:
        free_device(setup.device)
    remedy = "use a smaller toks_per_batch or truncation_seq_length"
    raise ValueError(f"{config.model.name} ran out of memory on {describe(setup.device)}: {remedy}")


def _load_and_check_bits(
    config: Config, setup: Setup, proteins: Sequence[SampledProtein], world: World
) -> EngineResult:
    """Hold the model in a frame of its own, so that nothing holds it when its memory is given back."""
    engine = load_engine(config, setup, world)
    try:
        return check_bits(engine, proteins)
    finally:
        engine.close()


def check_bits(engine: Engine, proteins: Sequence[SampledProtein]) -> EngineResult:
    """Embed each protein alone, then all of them in full packs in two orders, and compare.

    What is not finite is computed again after that.
    """
    segments = [segment for index, protein in enumerate(proteins) for segment in segments_of(index, protein)]
    alone: list[list[SegmentEmbedding]] = [[] for _ in proteins]
    for segment in segments:
        alone[segment.protein] += engine.run(Pack((segment,)))
    other_order = random.Random(0).sample(segments, len(segments))
    packs = [pack for order in (segments, other_order) for pack in full_packs(order, engine.toks_per_batch)]
    other_bits: dict[int, float] = {}
    for pack in packs:
        for segment, embedding in zip(pack.segments, engine.run(pack), strict=True):
            difference = bit_difference(alone[segment.protein][segment.part], embedding)
            if difference is not None:
                other_bits[segment.protein] = max(difference, other_bits.get(segment.protein, 0.0))
    recomputed = []
    for segment in segments:
        embedding = alone[segment.protein][segment.part]
        wider = widen(engine, segment, embedding, RankResult())
        if wider is not embedding and isinstance(wider, SegmentEmbedding):  # else it is over any limit
            recomputed.append(segment.protein)
            alone[segment.protein][segment.part] = wider
    num_answers = sum(len(pack.segments) for pack in packs)
    return EngineResult(
        alone, other_bits, sorted(set(recomputed)), len(packs), num_answers, engine.toks_per_batch
    )


def full_packs(segments: Sequence[Segment], capacity: int) -> list[Pack]:
    """Pack all segments, and fill each pack up with more of the same, as in the midst of a long run."""
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


def compare_models(
    config: Config,
    setup: Setup,
    proteins: Sequence[SampledProtein],
    ours: EngineResult,
    theirs: FairEsmResult,
    world: World,
    seconds: float,
) -> RankCheck:
    """Compare the embeddings by both models, ours with the precision that they are saved in."""
    names = [describe_protein(protein) for protein in proteins]
    representations = compared_representations(config)
    our_embeddings = [
        combine(segments, protein.embedded, representations)
        for segments, protein in zip(ours.alone, proteins, strict=True)
    ]
    comparisons = [
        compare(
            include,
            layer,
            names,
            [as_saved(embedding[include, layer], config) for embedding in our_embeddings],
            [embedding[include, layer] for embedding in theirs.embeddings],
            Limits.of(config.selfcheck, setup.precision, include, config.save_dtype),
        )
        for include, layer in representations
    ]
    if setup.device.type == "cuda":
        kind_of_device = torch.cuda.get_device_name(setup.device)
    else:
        kind_of_device = f"cpu with {torch.backends.cpu.get_cpu_capability()}"
    return RankCheck(
        rank=world.rank,
        host=world.host,
        device=describe(setup.device),
        kind_of_device=kind_of_device,
        dtype=str(setup.precision).removeprefix("torch."),
        kernels=str(setup.kernels),
        toks_per_batch=ours.toks_per_batch,
        fair_esm_device=theirs.device,
        comparisons=tuple(comparisons),
        num_packs=ours.num_packs,
        num_answers=ours.num_answers,
        other_bits={names[index]: difference for index, difference in ours.other_bits.items()},
        other_tokens=tuple(names[index] for index in theirs.other_tokens),
        bits=tuple(digest_of_bits(segments) for segments in ours.alone),
        seconds=round(seconds, 3),
        recomputed=tuple(names[index] for index in ours.recomputed),
    )


def as_saved(values: NDArray[np.float32], config: Config) -> NDArray[np.float32]:
    """Return numbers rounded to `save_dtype`; what is too large for it is infinite."""
    with np.errstate(over="ignore"):
        return values.astype(config.save_dtype.name).astype(np.float32)


def digest_of_bits(segments: Sequence[SegmentEmbedding]) -> str:
    """Digest the bits of a protein's embedding."""
    digest = hashlib.sha256()
    for segment in segments:
        for values in arrays_of(segment):
            digest.update(values.tobytes())
    return digest.hexdigest()


def describe_protein(protein: SampledProtein) -> str:
    """Name a protein for people."""
    return printable(f"{protein.id} ({protein.source}, {protein.embedded} residues)")


def write_selfcheck(
    config: Config,
    setup: Setup,
    proteins: Sequence[SampledProtein],
    num_seen: int,
    unread: Sequence[str],
    ranks: Sequence[RankCheck],
    over: Sequence[str],
) -> None:
    """Write `selfcheck.json`; a number that is not finite is null."""
    includes = [include for include, _ in compared_representations(config)]
    content = {
        "status": "over" if over else "ok",
        "over": over,
        "model": {"weights_from": config.model.weights or str(locate(config.model)), **setup.provenance},
        "limits": {
            include.name: asdict(Limits.of(config.selfcheck, setup.precision, include, config.save_dtype))
            for include in includes
        },
        "proteins_seen": num_seen,
        "not_read": unread,
        "sample": [
            {
                "id": protein.id,
                "source": protein.source,
                "residues": protein.length,
                "embedded": protein.embedded,
                "segments": len(protein.spans),
            }
            for protein in proteins
        ],
        "ranks": [asdict(rank) for rank in ranks],
        "config": plain_values(config),
        "versions": versions(),
    }
    text = json.dumps(null_if_not_finite(content), indent=1, allow_nan=False)
    with atomically(config.output_dir / "selfcheck.json") as beside:
        beside.write_text(text + "\n", encoding="utf-8")


def null_if_not_finite(value: Any) -> Any:
    """Return plain values with None for each number that JSON does not have."""
    if isinstance(value, dict):
        return {key: null_if_not_finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [null_if_not_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
