"""The append-only record of finished units, which makes a run resumable.

A unit is done when its output is in place under its final name and its line here is on disk, in that order.
Every rank of every launch appends to a file of its own, so nothing is ever written after a line that a kill
tore. A line counts only if its checksum is right; it stands for work only as long as the input's text has the
same digest and the outputs the same bytes.
"""

from __future__ import annotations

import errno
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from dist_esm.checksum import read_again
from dist_esm.outputs.format_version import FORMAT_VERSION, REMEDY, check_fields, is_count, version_of
from dist_esm.outputs.lines import encode as encode_line
from dist_esm.outputs.lines import whole_lines
from dist_esm.outputs.trust import is_shard, leads_out
from dist_esm.types import TALLIED, FastaFile, RecordOutcome, Tally, Unit, WrittenFile

ROOM_SECONDS = 2.0


@dataclass(frozen=True)
class Entry:
    """One finished unit, or one cut file whose shards were joined."""

    output: str
    """The file's output without suffix, which names it whatever became of the input's own path."""
    source: str
    """The input's path relative to the common root of the inputs. Version 1 did not keep it: there it is made
    from `output`."""
    slices: list[tuple[int, int | None]]
    """Text that it covers, as (start, stop) in decompressed bytes: one slice of a unit, all of them of a
    joined file."""
    digests: list[str]
    """sha256 of the text of each slice."""
    written: list[WrittenFile]
    tally: Tally
    rank: int
    seconds: float
    is_joined: bool = False
    is_last: bool | None = None
    """The text of its file ends with it. Version 1 did not keep it: there it is None unless the slices
    tell."""
    before: int | None = None
    """Records of its file in front of it: its outputs number their proteins from there. Versions before 5 did
    not keep it: there it is None."""

    @property
    def is_whole(self) -> bool:
        """True if it covers all of its file."""
        return self.is_joined or (self.slices[0][0] == 0 and self.is_last is True)

    @property
    def is_shard(self) -> bool:
        """True if no output was written yet, but a shard of one."""
        return all(is_shard(file.path) for file in self.written)


def entry_of(
    file: FastaFile,
    units: Sequence[Unit],
    num_units: int,
    digests: list[str],
    written: list[WrittenFile],
    tally: Tally,
    rank: int,
    seconds: float,
    is_joined: bool = False,
) -> Entry:
    """Make the entry of units of a file.

    Parameters
    ----------
    file
        The input.
    units
        Those that it covers, in order.
    num_units
        How many the file has.
    digests, written, tally, rank, seconds, is_joined
        As in `Entry`.
    """
    slices = [(unit.slice.start, unit.slice.stop) for unit in units]
    is_last = units[-1].ordinal == num_units - 1
    before = units[0].before.sequences
    return Entry(
        str(file.output),
        file.source,
        slices,
        digests,
        written,
        tally,
        rank,
        seconds,
        is_joined,
        is_last,
        before,
    )


def folder(output_dir: Path) -> Path:
    """Return the folder of the journal's files."""
    return output_dir / ".dist_esm" / "journal"


class Journal:
    """This rank's part of the journal, for appending. A folder that is gone is an error of the unit at hand,
    not a new journal.

    Parameters
    ----------
    output_dir
        Of the run.
    launch, rank
        Name the file.
    """

    def __init__(self, output_dir: Path, launch: int, rank: int) -> None:
        self.rank = rank
        self.path = folder(output_dir) / f"{launch:020d}.{rank:05d}.jsonl"
        self._file: IO[bytes] | None = None
        self._is_torn = False

    def append(self, entries: Sequence[Entry]) -> None:
        """Put lines on disk.

        Raises
        ------
        OSError
            If it cannot be written, or the journal was removed since the run began.
        """
        if self._file is None:
            self._file = open(self.path, "ab", buffering=0)  # noqa: SIM115 - closed by close()
        if not self.path.exists():
            raise FileNotFoundError(
                f"{self.path} is gone: was output_dir removed while the run was under way?"
            )
        deadline = time.monotonic() + ROOM_SECONDS
        while not self._write(b"".join(map(encode, entries))):
            # A full disk: an output that is being written may fail and give its room back.
            if time.monotonic() > deadline:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            time.sleep(0.05)
        os.fsync(self._file.fileno())

    def _write(self, lines: bytes) -> bool:
        """Write lines; return whether there was room. What a torn line left is closed before the next."""
        assert self._file is not None
        block = b"\n" + lines if self._is_torn else lines
        try:
            self._is_torn = self._file.write(block) != len(block)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return False
        return not self._is_torn

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()


def encode(entry: Entry) -> bytes:
    """Return one line."""
    return encode_line({"format": FORMAT_VERSION, **asdict(entry)})


