"""What is finished, for which input and under which settings: the append-only record that makes a run resumable.

A unit is done when its output is in place under its final name and its line here is on disk, in that order. Every rank of every
launch appends to a file of its own, so nothing is ever written after a line that a kill tore. A line counts only if its checksum
is right; it stands for work only as long as the input's text has the same digest and the outputs the same bytes.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import json
import os
import shutil
import time
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any

from dist_esm.atomic import atomically, discard, is_leftover, read_back, remove
from dist_esm.types import Slice, Tally, WrittenFile

LOCK_SECONDS = 5.0
ROOM_SECONDS = 2.0
REPORTS = ("report.json", "failed_files.txt", "verify.json")
SETTINGS = ("settings.json", "config.json")


@dataclass(frozen=True)
class Entry:
    """One finished unit, or one cut file whose pieces were joined."""

    output: str
    """The file's output without suffix, which names it whatever became of the input's own path."""
    slices: list[tuple[int, int | None]]
    """Text that it covers, as (start, stop) in decompressed bytes: one slice of a unit, all of them of a joined file."""
    digests: list[str]
    """sha256 of the text of each slice."""
    written: list[WrittenFile]
    tally: Tally
    rank: int
    seconds: float
    is_joined: bool = False


def folder(output_dir: Path) -> Path:
    """Where the journal's files are."""
    return output_dir / ".dist_esm" / "journal"


class Journal:
    """This rank's part of the journal, for appending. A directory that is gone is an error of the unit at hand, not a new journal."""

    def __init__(self, output_dir: Path, launch: str, rank: int) -> None:
        self.launch = launch
        self.rank = rank
        self.path = folder(output_dir) / f"{launch}.{rank:05d}.jsonl"
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
            # A full disk: a piece that is being written may fail and give its room back.
            if time.monotonic() > deadline:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(self.path))
            time.sleep(0.05)
        os.fsync(self._file.fileno())

    def _write(self, lines: bytes) -> bool:
        """Whether there was room for lines; what a torn one left is closed before the next."""
        assert self._file is not None
        whole = b"\n" + lines if self._is_torn else lines
        try:
            self._is_torn = self._file.write(whole) != len(whole)
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
    """One line: JSON, a tab, and its CRC-32."""
    text = json.dumps(asdict(entry), separators=(",", ":")).encode()
    return text + b"\t%08x\n" % zlib.crc32(text)


def read(output_dir: Path, launch: str | None = None) -> list[Entry]:
    """All entries of all launches, or of one, the oldest first; torn and damaged lines are passed over."""
    entries = []
    for path in sorted(folder(output_dir).glob(f"{launch or '*'}.*.jsonl")):
        for line in path.read_bytes().split(b"\n"):
            text, _, checksum = line.rpartition(b"\t")
            if not text or checksum != b"%08x" % zlib.crc32(text):
                continue
            fields = json.loads(text)
            fields["slices"] = [(start, stop) for start, stop in fields["slices"]]
            fields["written"] = [WrittenFile(**one) for one in fields["written"]]
            entries.append(Entry(**{**fields, "tally": Tally(**fields["tally"])}))
    return entries


def is_intact(entry: Entry, output_dir: Path) -> bool:
    """Whether all outputs of an entry are there with the bytes that were written."""
    return all(read_back(output_dir, Path(one.path)) == one for one in entry.written)


def new_launch() -> str:
    """A name for this launch that sorts after the names of earlier ones."""
    return f"{time.time_ns():020d}"


def check_settings(output_dir: Path, settings: dict[str, Any], resume: bool) -> None:
    """Refuse to mix settings in one output directory.

    Raises
    ------
    ValueError
        One line that names what changed, if `resume` is set and the directory holds work done under other settings.
    """
    path = output_dir / ".dist_esm" / "settings.json"
    if not resume or not path.exists() or not read(output_dir):
        return
    before = json.loads(path.read_text(encoding="utf-8"))
    now = json.loads(json.dumps(settings))
    changed = [
        f"{key}={before.get(key)!r} before, {now.get(key)!r} now"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
    ]
    if changed:
        remedy = "name another output_dir, or start over with resume=false"
        raise ValueError(
            f"output_dir={output_dir} holds embeddings made under other settings ({'; '.join(changed)}): {remedy}"
        )


def write_settings(output_dir: Path, settings: dict[str, Any]) -> None:
    """Record the settings that the journal's work is done under."""
    folder(output_dir).mkdir(parents=True, exist_ok=True)
    with atomically(output_dir / ".dist_esm" / "settings.json") as beside:
        beside.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")


def finished_outputs(output_dir: Path) -> list[str]:
    """The outputs that the journal lists and that are there, relative to `output_dir`."""
    listed = dict.fromkeys(one.path for entry in read(output_dir) for one in entry.written)
    return [path for path in listed if (output_dir / path).exists()]


def start_over(output_dir: Path) -> None:
    """Forget all that was done: remove what speaks of it, the outputs that the journal lists, and the journal, in this order."""
    for name in REPORTS:
        (output_dir / name).unlink(missing_ok=True)
    for path in finished_outputs(output_dir):
        remove(output_dir / path)
    for entry in read(output_dir):
        stem = output_dir / entry.output
        for pattern in (".records.tsv", ".part*.records.tsv"):
            for notes in stem.parent.glob(glob.escape(stem.name) + pattern):
                notes.unlink()
    for journal in folder(output_dir).glob("*.jsonl"):
        journal.unlink()


def clean(output_dir: Path, kept: Iterable[str]) -> None:
    """Remove temporary files that a killed run left, and pieces that no entry speaks of. `kept` are paths relative to `output_dir`."""
    shutil.rmtree(output_dir / ".dist_esm" / "scratch", ignore_errors=True)
    for folder_of, names in ((output_dir, REPORTS), (output_dir / ".dist_esm", SETTINGS)):
        for path in folder_of.glob(".*.tmp"):
            if is_leftover(path, names):
                discard(path)
    known = set(kept)
    for path in (output_dir / ".dist_esm" / "pieces").rglob("*.pt"):
        if str(path.relative_to(output_dir)) not in known:
            path.unlink()


def make_scratch(output_dir: Path, launch: str, rank: int) -> Path:
    """Make the folder that only this rank of this launch writes to."""
    scratch = output_dir / ".dist_esm" / "scratch" / f"{launch}.{rank:05d}"
    scratch.mkdir(parents=True)
    return scratch


def lock(output_dir: Path) -> IO[str]:
    """Hold the directory for this run until the file that is returned is closed or the process ends.

    Raises
    ------
    ValueError
        If another run holds it, after a wait in which a run that is being killed may end.
    """
    file = open(output_dir / ".dist_esm" / "lock", "w", encoding="utf-8")  # noqa: SIM115 - the caller holds it
    deadline = time.monotonic() + LOCK_SECONDS
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                file.close()
                raise ValueError(
                    f"output_dir={output_dir} is in use by another run: wait for its end, or name another output_dir"
                ) from None
            time.sleep(0.2)
        else:
            return file


def entry_of(
    output,
    slices: Sequence[Slice],
    digests: list[str],
    written: list[WrittenFile],
    tally: Tally,
    rank: int,
    seconds: float,
    is_joined: bool = False,
) -> Entry:
    """An entry for slices of a file."""
    return Entry(
        str(output.output) if hasattr(output, "output") else output,
        [(one.start, one.stop) for one in slices],
        digests,
        written,
        tally,
        rank,
        seconds,
        is_joined,
    )
