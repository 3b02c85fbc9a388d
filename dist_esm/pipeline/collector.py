"""The thread around `Assembly`: records, embeddings and written outputs come in, outputs to write and
outcomes go out.

Everything arrives as a message through one bounded queue and is handled by one thread, so there is nothing to
lock. The writers work beside it; a slow disk, in the end, fills the queue and slows the reader and the device
down.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import Any

from dist_esm.atomic import remove
from dist_esm.pipeline.assembly import Assembly
from dist_esm.pipeline.threads import DeadThreadError, Service, acquire, put
from dist_esm.pipeline.writer_pool import WriterPool, WriteTask
from dist_esm.stop import Stop
from dist_esm.types import RecordRead, Segment, SegmentEmbedding, Unit, UnitFailure, UnitResult, WrittenFile

Message = tuple[Callable[..., None], tuple[Any, ...]]
MAX_ANSWERED = 3
"""Packs whose embeddings wait here; with per-residue output each may be hundreds of megabytes."""
MAX_MESSAGES = 16


class Collector(Service):
    """Brings records and embeddings together, has outputs written, and tells what became of each unit.

    Parameters
    ----------
    assembly
        The bookkeeping, which is this thread's alone from now on.
    writers
        What writes outputs.
    rank, stop
        As of `Service`.
    on_results, on_failure
        Called in the collector's thread with what became of units; `on_failure` with the unit's key.
    """

    def __init__(
        self,
        assembly: Assembly,
        writers: WriterPool,
        rank: int,
        stop: Stop,
        on_results: Callable[[Sequence[UnitResult]], None],
        on_failure: Callable[[int, UnitFailure], None],
    ) -> None:
        super().__init__("collector", rank, stop)
        self._assembly = assembly
        self._writers = writers
        self._on_results = on_results
        self._on_failure = on_failure
        self._room = threading.Semaphore(MAX_ANSWERED)
        self._inbox: queue.Queue[Message | None] = queue.Queue(maxsize=MAX_MESSAGES)
        writers.on_written = self._wake

    # The reader and the main thread call these. Each raises DeadThreadError if the collector is gone.

    def begin(self, key: int, unit: Unit) -> None:
        """A unit is being read."""
        self._post(self._assembly.begin, key, unit)

    def add_records(self, records: Sequence[RecordRead]) -> None:
        """Records were read."""
        self._post(self._assembly.add_records, records)

    def end(self, key: int, text_digest: str) -> None:
        """All records of a unit were announced; `text_digest` is that of its text."""
        self._post(self._assembly.end, key, text_digest)

    def fail(self, key: int, error: Exception) -> None:
        """A unit cannot be read."""
        self._post(self._assembly.fail, key, error)

    def abandon(self, key: int) -> None:
        """A unit was not read to its end; it gets no outcome."""
        self._post(self._assembly.abandon, key)

    def add_embeddings(
        self, segments: Sequence[Segment], embeddings: Sequence[SegmentEmbedding | Exception]
    ) -> None:
        """A pack was computed; waits while the embeddings of too many others wait here."""
        acquire(self._room, self.check)
        self._post(self._add_embeddings, segments, embeddings)

    def ask_to_end(self) -> None:
        """Handle what has come, wait for what is being written, and end."""
        with suppress(DeadThreadError):
            put(self._inbox, None, self.check)

    def _post(self, handle: Callable[..., None], *args: Any) -> None:
        put(self._inbox, (handle, args), self.check)

    # All else runs in the collector's own thread.

    def work(self) -> None:
        """Handle messages until there are no more, then wait for the writers."""
        while (message := self._inbox.get()) is not None:
            handle, args = message
            self._take(self._writers.take_written())
            handle(*args)
            self._pass_on()
        while self._writers.is_busy:
            self._take(self._writers.take_written(lambda: False))
        self._assembly.abandon_all()
        self._pass_on()

    def _wake(self) -> None:
        """Called by a writer. A full inbox needs no message: written outputs are taken before every
        message."""
        with suppress(queue.Full):
            self._inbox.put_nowait((lambda: None, ()))

    def _add_embeddings(
        self, segments: Sequence[Segment], embeddings: Sequence[SegmentEmbedding | Exception]
    ) -> None:
        self._room.release()
        # While outputs are being written their rows are about to leave memory. Only rows that find no room
        # then go through a file.
        num_residues = sum(
            keep_stop - keep_start for keep_start, keep_stop in (segment.keep for segment in segments)
        )
        num_bytes = num_residues * self._assembly.settings.residue_bytes
        self._take(self._writers.take_written(lambda: self._assembly.memory.left >= num_bytes))
        self._assembly.add_embeddings(segments, embeddings)

    def _take(self, finished: Iterable[tuple[WriteTask, WrittenFile | Exception]]) -> None:
        for task, written in finished:
            self._assembly.add_written(task, written)
        self._pass_on()

    def _pass_on(self) -> None:
        """Do what the bookkeeping asks for; results that came together are passed on together."""
        assembly = self._assembly
        while assembly.results or assembly.failures or assembly.to_remove or assembly.to_write:
            results, assembly.results = assembly.results, []
            failures, assembly.failures = assembly.failures, []
            unwanted, assembly.to_remove = assembly.to_remove, []
            to_write, assembly.to_write = assembly.to_write, []
            if results:
                self._on_results(results)
            for key, failure in failures:
                self._on_failure(key, failure)
            for written in unwanted:
                remove(assembly.settings.output_dir / written.path)
            for task in to_write:
                for earlier in self._writers.take_written(lambda: self._writers.has_room):
                    assembly.add_written(*earlier)
                self._writers.submit(task)
