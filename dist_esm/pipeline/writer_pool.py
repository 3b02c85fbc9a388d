"""Threads that write outputs which are complete.

Writing, syncing and hashing run beside the collector and the device. No more outputs than there are writers
are written at once, and only small ones wait: when the disk is slower than the device, the collector waits
here, its inbox fills, and the device is held up; memory does not grow. Syncing costs the same for any size,
so small outputs are synced many at a time.
"""

from __future__ import annotations

import errno
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from queue import Empty, SimpleQueue
from types import TracebackType
from typing import Self

from dist_esm.atomic import commit_together, discard_names
from dist_esm.attempt import as_value
from dist_esm.outputs.builder import OutputBuilder
from dist_esm.outputs.work import Work, stage_all
from dist_esm.pipeline.threads import Service, get
from dist_esm.pipeline.writer_processes import GoneError, WriterProcess, names_of
from dist_esm.stop import Stop
from dist_esm.types import WrittenFile

log = logging.getLogger("dist_esm")
Written = list[WrittenFile | Exception]
WriteAll = Callable[[Sequence[Work | Exception], Path], Written]
"""Writes outputs and puts them in their places, below the path."""
MAX_PENDING = 64
PENDING_BYTES = 64 << 20
"""Outputs that are written or wait for it, beyond one for each writer."""
MAX_TOGETHER = 16
TOGETHER_BYTES = 4 << 20
"""Outputs that are written before the first of them is synced."""


@dataclass(frozen=True)
class WriteTask:
    """An output to write; `key` names its unit."""

    key: int
    builder: OutputBuilder
    work: Callable[[], Work]
    """Puts together what is to be done."""
    is_second_try: bool = False


class WriterPool:
    """Writes outputs in threads of its own, small ones together.

    An output for which the disk had no room is tried again when nothing else is being written: another may
    have taken the room for a moment.

    Parameters
    ----------
    output_dir
        Folder that paths of written files are relative to.
    scratch
        Folder of this rank's temporary files.
    num_writers
        Threads.
    rank, stop
        As of `Service`.
    processes
        Write for the threads, as far as there are any.
    """

    def __init__(
        self,
        output_dir: Path,
        scratch: Path,
        num_writers: int,
        rank: int,
        stop: Stop,
        processes: Sequence[WriterProcess] = (),
    ) -> None:
        self.output_dir = output_dir
        self.scratch = scratch
        self.on_written: Callable[[], None] = lambda: None
        """Called in a writer's thread when `take_written` has something new."""
        self._tasks: SimpleQueue[WriteTask | None] = SimpleQueue()
        self._written: SimpleQueue[tuple[WriteTask, WrittenFile | Exception]] = SimpleQueue()
        self._put_off: deque[WriteTask] = deque()
        self._num_pending = 0
        self._pending_bytes = 0
        self._is_one_gone = False
        self._writers = [
            Writer(self, rank, stop, process)
            for _, process in zip_longest(range(num_writers), processes[:num_writers])
        ]
        self._threads = ExitStack()

    def __enter__(self) -> Self:
        for writer in self._writers:
            self._threads.enter_context(writer)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        while not self._tasks.empty():  # outputs that nobody waits for any more
            with suppress(Empty):
                self._tasks.get_nowait()
        for _ in self._writers:  # before the first is joined: any writer may take any of these
            self._tasks.put(None)
        self._threads.close()

    @property
    def is_busy(self) -> bool:
        """Some output is not yet taken from `take_written`."""
        return self._num_pending > 0 or bool(self._put_off)

    @property
    def has_room(self) -> bool:
        """Another output may be submitted."""
        if self._num_pending < len(self._writers):
            return True
        return self._num_pending < MAX_PENDING and self._pending_bytes < PENDING_BYTES

    def submit(self, task: WriteTask) -> None:
        """Write an output."""
        self._num_pending += 1
        self._pending_bytes += task.builder.num_bytes
        self._tasks.put(task)

    def take_written(
        self, until: Callable[[], bool] = lambda: True
    ) -> Iterator[tuple[WriteTask, WrittenFile | Exception]]:
        """Yield finished writes; block until `until()` is true or none is pending.

        Raises
        ------
        DeadThreadError
            If a writer died, whose output would be waited for in vain.
        """
        while True:
            if self._put_off and not self._num_pending:
                self.submit(self._put_off.popleft())
            must_wait = self._num_pending > 0 and not until()
            if self._written.empty() and not must_wait:
                return
            task, written = get(self._written, self._check)
            self._num_pending -= 1
            self._pending_bytes -= task.builder.num_bytes
            if is_disk_full(written) and task.builder.is_wanted and not task.is_second_try:
                self._put_off.append(replace(task, is_second_try=True))
            else:
                yield task, written

    def _check(self) -> None:
        for writer in self._writers:
            writer.check()

    def note_gone(self, rank: int, error: GoneError) -> None:
        """Say once that a process is gone which wrote for a thread. For writers."""
        if not self._is_one_gone:
            self._is_one_gone = True
            log.warning("rank %d: %s: a thread of this rank writes in its place", rank, error)

    def write_next(self, write: WriteAll) -> bool:
        """Have the next output written, with small ones that wait behind it; false when the pool is closed.
        For writers."""
        task = self._tasks.get()
        if task is None:
            return False
        tasks = [task, *self._small_ones_behind(task.builder.num_bytes)]
        works = [as_value(task.work) for task in tasks]
        for pair in zip(tasks, write(works, self.output_dir), strict=True):
            self._written.put(pair)
        self.on_written()
        return True

    def _small_ones_behind(self, num_bytes: int) -> Iterator[WriteTask]:
        """Take what waits and is small enough to be written together with what has so many bytes."""
        for _ in range(MAX_TOGETHER - 1):
            if num_bytes > TOGETHER_BYTES or self._tasks.empty():
                return
            try:
                task = self._tasks.get_nowait()
            except Empty:
                return
            if task is None:
                self._tasks.put(None)
                return
            num_bytes += task.builder.num_bytes
            yield task


