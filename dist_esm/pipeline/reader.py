"""Units to packs, ahead of the device: a thread that reads, announces every record, and fills packs across file borders.

Memory is the packs ahead and open, and the answers that are kept for identical sequences.
"""

from __future__ import annotations

import hashlib
import os
import queue
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence

from dist_esm.attempt import as_value
from dist_esm.config import Config, Include
from dist_esm.fasta.blocks import FastaError
from dist_esm.fasta.parser import read_proteins
from dist_esm.fasta.segments import apply_length_policy, make_segments, num_embedded
from dist_esm.pipeline.collector import Collector
from dist_esm.pipeline.failures import Failures
from dist_esm.pipeline.packer import Packer
from dist_esm.stop import Stop
from dist_esm.types import Failure, FastaFile, Pack, Protein, RecordRead, Segment, Unit

PACKS_AHEAD = 4
DEDUPE_BYTES = 256 << 20
"""Bytes of answers that are kept for identical sequences."""
LEADER_BYTES = 1024
"""What keeping one answer costs beside its numbers."""
MAX_HELD = 1 << 14
"""Records that may pass before packs that do not fill are let go: when all that comes is copies, no pack fills."""
MAX_BATCH = 512
"""Records announced at once."""


class Reader(threading.Thread):
    """Reads units, announces their records to the collector, and fills packs ahead of the device.

    Identical residues are embedded once: later records point to the first, as long as its answer is kept.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        files: Sequence[FastaFile],
        config: Config,
        toks_per_batch: int,
        collector: Collector,
        failures: Failures,
        stop: Stop,
    ) -> None:
        super().__init__(name="reader", daemon=True)
        self.units = units
        self.files = files
        self.config = config
        self.collector = collector
        self.failures = failures
        self.stop = stop
        self.packs: queue.Queue[Pack | None] = queue.Queue(maxsize=PACKS_AHEAD)
        self.crash: Exception | None = None
        self._packer = Packer(toks_per_batch)
        self._batch: list[RecordRead] = []
        self._next_ticket = 0
        self._leaders: OrderedDict[bytes, tuple[int, int]] = OrderedDict()
        self._kept_bytes = 0
        self._num_held = 0

    def run(self) -> None:
        """Read all units, then say so with None in `packs`."""
        crash = as_value(self._read_all)
        self.crash = crash if isinstance(crash, Exception) else None
        self.packs.put(None)

    def _read_all(self) -> None:
        for key, unit in enumerate(self.units):
            if self.stop.reason is not None:
                break
            if unit.file in self.failures.files:
                continue
            self.collector.begin(key, unit)
            digest = as_value(lambda key=key, unit=unit: self._read(key, unit))  # type: ignore[misc]
            self._flush_batch()
            if isinstance(digest, Exception):
                self.failures.add(key, Failure.of(self.files[unit.file].path, digest, self.failures.rank))
                self.collector.fail(key, digest)
            elif digest is None:
                self.collector.abandon(key)
            else:
                self.collector.end(key, digest)
        for pack in self._packer.flush():
            self._emit(pack)

    def _read(self, key: int, unit: Unit) -> str | None:
        """Announce and pack the records of a unit, and give the sha256 of its text; None if the run was stopped half way."""
        num_records = 0
        digest = hashlib.sha256()
        for protein in read_proteins(unit, self.config, digest.update):
            if self.stop.reason is not None:
                return None
            num_records += not protein.is_continued
            for segment in self._announce(key, protein):
                for pack in self._packer.add(segment):
                    self._emit(pack)
            self._num_held += 1
            if self._num_held > MAX_HELD:
                for pack in self._packer.flush():
                    self._emit(pack)
                self._num_held = 0
        file = self.files[unit.file]
        stat = os.stat(file.location)
        if num_records != unit.count.sequences or (stat.st_size, stat.st_mtime_ns) != (
            file.num_bytes,
            file.mtime_ns,
        ):
            raise FastaError("the file was changed while the run was under way: start the run again")
        return digest.hexdigest()

    def _announce(self, key: int, protein: Protein) -> Iterator[Segment]:
        """Tell the collector of a record, and give the segments that the device has to see for it."""
        protein_index = self._next_ticket
        self._next_ticket += 1
        protein, outcome, spans = apply_length_policy(protein, self.config)
        num_residues = num_embedded(spans)
        like = (
            self._leader(protein_index, protein.residues[:num_residues], len(spans))
            if spans and self.config.dedupe
            else None
        )
        evicted = tuple(self._forgotten())
        self._batch.append(
            RecordRead(protein_index, key, protein, outcome, num_residues, len(spans), like, evicted)
        )
        if len(self._batch) >= MAX_BATCH:
            self._flush_batch()
        if like in (None, protein_index):
            yield from make_segments(protein_index, protein.residues, spans)

    def _leader(self, protein_index: int, residues: bytes, num_segments: int) -> int | None:
        """The protein_index of the first protein with the same residues, which may be this one; None if keeping its answer is not cheap."""
        include, layers = self.config.include, len(self.config.repr_layers)
        rows = sum(len(residues) if kind is Include.per_tok else 1 for kind in include)
        num_bytes = LEADER_BYTES + 4 * self.config.model.embed_dim * layers * rows
        if num_bytes > DEDUPE_BYTES // 16:
            return None
        digest = hashlib.blake2b(residues, digest_size=16, salt=num_segments.to_bytes(8, "little")).digest()
        if digest in self._leaders:
            self._leaders.move_to_end(digest)
            return self._leaders[digest][0]
        self._leaders[digest] = (protein_index, num_bytes)
        self._kept_bytes += num_bytes
        return protein_index

    def _forgotten(self) -> Iterator[int]:
        """Leaders that make room for newer ones, the least recently asked for first."""
        while self._kept_bytes > DEDUPE_BYTES:
            _, (protein_index, num_bytes) = self._leaders.popitem(last=False)
            self._kept_bytes -= num_bytes
            yield protein_index

    def _emit(self, pack: Pack) -> None:
        self._num_held = 0
        self._flush_batch()
        self.packs.put(pack)

    def _flush_batch(self) -> None:
        if self._batch:
            self.collector.announce(self._batch)
            self._batch = []
