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
    newest = {written.path: written for entry in entries for written in entry.written}
    there = [
        place
        for place, entry in enumerate(entries)
        if all(newest[written.path] == written for written in entry.written)
    ]
    whole = [(place,) for place in there if entries[place].is_whole]
    parts = _parts(entries, [place for place in there if not entries[place].is_whole])
    places = max([*whole, *([parts] if parts else [])], key=max, default=())
    return FinishedFile(tuple(entries[place] for place in places)) if places else None


def _parts(entries: Sequence[Entry], places: Sequence[int]) -> tuple[int, ...] | None:
    """Places of entries whose parts and slices follow one another from the beginning of the text to its end,
    the newest where there is a choice; None if there is a gap."""
    by_begin: dict[tuple[int | None, int], list[int]] = {}
    """Number of the first part and start of the text, to places. What follows does not depend on what came
    before, so each begin is looked at once."""
    for place in places:
        begin = number_of_part(entries[place].written[0].path), entries[place].slices[0][0]
        by_begin.setdefault(begin, []).append(place)
    found: list[int] = []
    choices = [by_begin.pop((1, 0), [])]
    while choices:
        if not choices[-1]:
            choices.pop()
            del found[-1:]
            continue
        found.append(choices[-1].pop())
        last = entries[found[-1]]
        number = (number_of_part(last.written[0].path) or 0) + len(last.written)
        choices.append(by_begin.pop((number, last.slices[-1][1] or 0), []))
        # Version 1 does not say which part is the last: there it is the one that none follows.
        if last.is_last or (last.is_last is None and not choices[-1]):
            return tuple(found)
    return None
