"""Hydra in, typed config out, exit code back.

The words of the command line are read and checked first (`cli`), so that a mistake costs no time. Then this
process starts the ranks (`ranks`), or is one of them: it joins the others (`distributed`) and runs the job.
Mistakes are said once, by rank 0. Hydra's application wrapper is not used: every rank would print its errors
and its help, and leave a folder and a log behind.
"""

from __future__ import annotations

import gc
import io
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial

from dist_esm.commandline.arguments import read_options
from dist_esm.commandline.cli import compose_config, config_text, help_text
from dist_esm.config import Config, DeviceKind, Job, Verbosity, check
from dist_esm.launcher import is_main_rank, launch_environment, num_cores, tell_torchrun
from dist_esm.logs import setup_logging
from dist_esm.names import one_line, printable
from dist_esm.pipeline.writer_processes import WriterProcesses, are_wanted, num_writers
from dist_esm.stop import on_signals
from dist_esm.version import code_version


def run_command(words: Sequence[str]) -> int:
    """Read the command line and do what it says; returns the exit code."""
    config: Config | None = None
    problem: str | None = None
    text: str | None = None
    is_launched = launch_environment() is not None
    try:
        options = read_options(words)
        if options.help:
            text = help_text()
        elif options.version:
            text = f"dist_esm {code_version()}\n"
        else:
            config = compose_config(options.overrides, options.config_dir, options.config_name)
            if options.cfg:
                text = config_text(config)
            check(config)
            num_ranks = wanted_ranks(config) if text is None else 1
    except ValueError as error:
        problem = one_line(error)
    if problem is None and text is not None:
        if is_main_rank():
            print(text, end="")
        return 0
    if is_launched:
        return run_job(config, problem)
    if problem is not None:
        print_error(problem)
        return 1
    assert config is not None
    if num_ranks > 1 or config.max_restarts > 0:
        from dist_esm.commandline.ranks import run_ranks  # it needs torch

        return run_ranks(num_ranks, words, config.max_restarts)
    return run_job(config, None)


def wanted_ranks(config: Config) -> int:
    """Return the number of ranks that this host is to have: one for each visible GPU, or as `ranks` says.

    Raises
    ------
    ValueError
        If `ranks` is not what a launcher started, or more than the visible GPUs.
    """
    wanted = config.ranks if isinstance(config.ranks, int) else None
    launched = launch_environment()
    if launched is not None:
        started = int(os.environ.get("LOCAL_WORLD_SIZE") or launched[1])
        if "LOCAL_WORLD_SIZE" in os.environ and wanted not in (None, started):
            raise ValueError(
                f"ranks={wanted}, but this host's launcher started {started}: leave ranks out, "
                f"or start the command without torchrun"
            )
        return started
    if config.job is Job.report:  # rank 0's alone
        return 1
    if wanted == 1 or config.device is DeviceKind.cpu:
        return wanted or 1
    import torch  # takes seconds

    num_gpus = torch.cuda.device_count()
    if wanted is not None and 0 < num_gpus < wanted:
        raise ValueError(
            f"ranks={wanted} is more than the {num_gpus} visible GPU(s): "
            f"write ranks={num_gpus}, or ranks=auto for all of them"
        )
    return wanted or max(1, num_gpus)


def print_error(line: str) -> None:
    """Say in one line why the command ends."""
    print(f"dist_esm: error: {printable(line)}", file=sys.stderr, flush=True)


def give_up(reason: str) -> None:
    """Leave whatever is under way."""
    raise KeyboardInterrupt(reason)


def run_job(config: Config | None, problem: str | None) -> int:
    """Join the other ranks and run, or refuse with all problems of all ranks, said once.

    Processes that write outputs start first, since they import as much as this one does.

    Parameters
    ----------
    config, problem
        Checked configuration, or what is wrong with the command line.
    """
    with WriterProcesses() as processes:
        if problem is None and config is not None and config.job is Job.embed and are_wanted(config):
            ranks_here = max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or 1))
            processes.start(num_writers(num_cores() // ranks_here), config.format)
        return run_beside(processes, config, problem)


def run_beside(processes: WriterProcesses, config: Config | None, problem: str | None) -> int:
    """Do what `run_job` says, now that these processes start."""
    gc.disable()  # imports make a million objects and no garbage
    from dist_esm.distributed import LostRankError, RefusedError, World
    from dist_esm.jobs.embed import run
    from dist_esm.jobs.plan.job import plan
    from dist_esm.jobs.report.job import rebuild
    from dist_esm.jobs.selfcheck.job import selfcheck
    from dist_esm.jobs.verify import verify

    gc.enable()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may be any bytes
    heartbeat_timeout = Config().heartbeat_timeout if config is None else config.heartbeat_timeout
    with on_signals(give_up), World.connect(heartbeat_timeout) as world:
        setup_logging(world.rank, Verbosity.normal if config is None else config.verbosity)
        try:
            world.agree(problem)
            assert config is not None
            jobs: dict[Job, Callable[[Config, World], int]] = {
                Job.embed: partial(run, processes=processes),
                Job.plan: plan,
                Job.selfcheck: selfcheck,
                Job.verify: verify,
                Job.report: rebuild,
            }
            return jobs[config.job](config, world)
        except LostRankError as lost:
            print_error(f"{lost}: start it again, it goes on from what is done")
            return 1
        except RefusedError as refused:
            if world.is_main:
                for line in refused.problems:
                    print_error(line)
            if world.local_rank != 0:
                return 0  # torchrun has seven lines for each rank that fails
            tell_torchrun(printable("; ".join(refused.problems)))
            world.leave_after_neighbours()
            return 1