def read(output_dir: Path, launch: int | None = None) -> list[Entry]:
    """Read the entries of all launches, or of one, the oldest first; pass over torn and damaged lines.

    Raises
    ------
    ValueError
        If a whole line cannot be understood, in one line that names the file: it may be of a later version.
    """
    return [entry for entries in read_by_launch(output_dir, launch) for entry in entries]


def read_by_launch(output_dir: Path, launch: int | None = None) -> list[list[Entry]]:
    """Read the entries as `read` does, those of each launch by themselves."""
    pattern = "*.jsonl" if launch is None else f"{launch:020d}.*.jsonl"
    by_launch: dict[str, list[Entry]] = {}
    for path in sorted(folder(output_dir).glob(pattern)):
        by_launch.setdefault(path.name.partition(".")[0], []).extend(_entries(path))
    return list(by_launch.values())


def _entries(path: Path) -> Iterator[Entry]:
    for text in whole_lines(path):
        yield _decode(text, path)


def _decode(text: bytes, path: Path) -> Entry:
    """Turn the JSON of a line, whose checksum is right, into an entry."""
    try:
        content: dict[str, Any] = json.loads(text)
    except ValueError:
        raise ValueError(f"{path} has a line that is no JSON: {REMEDY}") from None
    version = version_of(content, path)
    content.pop("format", None)
    if version == 1:
        content |= _missing_in_version_1(content)
    if version < 5:
        content.setdefault("before", None)
    if version < 3 and isinstance(content.get("tally"), dict):
        not_counted = {"replaced": {}, "nucleotides": 0, "more_chains": 0, "latin1": 0}
        content["tally"] = not_counted | content["tally"]
    check_fields(Entry, content, path)
    check_fields(Tally, content["tally"], path)
    if not all(type(content[name]) is list and content[name] for name in ("slices", "digests", "written")):
        raise ValueError(f"{path} has a line without slices, digests or outputs: {REMEDY}")
    for written in content["written"]:
        check_fields(WrittenFile, written, path)
    try:
        content["slices"] = [(int(start), stop) for start, stop in content["slices"]]
    except (TypeError, ValueError):
        raise ValueError(f"{path} has a line with slices {content['slices']!r}: {REMEDY}") from None
    content["written"] = [WrittenFile(**written) for written in content["written"]]
    entry = Entry(**{**content, "tally": Tally(**content["tally"])})
    problem = next(_problems(entry), None)
    if problem is not None:
        raise ValueError(f"{path} has a line that no run writes ({problem}): {REMEDY}")
    return entry


def _problems(entry: Entry) -> Iterator[str]:
    """Say what in an entry cannot be: whoever wrote it, its paths will be removed and its counts reported."""
    texts = (entry.output, entry.source, *entry.digests, *(file.sha256 for file in entry.written))
    if not all(isinstance(text, str) for text in (*texts, *(file.path for file in entry.written))):
        yield "a name or a digest is no text"
        return
    for path in (entry.output, *(file.path for file in entry.written)):
        if leads_out(path):
            yield f"{path!r} leads out of output_dir"
        if path.startswith(".dist_esm") and not is_shard(path):
            yield f"{path!r} is no output"
    tally = entry.tally
    tables = (tally.outcomes, tally.skipped, tally.changed, tally.replaced)
    if not all(isinstance(table, dict) for table in tables):
        yield "a table of counts is none"
        return
    counts = [*(number for table in tables for number in table.values()), entry.rank]
    counts += [getattr(tally, name) for name in TALLIED] + [file.num_bytes for file in entry.written]
    counts += [number for span in entry.slices for number in span if number is not None]
    counts += [] if entry.before is None else [entry.before]
    if not all(map(is_count, counts)):
        yield "a count is negative or no whole number"
    if not set(tally.outcomes) <= set(RecordOutcome.__members__):
        yield f"outcomes {sorted(tally.outcomes)}"
    if type(entry.seconds) not in (int, float) or not 0 <= entry.seconds < math.inf:
        yield f"{entry.seconds!r} seconds"
    if len(entry.digests) != len(entry.slices):
        yield "it has not one digest for each slice"


def _missing_in_version_1(content: dict[str, Any]) -> dict[str, Any]:
    """Return the fields that a line of version 1 lacks. The suffix of its input is not known, and `.fasta`
    stands for it."""
    output, slices = content.get("output"), content.get("slices")
    source = f"{output.removesuffix('_ESM')}.fasta" if isinstance(output, str) else None
    ends = bool(content.get("is_joined")) or (isinstance(slices, list) and slices[-1:] == [[0, None]])
    return {"source": source, "is_last": True if ends else None}


def is_intact(entry: Entry, output_dir: Path) -> bool:
    """Return whether all outputs of an entry are there with the bytes that were written."""
    return all(read_again(output_dir, written) == written for written in entry.written)
