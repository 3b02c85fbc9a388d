"""One process for each rank of this host, started by the command itself through torch's elastic agent.

The agent is what torchrun is made of: it gives the ranks their environment, holds their store, watches them,
and ends the others when one fails. Around it stands what torchrun leaves to its user: signals, and an exit
code that says how the run ended. Each rank has a session of its own, so that a key which is pressed in the
terminal reaches this process alone.
"""

from __future__ import annotations

import logging
import os
import re
import signal
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.distributed.elastic.agent.server.api import WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs, SignalException
from torch.distributed.elastic.rendezvous import RendezvousParameters, registry

from dist_esm.launcher import LAUNCHER_PID, NUM_RESTARTS, PARTIAL
from dist_esm.stop import DOUBLE_SECONDS, GO_ON, INTERRUPTED, exit_now

ENDED_BY_US = (-signal.SIGTERM, -signal.SIGINT)
ORDERLY = (0, 1, PARTIAL, INTERRUPTED, *ENDED_BY_US)
"""Exit codes of ranks that did not crash."""


def run_ranks(num_ranks: int, words: Sequence[str], max_restarts: int) -> int:
    """Run the command with several ranks, and start all of them again if one crashes.

    Parameters
    ----------
    num_ranks
        Of this host.
    words
        The command line, which each rank reads for itself.
    max_restarts
        How often all ranks are started again.

    Returns
    -------
    int
        The exit code of the run: as rank 0 ended, 1 if a rank crashed, 130 after Ctrl-C.
    """
    logging.disable(logging.ERROR)  # of the agent: the ranks say what is wrong
    crashed: Mapping[int, int] = {}
    for restart in range(max_restarts + 1):
        if crashed:
            say(f"{endings(crashed)}: all ranks are started again, {restart} of at most {max_restarts} times")
        agent = make_agent(num_ranks, words, restart)
        try:
            with signals_for(agent):
                codes = {rank: failure.exitcode for rank, failure in agent.run().failures.items()}
        except SignalException as interrupt:
            return INTERRUPTED if interrupt.sigval is signal.SIGINT else 1
        finally:
            agent.get_worker_group().spec.rdzv_handler.shutdown()
        crashed = {rank: code for rank, code in codes.items() if code not in ORDERLY}
        if not crashed:
            return exit_code_of(codes)
    say(f"{endings(crashed)}: {GO_ON}")
    return 1


def make_agent(num_ranks: int, words: Sequence[str], restart: int) -> LocalElasticAgent:
    """Make torch's agent for the ranks of this host, as `torchrun --standalone` does."""
    os.environ[LAUNCHER_PID] = str(os.getpid())
    os.environ[NUM_RESTARTS] = str(restart)
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGQUIT"  # the others are `signals_for`'s
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # as torchrun does: the ranks share the cores
    meeting = RendezvousParameters(
        backend="c10d",
        endpoint="localhost:0",
        run_id=uuid.uuid4().hex,
        min_nodes=1,
        max_nodes=1,
        local_addr="localhost",
    )
    spec = WorkerSpec(
        role="dist_esm",
        local_world_size=num_ranks,
        rdzv_handler=registry.get_rendezvous_handler(meeting),
        entrypoint=sys.executable,
        args=(*module_options(), *map(with_our_pipes, words)),
        max_restarts=0,
        local_addr="localhost",
    )
    # It kills ranks that do not end within 30 s of SIGTERM: torch 2.13 takes other seconds, 2.11 does not.
    return LocalElasticAgent(spec, DefaultLogsSpecs(os.devnull))


def module_options() -> tuple[str, ...]:
    """Return the options with which Python runs this very package, not one in the working directory."""
    is_here = Path(__file__).resolve().parents[1] == Path.cwd()
    return ("-m", "dist_esm") if is_here else ("-P", "-m", "dist_esm")


def with_our_pipes(word: str) -> str:
    """Name pipes of this process, as bash makes them for `input=<(...)`, so that ranks find them (Linux)."""
    return re.sub(r"(?<![\w/])/dev/fd/([1-9]\d*)\b", rf"/proc/{os.getpid()}/fd/\1", word)


@contextmanager
def signals_for(agent: LocalElasticAgent) -> Iterator[None]:
    """While the block runs, a signal ends the ranks in order, and Ctrl-C once more kills them.

    What is ignored already, as SIGHUP under nohup, stays ignored.
    """
    first: list[float] = []

    def on_signal(number: int, _frame: object) -> None:
        is_ctrl_c = number == signal.SIGINT
        if not first:
            first.append(time.monotonic())
            again = "; Ctrl-C again ends it at once" if is_ctrl_c else ""
            say(f"interrupted by {signal.Signals(number).name}: {GO_ON}{again}")
            sigval = signal.SIGINT if is_ctrl_c else signal.SIGTERM
            raise SignalException("ends the ranks, see LocalElasticAgent.run", sigval)
        if is_ctrl_c and time.monotonic() - first[0] > DOUBLE_SECONDS:
            kill(agent)
            exit_now()

    taken = [
        number
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if signal.getsignal(number) is not signal.SIG_IGN
    ]
    previous = {number: signal.signal(number, on_signal) for number in taken}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def kill(agent: LocalElasticAgent) -> None:
    """End all ranks, and what they have started, at once."""
    for worker in agent.get_worker_group().workers:
        if isinstance(worker.id, int):  # of one that was started
            with suppress(ProcessLookupError):
                os.killpg(worker.id, signal.SIGKILL)


def exit_code_of(codes: Mapping[int, int]) -> int:
    """Return the exit code of a run whose ranks did not crash, given the codes that are not 0."""
    own = [code for code in codes.values() if code not in ENDED_BY_US]
    return max(own, default=1 if codes else 0)


def endings(codes: Mapping[int, int]) -> str:
    """Say how ranks crashed."""
    return ", ".join(
        f"rank {rank} was killed by {signal.Signals(-code).name}"
        if code < 0
        else f"rank {rank} ended with exit code {code}"
        for rank, code in sorted(codes.items())
    )


def say(line: str) -> None:
    """Print a line to stderr."""
    print(f"dist_esm: {line}", file=sys.stderr, flush=True)
