"""The whole run: every rank plans alike, embeds its bin, and rank 0 reports."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar, cast

import torch

from dist_esm.attempt import attempt
from dist_esm.config import Config, Include, to_dict
from dist_esm.embed import Stop, embed_units
from dist_esm.engine import Engine
from dist_esm.kernels import choose_attention, choose_device, choose_dtype
from dist_esm.plan import Plan, assign, count_slice, cut_files, find_files, make_plan, make_units
from dist_esm.records import Count, Failure, FastaFile, Slice, WorkerStatus
from dist_esm.report import RankSummary, failures_by_file, make_report, summary, versions, write_report
from dist_esm.spool import atomically, join
from dist_esm.weights import RANDOM, fetch, load_model, locate, weights_id
from dist_esm.world import World
from dist_esm.writers import write_output

log = logging.getLogger("dist_esm")
T = TypeVar("T")


def run(config: Config, world: World) -> int:
    """Embed all inputs with all ranks.

    Returns
    -------
    int
        Rank 0: 0 if every file is embedded, 2 if some failed, 1 if the run was aborted. Other ranks: 0.

    Raises
    ------
    RefusedError
        On every rank, if the run cannot start on one of them.
    """
    started = time.monotonic()
    files, device, engine = prepare(config, world)
    plan = agree_on_plan(config, files, world)
    units = [plan.units[index] for index in plan.bins[world.rank]]
    num_files, num_proteins = len({unit.file for unit in units}), sum(unit.count.sequences for unit in units)
    log.info("bin: %d units of %d files, %d proteins", len(units), num_files, num_proteins)
    stop = Stop()
    world.set_status(WorkerStatus.PROCESSING)
    with interrupts(stop, engine), world.watching(stop.set):
        result = embed_units(units, plan.files, config, engine, world.rank, stop, provenance(config, engine))
    engine.close()
    if stop.reason is not None and not stop.at_once:
        world.request_stop(stop.reason)
    status = WorkerStatus.COMPLETED if stop.reason is None else WorkerStatus.FAILED
    world.set_status(status)
    mine = RankSummary(world.rank, world.host, describe(device), status.name, result.seconds, result.num_tokens, result.num_split_packs, result.outcomes)
    if stop.at_once:
        ranks, joined = world.collect_in_haste(mine), {}
    else:
        world.wait_until_complete()
        ranks = world.all_gather(mine)
        joined = join_cut_files(config, plan, ranks, world)
    if not world.is_main:
        return 0
    return conclude(config, plan, ranks, joined, stop.reason or world.stop_reason(), time.monotonic() - started)


def prepare(config: Config, world: World) -> tuple[list[FastaFile], torch.device, Engine]:
    """Find the inputs, make ready the output directory, the device and the model: all ranks can, or all refuse."""
    files = together(world, lambda: find_files(config.input_list()))
    together(world, lambda: make_output_dir(config.output_dir))
    device = together(world, lambda: choose_device(config.device, world.local_rank, world.local_world_size, world.host))
    dtype = choose_dtype(config.dtype, device)
    name, attention = together(world, lambda: choose_attention(config.attention, device, dtype))
    together(world, lambda: fetch(config.model) if world.local_rank == 0 else None)
    world.start_process_group(device)
    began = time.monotonic()
    model = together(world, lambda: load_model(config.model, device, dtype, attention))
    num_threads = max(1, len(os.sched_getaffinity(0)) // world.local_world_size)
    engine = Engine(model, config.resolved_layers(), Include.per_tok in config.include, config.toks_per_batch, num_threads)
    log.info(
        "%s on %s in %s, loaded in %.1f s; attention %s, packs of %d tokens",
        config.model.name,
        describe(device),
        str(dtype).removeprefix("torch."),
        time.monotonic() - began,
        name,
        engine.toks_per_batch,
    )
    if world.is_main and config.model.weights == RANDOM:
        log.warning("WEIGHTS ARE RANDOM (seed %d): the embeddings will mean nothing", config.model.seed)
    return files, device, engine


def together(world: World, work: Callable[[], T]) -> T:
    """Do a step of the preparation on every rank; if it fails on one, all ranks refuse with its reason."""
    value: T | None = None
    problem = None
    try:
        value = work()
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        problem = " ".join(str(error).split())
    world.agree(problem)
    return cast(T, value)


def make_output_dir(output_dir: Path) -> None:
    """Create the output directory and try to write to it.

    Raises
    ------
    ValueError
        If it cannot be written to.
    """
    scratch = output_dir / ".dist_esm"
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        with atomically(scratch / f"writable.{os.getpid()}") as beside:
            beside.write_text("")
        (scratch / f"writable.{os.getpid()}").unlink()
    except OSError as error:
        raise ValueError(f"output_dir={output_dir} cannot be written to ({error.strerror}): name a directory that can") from None


def agree_on_plan(config: Config, files: list[FastaFile], world: World) -> Plan:
    """The same plan on every rank: the bytes are shared out for counting, the counts exchanged, the digests compared.

    Raises
    ------
    RefusedError
        If ranks see different inputs.
    """
    slices = cut_files(files, config.unit_share)
    sizes = [(piece.stop or files[number].num_bytes) - piece.start for number, piece, _ in slices]
    keys = [(str(files[number].path), index) for index, (number, _, _) in enumerate(slices)]
    is_cut = {number for number, piece, _ in slices if piece.stop is not None}
    counted = []
    for index in sorted(assign(sizes, keys, world.world_size)[world.rank]):
        number, piece, problem = slices[index]
        found, unreadable = (
            ([(piece, Count())], problem) if problem else count_slice(piece, config.truncation_seq_length, config.max_proteins_per_output, number in is_cut)
        )
        counted += [(index, one.start, one.stop, one.seek, (n.sequences, n.residues, n.squares, n.lines), unreadable) for one, n in found]
    everything = sorted((entry for text in world.exchange(json.dumps(counted)) for entry in json.loads(text)), key=lambda entry: entry[:2])
    merged = []
    for index, start, stop, seek, numbers, unreadable in everything:
        number, piece, _ = slices[index]
        merged.append((number, Slice(piece.path, start, stop, (seek[0], seek[1]), piece.is_gzip), Count(*numbers), unreadable))
    units = make_units(merged, config.max_proteins_per_output)
    plan = make_plan(files, units, world.world_size, config.assign_by, config.model.embed_dim)
    seen = world.exchange(f"{plan.digest()} ({len(plan.files)} files, {sum(file.num_bytes for file in plan.files)} bytes)")
    odd = [f"rank {rank} sees {text}" for rank, text in enumerate(seen) if text != seen[0]]
    world.agree(f"the ranks see different inputs: rank 0 sees {seen[0]}, {', '.join(odd)}: give all ranks the same files" if odd else None)
    return plan


def join_cut_files(config: Config, plan: Plan, ranks: list[RankSummary], world: World) -> dict[int, str | Failure]:
    """Join the pieces of every file that was cut, is whole again and is small enough for one output; the ranks share the files."""
    outcomes = [outcome for rank in ranks for outcome in rank.outcomes]
    failed = failures_by_file(outcomes)
    pieces: dict[int, dict[int, str]] = {}
    for outcome in outcomes:
        unit = plan.unit(outcome.file, outcome.ordinal)
        if outcome.file not in failed and not unit.is_whole and unit.first_part is None:
            pieces.setdefault(outcome.file, {})[outcome.ordinal] = outcome.pieces[0]  # type: ignore[union-attr]
    whole = sorted(file for file, found in pieces.items() if len(found) == len(plan.units_of(file)))
    joined: dict[int, str | Failure] = {}
    for file in whole[world.rank :: world.world_size]:
        paths = [config.output_dir / pieces[file][ordinal] for ordinal in sorted(pieces[file])]
        output = attempt(lambda file=file, paths=paths: join_file(config, plan.files[file], paths))  # type: ignore[misc]
        joined[file] = Failure.of(plan.files[file].path, output, world.rank) if isinstance(output, Exception) else output
    return {file: end for ends in world.all_gather(joined) for file, end in ends.items()}


def join_file(config: Config, file: FastaFile, paths: list[Path]) -> str:
    """Make one output of its pieces, and return its path relative to `output_dir`."""
    with join(paths, config.output_dir / ".dist_esm") as embeddings:
        output = write_output(config.format, embeddings, config.output_dir / file.output)
    return str(output.relative_to(config.output_dir))


def conclude(config: Config, plan: Plan, ranks: list[RankSummary], joined: dict[int, str | Failure], reason: str | None, seconds: float) -> int:
    """Write the report, print the summary, and return the exit code."""
    report = make_report(plan, ranks, joined, reason, seconds)
    report.config = to_dict(config)
    report.model = {"name": config.model.name, "weights": config.model.weights or str(locate(config.model)), "layers": config.resolved_layers()}
    report.versions = versions()
    shutil.rmtree(config.output_dir / ".dist_esm" / "pieces", ignore_errors=True)
    with atomically(config.output_dir / ".dist_esm" / "config.json") as beside:
        beside.write_text(json.dumps(report.config, indent=1) + "\n", encoding="utf-8")
    write_report(report, config.output_dir)
    print(summary(report, config.output_dir), flush=True)
    return report.exit_code


@contextmanager
def interrupts(stop: Stop, engine: Engine) -> Iterator[None]:
    """While the block runs, SIGINT and SIGTERM stop the work at once and keep what is written; a second signal ends the process."""

    def on_signal(number: int, _frame: object) -> None:
        stop.set(f"interrupted by {signal.Signals(number).name}", at_once=True)
        engine.close()
        for one in previous:
            signal.signal(one, signal.SIG_DFL)

    previous = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        if not stop.at_once:
            for number, handler in previous.items():
                signal.signal(number, handler)


def provenance(config: Config, engine: Engine) -> dict[str, Any]:
    """What the numbers in an output depend on, for people and for readers of it."""
    return {
        "model": config.model.name,
        "weights": weights_id(config.model),
        "layers": config.resolved_layers(),
        "dtype": str(engine.model.dtype).removeprefix("torch."),
        "save_dtype": config.save_dtype.name,
        "truncation_seq_length": config.truncation_seq_length,
        "long": config.long.name,
        "dist_esm": version("dist_esm"),
    }


def describe(device: torch.device) -> str:
    """A device in words."""
    return f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "cpu"
