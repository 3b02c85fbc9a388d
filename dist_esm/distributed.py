"""The one door to torch.distributed: who this rank is, what all ranks know of each other, and the process
group.

A world of one needs neither a process group nor a store, and callers do not ask. Ranks talk through
torchrun's store (problems at the start, status, signs of life, a request to stop) and through the process
group (the counts of the inputs, the results at the end: NCCL on GPUs, gloo on CPUs). No rank waits inside a
collective for another's work: they meet in the store first, where waiting has no time limit, ranks that are
missing are named every minute, and a rank that is lost ends the wait.

Whoever reaches the store's port can write to it, so nothing in it is trusted: values are text or `wire`
messages, never pickles.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, ParamSpec, Protocol, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed import (  # type: ignore[attr-defined]
    DistError,
    DistNetworkError,
    DistStoreError,
    PrefixStore,
    Store,
)
from torch.distributed.rendezvous import rendezvous

from dist_esm.attempt import ending_of
from dist_esm.launcher import launch_environment, refuse
from dist_esm.liveness import SignsOfLife
from dist_esm.names import one_line
from dist_esm.progress import Progress, RankProgress
from dist_esm.stop import ended_by_signals
from dist_esm.store import (
    POLL_SECONDS,
    get_bytes,
    own_part,
    put_bytes,
    wait_at_most,
    wait_for,
)
from dist_esm.types import WorkerStatus
from dist_esm.wire import WireError, decode, encode

log = logging.getLogger("dist_esm")
P = ParamSpec("P")
T = TypeVar("T")

CONNECT_SECONDS = 20.0
"""torchrun's store is there before its ranks are: one that does not answer for so long is gone."""
MEET_SECONDS = 300.0
"""Ranks that were started without torchrun may come so much later than the first."""
STORE_TIMEOUT = timedelta(minutes=30)
"""torch's own, for what waits in the store once a rank has joined."""
HEARTBEAT_TIMEOUT = 60.0
HASTE_SECONDS = 3.0
NEWS_SECONDS = 1.0
"""Two looks of the watching thread."""
LEAVE_SECONDS = 5.0
CONCLUDE_SECONDS = 15.0
"""A rank that was interrupted stays so long for rank 0's report: torchrun ends the others when the first rank
fails."""
ENDED = (WorkerStatus.COMPLETED, WorkerStatus.FAILED)
LOCAL_ADDR = "give each torchrun a --local-addr by which the other hosts reach its own"
LOST = "the launcher's store is gone: the launcher was killed"


class OnStop(Protocol):
    """Called by `World.watching` with the reason, and whether to drop what is in flight."""

    def __call__(self, reason: str, at_once: bool = False) -> None:
        """Be told."""


class RefusedError(Exception):
    """The run cannot start; `problems` are the distinct reasons, each one line."""

    def __init__(self, problems: Sequence[str]) -> None:
        super().__init__("; ".join(problems))
        self.problems = list(problems)


class LostRankError(RuntimeError):
    """A rank that was waited for is gone; the message names it."""


def wait_for_listener(address: str, port: int) -> None:
    """Wait until somebody listens at a port.

    Raises
    ------
    DistNetworkError
        If nobody does for `CONNECT_SECONDS`.
    """
    deadline = time.monotonic() + CONNECT_SECONDS
    while True:
        try:
            socket.create_connection((address, port), max(1.0, deadline - time.monotonic())).close()
            return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise DistNetworkError(str(error)) from error
            time.sleep(POLL_SECONDS)


