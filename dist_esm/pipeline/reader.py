"""Units to packs, ahead of the device: a thread that reads, announces every record, and fills packs across
file borders.

Memory is the packs ahead and open, and the embeddings that are kept for identical sequences.
"""

from __future__ import annotations

import hashlib
import os
import queue
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress

from dist_esm.attempt import as_value
from dist_esm.config import Config
from dist_esm.fasta.blocks import CHANGED, FastaError
from dist_esm.fasta.parser import read_proteins
from dist_esm.fasta.segments import apply_length_policy, make_segments, num_embedded
from dist_esm.outputs.in_hand import InHand, name_of
from dist_esm.pipeline.collector import Collector
from dist_esm.pipeline.duplicates import Duplicates
from dist_esm.pipeline.failures import Failures
from dist_esm.pipeline.packer import Packer
from dist_esm.pipeline.threads import LOOK_SECONDS, DeadThreadError, Service, get, put
from dist_esm.stop import Stop
from dist_esm.types import FastaFile, Pack, Protein, RecordRead, Segment, TakenUnit, Unit

PACKS_AHEAD = 4
MAX_HELD = 1 << 14
"""Flush open packs after this many records: a stretch of duplicates would never fill them."""
MAX_TOLD_APART = 2000
"""Records of a unit that may kill its process, up to which each one gets a pack of its own, so that the
protein can be
named."""
MAX_BATCH = 512
"""Records announced at once."""


class ClosingError(DeadThreadError):
    """Nobody takes packs any more, because the main thread has ended early."""


class Reader(Service):
    """Reads units, announces their records to the collector, and fills packs ahead of the device.

    Identical residues are embedded once: later records name the first, as long as its embedding is kept.

    Parameters
    ----------
    units
        What to read, in order; the next is asked for when the one before it has been read. None: finish all
        that is in hand before the next is asked for.
    files
        The plan's files.
    config
        Checked configuration.
    toks_per_batch, toks_of_last
        Tokens of a pack, and of the last ones before there is nothing more to read.
    collector
        Is told of every unit and record.
    failures
        Says which files have failed already, and is told what cannot be read.
    in_hand
        Is told what may kill this process, before it can.
    rank, stop
        As of `Service`.
    """

    def __init__(
        self,
        units: Iterable[TakenUnit | None],
        files: Sequence[FastaFile],
        config: Config,
        toks_per_batch: int,
        toks_of_last: int,
        collector: Collector,
        failures: Failures,
        in_hand: InHand,
        rank: int,
        stop: Stop,
    ) -> None:
        super().__init__("reader", rank, stop)
        self._units = units
        self._files = files
        self._config = config
        self._collector = collector
        self._failures = failures
        self._in_hand = in_hand
        self._packs: queue.Queue[Pack | None] = queue.Queue(maxsize=PACKS_AHEAD)
        self._packer = Packer(toks_per_batch)
        self._toks_of_last = toks_of_last
        self._batch: list[RecordRead] = []
        self._next_index = 0
        self._duplicates = Duplicates(config)
        self._num_held = 0
        self._is_closing = False

    @property
    def has_pack(self) -> bool:
        """A pack, or the end, is there without waiting."""
        return not self._packs.empty()

    def next_pack(self) -> Pack | None:
        """Wait for the next pack; None when there will be no more.

        Raises
        ------
        DeadThreadError
            If the reader is gone before it has read everything.
        """
        return get(self._packs, self.check)

    def ask_to_end(self) -> None:
        """Read no further, and let go of packs that nobody will take."""
        self._is_closing = True

    def work(self) -> None:
        """Read all units, or as many as somebody takes the packs of."""
        with suppress(ClosingError):
            self._read_units()

    def _read_units(self) -> None:
        for key, taken in enumerate(self._units):
            if self._is_over:
                break
            if taken is None:
                self._finish_what_is_in_hand()
                continue
            unit, is_alone = taken
            if unit.file in self._failures.files:
                continue
            self._failures.begin(key, unit)
            self._in_hand.read(name_of(self._files[unit.file], unit), is_alone)
            self._collector.begin(key, unit)
            text_digest = as_value(self._read, key, unit, is_alone)
            self._flush_batch()
            if isinstance(text_digest, DeadThreadError):
                raise text_digest
            if isinstance(text_digest, Exception):
                self._failures.add_unreadable(key)
                self._collector.fail(key, text_digest)
            elif text_digest is None:
                self._collector.abandon(key)
            else:
                self._collector.end(key, text_digest)
            if is_alone:
                self._finish_what_is_in_hand()
        self._in_hand.end_reading()
        self._flush_packs(self._toks_of_last)
        self._put(None)

    def _flush_packs(self, toks: int | None = None) -> None:
        for pack in self._packer.flush(toks):
            self._emit(pack)

    def _finish_what_is_in_hand(self) -> None:
        """Wait until every unit that was taken has an outcome."""
        self._flush_packs(self._toks_of_last)
        while self._failures.num_open and not self._is_over:
            self._collector.check()
            time.sleep(LOOK_SECONDS / 10)
        self._in_hand.end_reading()

    @property
    def _is_over(self) -> bool:
        return self.stop.reason is not None or self._is_closing

    def _read(self, key: int, unit: Unit, is_alone: bool) -> str | None:
        """Announce and pack the records of a unit; return the sha256 of its text, or None if stopped half
        way."""
        num_records = 0
        unit_name = name_of(self._files[unit.file], unit)
        is_told_apart = is_alone and unit.count.sequences <= MAX_TOLD_APART
        text_digest = hashlib.sha256()
        for protein in read_proteins(unit, self._config, text_digest.update):
            if self._is_over:
                return None
            num_records += not protein.is_continued
            for segment in self._announce(key, protein):
                self._in_hand.announce(segment.protein, unit_name, protein.id)
                for pack in [Pack((segment,))] if is_told_apart else self._packer.add(segment):
                    self._emit(pack)
            self._num_held += 1
            if self._num_held > MAX_HELD:
                self._flush_packs()
                self._num_held = 0
        file = self._files[unit.file]
        stat = os.stat(file.location)
        is_same = (stat.st_size, stat.st_mtime_ns) == (file.num_bytes, file.mtime_ns)
        if num_records != unit.count.sequences or not is_same:
            raise FastaError(CHANGED)
        return text_digest.hexdigest()

    def _announce(self, key: int, protein: Protein) -> Iterator[Segment]:
        """Tell the collector of a record, and give the segments that the device has to see for it."""
        index = self._next_index
        self._next_index += 1
        protein, outcome, spans = apply_length_policy(protein, self._config)
        num_residues = num_embedded(spans)
        duplicate_of = None
        if spans and self._config.dedupe:
            duplicate_of = self._duplicates.first(index, protein.residues[:num_residues], len(spans))
        evicted = tuple(self._duplicates.evicted())
        self._batch.append(
            RecordRead(index, key, protein, outcome, num_residues, len(spans), duplicate_of, evicted)
        )
        if len(self._batch) >= MAX_BATCH:
            self._flush_batch()
        if duplicate_of in (None, index):
            yield from make_segments(index, protein.residues, spans)

    def _emit(self, pack: Pack) -> None:
        self._num_held = 0
        self._flush_batch()
        self._put(pack)

    def _put(self, pack: Pack | None) -> None:
        put(self._packs, pack, self._raise_if_closing)

    def _raise_if_closing(self) -> None:
        if self._is_closing:
            raise ClosingError

    def _flush_batch(self) -> None:
        if self._batch:
            self._collector.add_records(self._batch)
            self._batch = []