class Writer(Service):
    """One thread of a `WriterPool`, and the process that writes for it, if there is one."""

    def __init__(self, pool: WriterPool, rank: int, stop: Stop, process: WriterProcess | None) -> None:
        super().__init__("writer", rank, stop)
        self._pool = pool
        self._process = process

    def work(self) -> None:
        """Write what the pool has, until it is closed."""
        while self._pool.write_next(self._write):
            pass

    def _write(self, works: Sequence[Work | Exception], output_dir: Path) -> Written:
        """Write all that can be moved in the process, and the rest here."""
        movable = [place for place, work in enumerate(works) if isinstance(work, Work) and work.is_movable]
        answered = self._send([works[place] for place in movable], output_dir) if movable else None
        written = dict(zip(movable, answered, strict=True)) if answered is not None else {}
        rest = [place for place in range(len(works)) if place not in written]
        staged = stage_all([works[place] for place in rest])
        written.update(zip(rest, commit_together(staged, output_dir), strict=True))
        return [written[place] for place in range(len(works))]

    def _send(self, works: Sequence[Work | Exception], output_dir: Path) -> Written | None:
        """Have the process write; None if there is none, or it cannot."""
        if self._process is None:
            return None
        try:
            return self._process.write(works, output_dir)
        except GoneError as error:
            self._pool.note_gone(self.rank, error)
            discard_names(self._pool.scratch, names_of(self._process.number))
            self._process = None
            return None

    def ask_to_end(self) -> None:
        """Do nothing: the pool tells all its writers at once."""


def is_disk_full(written: WrittenFile | Exception) -> bool:
    """Tell whether an output could not be written for want of room."""
    return isinstance(written, OSError) and written.errno in (errno.ENOSPC, errno.EDQUOT)
