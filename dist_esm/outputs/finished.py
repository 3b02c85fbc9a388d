"""Input files that the journal has as finished: for each, once, the entries whose outputs hold it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from dist_esm.names import number_of_part
from dist_esm.outputs.journal import Entry
from dist_esm.types import WrittenFile


@dataclass(frozen=True)
class FinishedFile:
    """An input file whose text is embedded from its beginning to its end."""

    entries: tuple[Entry, ...]
    """In the order of the text: one, or one for each unit of a file in numbered parts."""

    @property
    def output(self) -> str:
        """Relative to `output_dir`, without suffix."""
        return self.entries[0].output

    @property
    def source(self) -> str:
        """The input's path relative to the common root of the inputs."""
        return self.entries[0].source

    @property
    def written(self) -> list[WrittenFile]:
        """Its outputs, in order."""
        return [written for entry in self.entries for written in entry.written]

    @property
    def num_sequences(self) -> int:
        """Records, whatever became of them."""
        return sum(entry.tally.sequences for entry in self.entries)


def finished_files(entries: Iterable[Entry]) -> dict[str, FinishedFile]:
    """Find the files that are finished, by output, in the order of their sources.

    A file that was embedded anew counts as it was embedded last. One whose parts are not all there, or were
    partly written over by a launch that did not come to its end, is not finished. Shards never count.

    Parameters
    ----------
    entries
        The journal's, the oldest first.
    """
    by_output: dict[str, list[Entry]] = {}
    for entry in entries:
        if not entry.is_shard:
            by_output.setdefault(entry.output, []).append(entry)
    files = filter(None, map(_finished_file, by_output.values()))
    return {file.output: file for file in sorted(files, key=lambda file: (file.source, file.output))}


def _finished_file(entries: Sequence[Entry]) -> FinishedFile | None:
    """The newest entries of one file that cover its text, unless something newer is under their names."""
    newest = {
        written.path: (place, written) for place, entry in enumerate(entries) for written in entry.written
    }
    whole = [(place,) for place, entry in enumerate(entries) if entry.is_whole]
    parts = _parts(entries)
    for places in sorted([*whole, *([parts] if parts else [])], key=max, reverse=True):
        written = [written for place in places for written in entries[place].written]
        if all(newest[file.path][1] == file for file in written):
            return FinishedFile(tuple(entries[place] for place in places))
    return None


def _parts(entries: Sequence[Entry]) -> tuple[int, ...] | None:
    """Places of the newest entries whose parts and slices follow one another from the beginning of the text
    to its end; None if there is a gap."""
    by_number = {
        number_of_part(entry.written[0].path): place
        for place, entry in enumerate(entries)
        if not entry.is_whole
    }
    places: list[int] = []
    number, start = 1, 0
    while number in by_number and entries[by_number[number]].slices[0][0] == start:
        places.append(by_number.pop(number))
        last = entries[places[-1]]
        if last.is_last:
            return tuple(places)
        number += len(last.written)
        start = last.slices[-1][1] or 0
    # Version 1 does not say which part is the last: there it is the one that none follows.
    return tuple(places) if places and entries[places[-1]].is_last is None else None
