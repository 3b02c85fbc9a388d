"""`job=plan`: all that a run does before it embeds, without a trace, and what it would come to."""

from __future__ import annotations

import logging
from dataclasses import replace
from typing import Any, NamedTuple

from dist_esm.config import Config
from dist_esm.distributed import RefusedError, World
from dist_esm.jobs.plan.calibration import Calibration, calibrate
from dist_esm.jobs.plan.checks import problems_of
from dist_esm.jobs.plan.reading import Reading, read_bin
from dist_esm.jobs.plan.room import remark_on_room, room_in
from dist_esm.jobs.plan.text import Outlook, RankPlan, plan_text
from dist_esm.jobs.plan.work import output_of, work_of
from dist_esm.jobs.setup import (
    Setup,
    describe,
    find_device,
    find_inputs,
    find_weights,
    first_on_host,
    setup_on,
)
from dist_esm.launcher import num_cores, num_restarts
from dist_esm.model.checkpoints.locate import AUTO
from dist_esm.model.engine import default_toks_per_batch
from dist_esm.model.memory import device_memory, pack_bytes, parameter_bytes
from dist_esm.model.weights import WeightsId, architecture
from dist_esm.outputs import journal
from dist_esm.outputs.in_hand import Deaths, known_deaths
from dist_esm.outputs.journal import Entry
from dist_esm.outputs.output_dir import check_settings, read_settings, refuse_unwritable
from dist_esm.outputs.trust import refuse_linked_folders
from dist_esm.planning.agree import agree_on_plan
from dist_esm.planning.pipes import refuse_pipes
from dist_esm.planning.units import Plan
from dist_esm.types import Tally

log = logging.getLogger("dist_esm")


def plan(config: Config, world: World) -> int:
    """Print what a run of this configuration would do. Nothing is written.

    Returns
    -------
    int
        0: a run would start.

    Raises
    ------
    RefusedError
        On every rank, with the reason why it would not. What is known of the run is printed before.
    """
    world.all_or_none(refuse_pipes, config)
    inputs = find_inputs(config, world, is_dry=True)
    world.all_or_none(first_on_host, world, refuse_unwritable, config.output_dir)
    device = find_device(config, world, inputs)
    problems: list[str] = []
    try:
        weights = find_weights(config, world, is_dry=True)
    except RefusedError as refused:
        if config.model.name == AUTO:  # whose size nobody knows
            raise
        problems += refused.problems
        weights = WeightsId("", "cannot be had")
    setup = setup_on(device, weights, config, world)
    before = world.all_or_none(read_output_dir, config, setup.settings, weights)
    the_plan = agree_on_plan(config, inputs.files, before.entries, world, before.deaths)
    world.all_or_none(refuse_linked_folders, config.output_dir, [file.output for file in inputs.files])
    work = work_of(the_plan)
    output, room = output_of(work, config), room_in(config.output_dir, before.reclaimed)
    own_problems = problems_of(the_plan, output, room, config, setup, world, loads_model=True)
    told = world.all_gather(own_problems)
    problems += dict.fromkeys(problem for of_rank in told for problem in of_rank)
    mine = look_ahead(the_plan, config, setup, world, is_possible=not problems)
    ranks = world.all_gather(mine, RankPlan, Reading, Tally, Calibration)
    if world.is_main:
        outlook = Outlook(the_plan, inputs, work, output, room, config, weights.words, ranks)
        print(plan_text(outlook), flush=True)
        if not problems and (remark := remark_on_room(output, room)):
            log.warning("%s", remark)
        if not problems:
            print("ok: a run would start", flush=True)
    if problems:
        raise RefusedError(problems)
    return 0


class Before(NamedTuple):
    """What earlier launches left in the output directory."""

    entries: list[Entry]
    deaths: dict[str, Deaths]
    reclaimed: int
    """Bytes that a run removes before it writes."""


def read_output_dir(config: Config, settings: dict[str, Any], weights: WeightsId) -> Before:
    """Read what is done in the output directory, as a run would find it.

    Raises
    ------
    ValueError
        If it holds work that was done under other settings, or that cannot be understood.
    """
    output_dir = config.output_dir
    entries = journal.read(output_dir)
    if not config.resume:
        paths = {output_dir / written.path for entry in entries for written in entry.written}
        return Before([], {}, sum(path.stat().st_size for path in paths if path.is_file()))
    if not weights.fingerprint:  # they are not here yet, and taken to be the ones of before
        settings = {**settings, "weights": (read_settings(output_dir) or {}).get("weights", "")}
    check_settings(output_dir, settings, entries, weights.words)
    deaths, _ = known_deaths(output_dir, num_restarts() > 0)
    return Before(entries, deaths, 0)


def look_ahead(plan: Plan, config: Config, setup: Setup, world: World, is_possible: bool) -> RankPlan:
    """Read this rank's bin, measure its device if a run is possible, and say what it will need.

    Raises
    ------
    RefusedError
        On every rank, if one cannot load the model.
    """
    reading = read_bin(plan, world.rank, config)
    arch = architecture(config.model)
    toks_per_batch = config.toks_per_batch or default_toks_per_batch(setup.device.type, arch.embed_dim)
    in_hand = toks_per_batch
    if setup.device.type == "cpu":  # a forward for each core, of a protein each
        longest = min(plan.lengths.longest, config.truncation_seq_length or plan.lengths.longest)
        in_hand = longest * max(1, num_cores() // world.local_world_size)
    total, free = device_memory(setup.device)

    def calibrate_if_busy() -> Calibration | None:
        has_work = is_possible and reading.tokens > 0
        return calibrate(config, setup, reading.lengths, world) if has_work else None

    return RankPlan(
        host=world.host,
        device=describe(setup.device),
        reading=replace(reading, lengths=[]),
        calibration=world.all_or_none(calibrate_if_busy),
        memory_total=total,
        memory_free=free,
        model_bytes=parameter_bytes(arch, setup.dtype),
        pack_bytes=pack_bytes(arch, setup.dtype, in_hand),
    )
