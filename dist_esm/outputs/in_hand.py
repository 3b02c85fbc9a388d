"""What each rank has in hand, on disk, so that a protein that kills its process is found out and set aside.

A rank appends a line to a file of its own before it reads a unit and before it submits a pack, and another
one when that is done; it removes the file when it ends in order. A file that is still there at the next
launch is that of a process that died, and its last lines name the units that may have killed it: the
*suspects*. They run last, one at a time, so that everything else gets done. A unit whose process dies while
it alone is in hand is *quarantined*: failed, with file and protein named.

A death counts in full if somebody saw it: another rank of that launch, or torchrun, which started the rank
again. A job that is killed as a whole leaves the same files, and no protein is to blame, so a death that
nobody saw makes a suspect only when it comes again, and quarantines only when it comes twice while the unit
is alone.

Lines are text and go out in one write each, without a sync: they have to outlive the process, not the
machine.
"""

from __future__ import annotations

import json
import os
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_esm.atomic import atomically, discard
from dist_esm.outputs.format_version import is_count
from dist_esm.types import FastaFile, Unit

FOLDER = Path(".dist_esm") / "in_hand"
RECORD = Path(".dist_esm") / "suspects.json"


@dataclass
class Deaths:
    """The deaths of processes that had a unit in hand."""

    seen: int = 0
    """Deaths that somebody saw."""
    seen_alone: int = 0
    """Of them, with nothing else in hand."""
    unseen: int = 0
    unseen_alone: int = 0
    how: str = ""
    """How the last process ended, if that is known."""
    protein: str = ""
    """The protein in hand at the last death with nothing else in hand."""

    @property
    def is_suspect(self) -> bool:
        """The unit runs last, with nothing else in hand."""
        return self.seen >= 1 or self.unseen >= 2

    @property
    def is_quarantined(self) -> bool:
        """The unit does not run any more."""
        is_seen = self.seen >= 2 and self.seen_alone >= 1
        return is_seen or (self.unseen_alone >= 2 and self.seen + self.unseen >= 3)

    def describe(self) -> str:
        """One line that says what happened and how to try again."""
        protein = f"{self.protein}: " if self.protein else ""
        how = f" ({self.how})" if self.how else ""
        return (
            f"{protein}the process that had it in hand died {self.seen + self.unseen} times{how}; "
            f"it is left out from now on: remove {RECORD} in output_dir to try it again"
        )


def name_of(file: FastaFile, unit: Unit) -> str:
    """A unit's name, the same in every launch that cuts its file alike."""
    return f"{unit.slice.start} {file.output}"


class InHand:
    """The notes of one rank, written by its reader and its main thread.

    Parameters
    ----------
    output_dir
        Of the run.
    launch, rank
        Name the file.
    """

    def __init__(self, output_dir: Path, launch: int, rank: int) -> None:
        self.path = output_dir / FOLDER / f"{launch:020d}.{rank:05d}.jsonl"
        self.is_alone = False
        """The unit in hand may kill its process: nothing else may be in hand meanwhile."""
        self._lock = threading.Lock()
        self._file: int | None = None
        self._in_pack: dict[int, tuple[str, str]] = {}
        """Protein to its unit and its id."""
        self._num_segments: Counter[int] = Counter()
        """Protein to its segments that are not settled."""

    def read(self, unit: str, is_alone: bool = False) -> None:
        """A unit is about to be read."""
        self.is_alone = is_alone
        self._write({"read": unit, "alone": is_alone})

    def announce(self, protein_index: int, unit: str, protein_id: str) -> None:
        """A segment of a protein will come in some pack."""
        self._in_pack[protein_index] = unit, protein_id
        self._num_segments[protein_index] += 1

    def submit(self, proteins: Sequence[int]) -> None:
        """A pack is about to be submitted."""
        known = [self._in_pack[protein] for protein in proteins if protein in self._in_pack]
        only = [known[0][1]] if len(proteins) == 1 and known else []
        self._write({"submit": sorted({unit for unit, _ in known}), "proteins": only})

    def settle(self, proteins: Iterable[int]) -> None:
        """The oldest pack that was submitted is done."""
        for protein in proteins:
            self._num_segments[protein] -= 1
            if self._num_segments[protein] <= 0:
                self._in_pack.pop(protein, None)
                del self._num_segments[protein]
        self._write({"settle": 1})

    def end_reading(self) -> None:
        """The unit has been read; its packs may still be in hand."""
        self._write({"read": None, "alone": False})

    def leave(self) -> None:
        """This rank ends in order: nothing in hand is to blame for anything."""
        with self._lock:
            if self._file is not None:
                os.close(self._file)
                self._file = None
        self.path.unlink(missing_ok=True)

    def blame(self, how: str) -> None:
        """This rank ends out of order, and can still say how."""
        note_death(self.path, how)

    def _write(self, note: Mapping[str, Any]) -> None:
        line = json.dumps(note).encode() + b"\n"
        with self._lock:
            if self._file is None:
                self.path.parent.mkdir(parents=True, exist_ok=True)
                self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
            os.write(self._file, line)