class World:
    """This rank among all ranks."""

    def __init__(
        self, store: Store | None, rank: int, world_size: int, local_rank: int, local_world_size: int
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.local_rank = local_rank
        self.local_world_size = local_world_size
        self.host = socket.gethostname()
        self.device = torch.device("cpu")
        """This rank's device, once the process group has started."""
        self.progress = Progress(RankProgress(rank, self.host))
        """How far this rank is; goes out with its signs of life."""
        self._store = store
        self._signs: SignsOfLife | None = None
        self._lost: str | None = None
        self._on_stop: list[OnStop] = []
        self._claims: Counter[int] = Counter()
        self.lost_ranks: dict[int, str] = {}
        """Ranks that this one saw end before their work was done, and how."""
        self._meetings = 0
        self._is_in_haste = False
        self._status = WorkerStatus.IDLE

    @classmethod
    def alone(cls) -> World:
        """Return a world of one, whatever started this process."""
        return cls(None, 0, 1, 0, 1)

    @classmethod
    @contextmanager
    def connect(cls, heartbeat_timeout: float = HEARTBEAT_TIMEOUT) -> Iterator[World]:
        """Join the ranks that torchrun started, or be a world of one. CUDA is not touched.

        Parameters
        ----------
        heartbeat_timeout
            Seconds without a sign of life after which a rank counts as lost.

        Raises
        ------
        SystemExit
            With one line, if the environment is no launcher's, or torchrun's store does not answer within
            `CONNECT_SECONDS` or is lost later on.
        """
        launched = launch_environment()
        if launched is None:
            yield cls.alone()
            return
        rank, world_size = launched
        is_there = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
        # Without torchrun, rank 0 opens the store when it comes.
        timeout = timedelta(seconds=CONNECT_SECONDS if is_there else MEET_SECONDS)
        where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        try:
            socket.getaddrinfo(os.environ["MASTER_ADDR"].strip(), None)
            if is_there:  # torch itself would look for three times as long as it is told
                wait_for_listener(os.environ["MASTER_ADDR"].strip(), int(os.environ["MASTER_PORT"]))
            with ended_by_signals():
                store, rank, world_size = next(iter(rendezvous("env://", timeout=timeout)))
        except socket.gaierror as error:
            refuse(f"MASTER_ADDR={os.environ['MASTER_ADDR']} names no host ({error.strerror}): {LOCAL_ADDR}")
        except DistError as error:
            if is_there:
                refuse(f"torchrun's store at {where} does not answer: was torchrun killed? Start it again")
            reason = " ".join(str(error).split())
            refuse(f"the ranks did not meet at MASTER_ADDR:MASTER_PORT, {where} ({reason}): use torchrun")
        store.set_timeout(STORE_TIMEOUT)
        store = own_part(store, rank, world_size)
        local_rank = int(os.environ.get("LOCAL_RANK") or rank)
        local_world_size = int(os.environ.get("LOCAL_WORLD_SIZE") or world_size)
        world = cls(store, rank, world_size, local_rank, local_world_size)
        world.set_status(WorkerStatus.IDLE)
        try:
            with world._watch(heartbeat_timeout):
                if not os.environ.get("LOCAL_RANK"):
                    world._count_ranks_of_host()
                yield world
                world._leave()
        except (DistNetworkError, DistStoreError):
            refuse(f"{LOST}; start it again, it goes on from what is done")
        finally:
            if dist.is_initialized():
                dist.destroy_process_group()

    def _count_ranks_of_host(self) -> None:
        """Find this rank's place on its host, where the launcher does not say it."""
        ranks = [rank for rank, host in enumerate(self.exchange(self.host)) if host == self.host]
        self.local_rank, self.local_world_size = ranks.index(self.rank), len(ranks)

    @property
    def is_main(self) -> bool:
        """This rank speaks for the run."""
        return self.rank == 0

    def start_process_group(self, device: torch.device, timeout: timedelta | None = None) -> None:
        """Start the process group: NCCL on a GPU, gloo on a CPU.

        Parameters
        ----------
        device
            This rank's.
        timeout
            Of its collectives; None: the backend's own.

        Raises
        ------
        RefusedError
            On the ranks where it cannot be started, with the network variables to look at.
        """
        self.device = device
        if self._store is None:
            return
        assert self._signs is not None
        self._signs.device = str(device)
        problem = None
        try:
            with ended_by_signals():
                dist.init_process_group(
                    "nccl" if device.type == "cuda" else "gloo",
                    store=PrefixStore("process_group", self._store),
                    rank=self.rank,
                    world_size=self.world_size,
                    device_id=device if device.type == "cuda" else None,
                    timeout=timeout,
                )
        except (RuntimeError, ValueError) as error:
            variable = "NCCL_SOCKET_IFNAME" if device.type == "cuda" else "GLOO_SOCKET_IFNAME"
            named = (
                f"{variable}={os.environ[variable]} names"
                if variable in os.environ
                else f"{variable} may name"
            )
            reason = " ".join(str(error).split())
            problem = f"the process group cannot be started ({reason}): {named} the network interface to use"
        self.agree(problem)

    def exchange(self, value: str) -> list[str]:
        """Give every rank the values of all ranks, in order of rank, through the store.

        All ranks call it, the same number of times. It is for small facts: rank 0 passes all of them on to
        each rank.

        Raises
        ------
        LostRankError
            If a rank is lost meanwhile.
        """
        if self._store is None:
            return [value]
        store = self._store
        self._meetings += 1
        name = f"meeting/{self._meetings}"
        put_bytes(store, f"{name}/{self.rank}", value.encode("utf-8", "surrogateescape"))
        if self.is_main:
            keys = [f"{name}/{rank}" for rank in range(self.world_size)]
            self._wait_for(
                lambda: store.check(keys),
                lambda: [rank for rank, key in enumerate(keys) if not store.check([key])],
            )
            put_bytes(
                store,
                name,
                json.dumps(
                    [get_bytes(store, key).decode("utf-8", "surrogateescape") for key in keys]
                ).encode(),
            )
        self._wait_for(lambda: store.check([name]), lambda: [0])
        return list(json.loads(get_bytes(store, name)))

    def exchange_by_name(self, value: str) -> list[tuple[str, str]]:
        """Give every rank the names and values of all ranks, as `exchange` does; a name is ``rank 0 (HOST)``.

        Raises
        ------
        LostRankError
            If a rank is lost meanwhile.
        """
        answers = (json.loads(text) for text in self.exchange(json.dumps([self.host, value])))
        return [(f"rank {rank} ({host})", value) for rank, (host, value) in enumerate(answers)]

    def agree(self, problem: str | None) -> None:
        """Go on only if no rank has a problem.

        Raises
        ------
        RefusedError
            On every rank, with the distinct problems of all of them. Where ranks are on several hosts, one
            that not all have comes with the name of the first rank that has it.
        """
        answers = [json.loads(text) for text in self.exchange(json.dumps([self.host, problem]))]
        first_with: dict[str, str] = {}
        for rank, (host, text) in enumerate(answers):
            if text is not None:
                first_with.setdefault(text, f"rank {rank} ({host}): ")
        is_everywhere = len(first_with) == 1 and all(text is not None for _, text in answers)
        if is_everywhere or len({host for host, _ in answers}) == 1:
            first_with = dict.fromkeys(first_with, "")
        if first_with:
            raise RefusedError([name + text for text, name in first_with.items()])

    def all_or_none(self, work: Callable[P, T], *args: P.args, **options: P.kwargs) -> T:
        """Do a step of the preparation on every rank: all ranks succeed, or all refuse.

        Raises
        ------
        RefusedError
            On every rank, with the distinct reasons, if the step raises `ValueError`, `OSError` or out of
            memory on any.
        """
        value: T | None = None
        problem = None
        try:
            value = work(*args, **options)
        except (ValueError, OSError, torch.OutOfMemoryError) as error:
            problem = one_line(error)
        self.agree(problem)
        return cast(T, value)

    def all_gather(self, value: Any, *types: type[Any]) -> list[Any]:
        """Give every rank the values of all ranks through the process group, of any size.

        Ranks meet in the store before they enter the collective, so none waits in it for another's work.

        Parameters
        ----------
        value
            Anything that `wire.encode` takes.
        types
            Dataclasses that may be in it.

        Returns
        -------
        list
            The values in order of rank; tuples come back as lists (see `wire.decode`).
        """
        self.exchange("")
        message = encode(value)
        if self._store is None:
            return [decode(message, *types)]
        size = torch.tensor([len(message)], device=self.device)
        sizes = [torch.empty_like(size) for _ in range(self.world_size)]
        with ended_by_signals():
            dist.all_gather(sizes, size)
            most = max(int(other) for other in sizes)
            mine = torch.frombuffer(bytearray(message.ljust(most)), dtype=torch.uint8).to(self.device)
            everyone = [torch.empty_like(mine) for _ in range(self.world_size)]
            dist.all_gather(everyone, mine)
        log.debug("gathered %d bytes over %s", int(sum(sizes)), dist.get_backend())
        return [decode(other.cpu().numpy().tobytes(), *types) for other in everyone]

    def set_status(self, status: WorkerStatus) -> None:
        """Publish what this rank is doing."""
        was_ended, self._status = self._status in ENDED, status
        if self._store is not None:
            self._store.set(f"status/{self.rank}", status.name)
            if status in ENDED and not was_ended:
                self._store.add("ended", 1)

    def set_in_hand(self, file: str) -> None:
        """Publish, with the next sign of life, the file that this rank works on."""
        self.progress.now.file = file
        if self._signs is not None:
            self._signs.in_hand = file

    def get_progress(self) -> list[RankProgress | None]:
        """On rank 0, how far every rank is by its last sign of life, in order of rank; None if nothing came
        yet. The store is not asked for it."""
        everyone: list[RankProgress | None] = [self.progress.now]
        for rank in range(1, self.world_size):
            message = self._signs.progress_of(rank) if self._signs is not None else ""
            try:
                told = decode(message.encode(), RankProgress) if message else None
            except WireError:
                told = None
            everyone.append(told if isinstance(told, RankProgress) else None)
        return everyone

    def get_worker_status(self) -> dict[int, WorkerStatus]:
        """Status of every rank, by rank."""
        if self._store is None:
            return {0: self._status}
        statuses = {}
        for rank in range(self.world_size):
            key = f"status/{rank}"
            is_there = self._store.check([key])
            statuses[rank] = WorkerStatus[self._store.get(key).decode()] if is_there else WorkerStatus.IDLE
        return statuses

    def is_complete(self) -> bool:
        """Tell whether every rank has come to its end, in success or failure.

        It is one question to the store, whatever the number of ranks.
        """
        if self._store is None:
            return self._status in ENDED
        return bool(self._store.add("ended", 0) == self.world_size)

    def wait_until_complete(self, unless: Callable[[], bool] = lambda: False) -> None:
        """Wait for the ranks that still work, or until `unless` is true."""
        if self._store is not None:
            wait_for(lambda: unless() or self.is_complete(), self._working)

    def _working(self) -> list[int]:
        return [
            rank for rank, status in self.get_worker_status().items() if status is WorkerStatus.PROCESSING
        ]

    def claim(self, bin_: int) -> int:
        """Add one to the counter of a bin, and return what it was before; no two ranks see the same.

        It is one round trip to the store.
        """
        if self._store is not None:
            return int(self._store.add(f"claims/{bin_}", 1)) - 1
        self._claims[bin_] += 1
        return self._claims[bin_] - 1

    def count_claims(self) -> list[int]:
        """Return the counters of the bins of all ranks."""
        if self._store is not None:
            return [int(self._store.add(f"claims/{bin_}", 0)) for bin_ in range(self.world_size)]
        return [self._claims[bin_] for bin_ in range(self.world_size)]

    def wait_for_all_at(self, place: str, unless: Callable[[], bool]) -> None:
        """Wait until every rank has come to a place that all of them pass once, or until `unless` is true."""
        if self._store is not None:
            store = self._store
            store.add(f"at/{place}", 1)
            wait_for(lambda: unless() or store.add(f"at/{place}", 0) >= self.world_size, self._working)

    def request_stop(self, reason: str, at_once: bool = False) -> None:
        """Ask every rank to take no further unit or, at once, to drop what is in flight. The first reason
        stays."""
        if self._store is not None:
            with suppress(DistError):  # without a store every rank stops
                self._store.compare_set("stop_at_once" if at_once else "stop", "", reason)

    def stop_reason(self) -> str | None:
        """The reason of a stop that some rank requested, if any; of a stop at once before others."""
        if self._store is not None:
            with suppress(DistError):
                for key in ("stop_at_once", "stop"):
                    if self._store.check([key]):
                        return self._store.get(key).decode()
        return None

    def wait_for_news_of_deaths(self) -> None:
        """Wait a moment for the watching thread to put what it sees into `lost_ranks`, if that is empty."""
        if self._store is not None:
            wait_at_most(NEWS_SECONDS, lambda: bool(self.lost_ranks))

    def gather_in_haste(self, value: Any, *types: type[Any]) -> list[Any]:
        """On rank 0, the values of the ranks that can still answer within `HASTE_SECONDS`; for runs that are
        ending. Those that were seen to end are not waited for.

        Parameters
        ----------
        value, types
            As of `all_gather`.
        """
        self._is_in_haste = True
        if self._store is None:
            return [value]
        store = self._store
        try:
            put_bytes(store, f"haste/{self.rank}", encode(value))
            if not self.is_main:
                return [value]
            others = [rank for rank in range(self.world_size) if rank != self.rank]
            keys = {rank: f"haste/{rank}" for rank in others}

            def have_answered() -> bool:
                waited_for = [key for rank, key in keys.items() if rank not in self.lost_ranks]
                return not waited_for or bool(store.check(waited_for))

            deadline = time.monotonic() + HASTE_SECONDS
            while not have_answered() and time.monotonic() < deadline:
                time.sleep(POLL_SECONDS)
            answers = [value]
            for rank, key in keys.items():
                if store.check([key]):
                    try:
                        answers.append(decode(get_bytes(store, key), *types))
                    except WireError as error:
                        log.warning("rank %d left a message that is none: %s", rank, error)
            return answers
        except DistError:
            log.warning(LOST)
            return [value]

    def leave_after_neighbours(self) -> None:
        """Let the first rank of a host wait until the others have ended, so that it alone is seen to fail."""
        if self._signs is not None and self.local_rank == 0:
            wait_at_most(LEAVE_SECONDS, self._signs.is_last_of_host)

    @contextmanager
    def watching(self, on_stop: OnStop) -> Iterator[None]:
        """While the block runs, call ``on_stop(reason)`` once if a rank requests a stop, or a rank or
        torchrun is lost."""
        self._on_stop.append(on_stop)
        try:
            yield
        finally:
            self._on_stop.remove(on_stop)

    @contextmanager
    def _watch(self, heartbeat_timeout: float) -> Iterator[None]:
        """Give signs of life, look at those of others, and pass requests to stop on, in a thread of its
        own."""
        assert self._store is not None
        store = self._store
        signs = SignsOfLife(
            store,
            self.rank,
            self.world_size,
            self.host,
            heartbeat_timeout,
            lambda rank: bool(store.check([f"left/{rank}"])),
        )
        self._signs = signs
        signs.progress = lambda: encode(self.progress.now).decode()
        done = threading.Event()
        told: set[str] = set()

        def look() -> None:
            signs.beat()
            lost = signs.wait_for_an_end() or signs.silent_rank()
            if lost is not None and not done.is_set():
                rank, how = lost
                self.lost_ranks.setdefault(rank, how)
                self.request_stop(how, at_once=True)
            for key in ("stop_at_once", "stop"):
                if self._on_stop and key not in told and store.check([key]):
                    told.add(key)
                    self._tell(store.get(key).decode(), at_once=key == "stop_at_once")
            if self._lost is None and store.check(["stop_at_once"]):
                self._lost = store.get("stop_at_once").decode()

        def watch() -> None:
            while not done.is_set():
                try:
                    look()
                except DistError:
                    self._lost = self._lost or LOST
                    self._tell(LOST, at_once=True)
                    return

        def live() -> None:
            ending = ending_of(watch)
            if ending is not None:
                self._tell(
                    f"the watching thread of rank {self.rank} ended with {type(ending).__name__}: {ending}",
                    True,
                )

        thread = threading.Thread(target=live, name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()
            signs.close()

    def _tell(self, reason: str, at_once: bool) -> None:
        for on_stop in list(self._on_stop):
            on_stop(reason, at_once=at_once)

    def _wait_for(self, is_there: Callable[[], bool], missing: Callable[[], list[int]]) -> None:
        """`wait_for`, unless a rank is lost.

        Raises
        ------
        LostRankError
            If one is.
        """

        def is_there_or_lost() -> bool:
            if self._lost is not None:
                raise LostRankError(self._lost)
            return is_there()

        wait_for(is_there_or_lost, missing)

    def _leave(self) -> None:
        """Say that this rank is done. Rank 0 exits last, or in haste first: torchrun kills the others when
        one fails."""
        assert self._store is not None
        store = self._store
        with suppress(DistError):
            if self._is_in_haste and not self.is_main:
                wait_at_most(
                    CONCLUDE_SECONDS,
                    lambda: store.check(["left/0"]) or 0 in self.lost_ranks or self._lost == LOST,
                )
            store.set(f"left/{self.rank}", "")
            keys = [f"left/{rank}" for rank in range(self.world_size)]
            if self.is_main and not self._is_in_haste:
                wait_at_most(LEAVE_SECONDS, lambda: store.check(keys))
