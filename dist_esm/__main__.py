"""Hydra in, typed config out, exit code back.

Each rank reads the command line for itself (`cli`), joins the others (`distributed`) and runs the job.
Mistakes are said once, by rank 0. Hydra's application wrapper is not used: every rank would print its errors
and its help, and leave a folder and a log behind.
"""

from __future__ import annotations

import gc
import io
import os
import sys
import threading
from collections.abc import Sequence
from typing import NoReturn

from dist_esm.arguments import read_options
from dist_esm.cli import compose_config, config_text, help_text
from dist_esm.config import Config, Job, Verbosity, check
from dist_esm.logs import setup_logging
from dist_esm.names import one_line, printable
from dist_esm.stop import on_signals
from dist_esm.version import code_version

PARTIAL = 2
"""Exit code of a run in which some files failed, and all others are done."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    config: Config | None = None
    problem: str | None = None
    text: str | None = None
    try:
        options = read_options(sys.argv[1:] if argv is None else argv)
        if options.help:
            text = help_text()
        elif options.version:
            text = f"dist_esm {code_version()}\n"
        else:
            config = compose_config(options.overrides, options.config_dir, options.config_name)
            if options.cfg:
                text = config_text(config)
            check(config)
    except ValueError as error:
        problem = one_line(error)
    if problem is None and text is not None:
        if is_main_rank():
            print(text, end="")
        return 0
    try:
        with on_signals(give_up):
            return start(config, problem)
    except KeyboardInterrupt as interrupt:
        if is_main_rank():
            print(
                f"dist_esm: {interrupt}: what is done is kept, "
                "run the same command again to go on from there",
                file=sys.stderr,
                flush=True,
            )
        return 1


def is_main_rank() -> bool:
    """Tell whether this process speaks for the run, as torchrun's environment has it."""
    return os.environ.get("RANK", "0") == "0"


def give_up(reason: str) -> None:
    """Leave whatever is under way."""
    raise KeyboardInterrupt(reason)


def start(config: Config | None, problem: str | None) -> int:
    """Join the other ranks and run, or refuse with all problems of all ranks, said once."""
    gc.disable()  # imports make a million objects and no garbage
    from dist_esm.distributed import LostRankError, RefusedError, World
    from dist_esm.jobs.embed import run
    from dist_esm.jobs.report.job import rebuild
    from dist_esm.jobs.selfcheck.job import selfcheck
    from dist_esm.jobs.verify import verify

    gc.enable()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may be any bytes
    heartbeat_timeout = Config().heartbeat_timeout if config is None else config.heartbeat_timeout
    with World.connect(heartbeat_timeout) as world:
        setup_logging(world.rank, Verbosity.normal if config is None else config.verbosity)
        try:
            world.agree(problem)
            assert config is not None
            jobs = {Job.embed: run, Job.selfcheck: selfcheck, Job.verify: verify, Job.report: rebuild}
            code = jobs[config.job](config, world)
            return 0 if code == PARTIAL and may_be_restarted() else code
        except LostRankError as lost:
            print(
                f"dist_esm: error: {one_line(lost)}: start it again, it goes on from what is done",
                file=sys.stderr,
            )
            return 1
        except RefusedError as refused:
            if world.is_main:
                for line in refused.problems:
                    print(f"dist_esm: error: {printable(line)}", file=sys.stderr, flush=True)
            return 1


def may_be_restarted() -> bool:
    """Tell whether torchrun would start all ranks again if this one failed.

    Only a crash is worth that: files that failed would fail again. report.json says `partial` all the same.
    """
    restarts = [os.environ.get(f"TORCHELASTIC_{name}") or "0" for name in ("RESTART_COUNT", "MAX_RESTARTS")]
    return int(restarts[0]) < int(restarts[1])


def leave(code: int) -> NoReturn:
    """End the process.

    A segment that was abandoned on a CPU may take a minute more, and Python would wait for its thread.
    """
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