def note_death(notes: Path, how: str) -> None:
    """Write down that somebody saw a process end out of order, and how."""
    with suppress(OSError):
        notes.with_suffix(".ended").write_text(how, encoding="utf-8")


def notes_of(output_dir: Path, launch: int, rank: int) -> Path:
    """The path of a rank's notes."""
    return InHand(output_dir, launch, rank).path


def suspects_of(notes: Path) -> tuple[set[str], bool, str]:
    """Read what a process that died had in hand.

    Returns
    -------
    the names of the units; whether it was one that ran alone; the protein, if it is known
    """
    reading: str | None = None
    is_alone = False
    packs: list[tuple[list[str], list[str]]] = []
    for line in notes.read_bytes().split(b"\n"):
        try:
            note = json.loads(line)
        except ValueError:  # torn, or the end
            continue
        if not isinstance(note, dict):
            continue
        if "submit" in note:
            packs.append((_texts(note["submit"]), _texts(note.get("proteins"))))
        elif "settle" in note:
            del packs[:1]
        else:
            reading = next(iter(_texts([note.get("read")])), None)
            is_alone = bool(note.get("alone")) or (is_alone and bool(packs))
    units = {unit for in_pack, _ in packs for unit in in_pack} | ({reading} if reading else set())
    proteins = [protein for _, of_pack in packs for protein in of_pack]
    return units, is_alone and len(units) == 1, proteins[0] if proteins else ""


def _texts(value: Any) -> list[str]:
    """Return the texts of a list that JSON gave; nothing else is a name."""
    return [text for text in value if isinstance(text, str)] if isinstance(value, list) else []


def collect(output_dir: Path, was_restarted: bool) -> dict[str, Deaths]:
    """Bring the record of deaths up to date with the notes that dead processes left, and return it.

    Only the rank that holds the directory calls it.

    Parameters
    ----------
    output_dir
        Of the run.
    was_restarted
        torchrun has started this launch again: it saw the processes of the last one end.
    """
    records, is_news = known_deaths(output_dir, was_restarted)
    if is_news:
        write_records(output_dir, records)
    for path in (output_dir / FOLDER).glob("*"):
        discard(path)
    return records


def known_deaths(output_dir: Path, was_restarted: bool) -> tuple[dict[str, Deaths], bool]:
    """Return the record of deaths with what the notes of dead processes say, and whether they say anything.

    Nothing is written or removed.

    Parameters
    ----------
    output_dir, was_restarted
        As of `collect`.
    """
    records = read_records(output_dir)
    notes = sorted((output_dir / FOLDER).glob("*.jsonl"))
    last_launch = notes[-1].name.partition(".")[0] if notes else ""
    of_last = Counter(path.name.partition(".")[0] for path in notes)
    for path in notes:
        launch = path.name.partition(".")[0]
        units, is_alone, protein = suspects_of(path)
        ended = path.with_suffix(".ended")
        how = ended.read_text(encoding="utf-8", errors="replace") if ended.exists() else ""
        is_seen = bool(how) or (was_restarted and launch == last_launch and of_last[launch] == 1)
        for unit in units:
            record = records.setdefault(unit, Deaths())
            record.seen += is_seen
            record.unseen += not is_seen
            record.seen_alone += is_seen and is_alone
            record.unseen_alone += not is_seen and is_alone
            record.how = how or record.how
            record.protein = protein or record.protein
    return records, bool(notes)


def read_records(output_dir: Path) -> dict[str, Deaths]:
    """Read the record of deaths.

    Raises
    ------
    ValueError
        If it is no record of ours.
    """
    path = output_dir / RECORD
    if not path.exists():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        records = {unit: Deaths(**record) for unit, record in content["units"].items()}
        if all(map(_is_possible, records.values())):
            return records
    except (ValueError, KeyError, TypeError, AttributeError):
        pass
    raise ValueError(f"{path} cannot be understood: remove it, which tries everything in it again")


def _is_possible(record: Deaths) -> bool:
    """Tell if a record has counts for counts and texts for texts."""
    counts = (record.seen, record.seen_alone, record.unseen, record.unseen_alone)
    return all(map(is_count, counts)) and all(isinstance(text, str) for text in (record.how, record.protein))


def write_records(output_dir: Path, records: Mapping[str, Deaths]) -> None:
    """Write the record of deaths."""
    content = {"format": 2, "units": {unit: asdict(record) for unit, record in records.items()}}
    with atomically(output_dir / RECORD) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def acquit(output_dir: Path, units: Iterable[str]) -> None:
    """Remove units that have been done from the record of deaths."""
    records = read_records(output_dir)
    done = records.keys() & set(units)
    if done:
        write_records(output_dir, {unit: record for unit, record in records.items() if unit not in done})


def forget(output_dir: Path) -> None:
    """Remove notes and record, as when a run starts over."""
    (output_dir / RECORD).unlink(missing_ok=True)
    for path in (output_dir / FOLDER).glob("*"):
        discard(path)
