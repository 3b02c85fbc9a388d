"""What there is to do and what is done already, found out by all ranks together.

Looking at the inputs costs reading them, so the ranks share it: each counts its part of the bytes, digests its part of what the
journal says is done, and checks its part of the outputs; the findings are exchanged, every rank makes the same plan of them, and
digests of the plans are compared before any work.
"""

from __future__ import annotations

import json
from collections.abc import Sequence

from dist_esm.attempt import as_value
from dist_esm.config import Config
from dist_esm.distributed import World
from dist_esm.fasta.blocks import Digests, digest, raw_blocks, whole
from dist_esm.outputs.journal import Entry, is_intact
from dist_esm.planning.assign import assign
from dist_esm.planning.units import Plan, count_slice, cut_files, make_plan, make_units
from dist_esm.types import Count, FastaFile, JoinedFile, Slice, Tally, Unit, UnitResult


def agree_on_plan(
    config: Config, files: Sequence[FastaFile], world: World, entries: Sequence[Entry] = ()
) -> Plan:
    """The same plan on every rank.

    Parameters
    ----------
    config
        Checked configuration.
    files
        The inputs.
    world
        The ranks.
    entries
        What the journal says is done under the same settings, the oldest first.

    Raises
    ------
    RefusedError
        If ranks see different inputs.
    """
    units = count_together(config, files, world)
    done, joined = check_together(config, files, units, entries, world)
    plan = make_plan(files, units, world.world_size, config.assign_by, config.model.embed_dim, done, joined)
    seen = world.exchange(
        f"{plan.digest()} ({len(plan.files)} files, {sum(file.num_bytes for file in plan.files)} bytes)"
    )
    odd = [f"rank {rank} sees {text}" for rank, text in enumerate(seen) if text != seen[0]]
    world.agree(
        f"the ranks see different inputs: rank 0 sees {seen[0]}, {', '.join(odd)}: give all ranks the same files"
        if odd
        else None
    )
    return plan


def count_together(config: Config, files: Sequence[FastaFile], world: World) -> list[Unit]:
    """Cut the files and count what is in each slice; every rank counts its share of the bytes."""
    slices = cut_files(files, config.unit_share)
    sizes = [(piece.stop or files[number].num_bytes) - piece.start for number, piece, _ in slices]
    keys = [(str(files[number].path), index) for index, (number, _, _) in enumerate(slices)]
    is_cut = {number for number, piece, _ in slices if piece.stop is not None}
    counted = []
    for index in sorted(assign(sizes, keys, world.world_size)[world.rank]):
        number, piece, problem = slices[index]
        found, unreadable = [(piece, Count())], problem
        if problem is None:
            found, unreadable = count_slice(
                piece, config.truncation_seq_length, config.max_proteins_per_output, number in is_cut
            )
        counted += [
            (index, one.start, one.stop, one.seek, (n.sequences, n.residues, n.squares, n.lines), unreadable)
            for one, n in found
        ]
    everything = sorted(
        (entry for text in world.exchange(json.dumps(counted)) for entry in json.loads(text)),
        key=lambda entry: entry[:2],
    )
    merged = []
    for index, start, stop, seek, numbers, unreadable in everything:
        number, piece, _ = slices[index]
        merged.append(
            (
                number,
                Slice(piece.path, start, stop, (seek[0], seek[1]), piece.is_gzip),
                Count(*numbers),
                unreadable,
            )
        )
    return make_units(merged, config.max_proteins_per_output)


def check_together(
    config: Config, files: Sequence[FastaFile], units: Sequence[Unit], entries: Sequence[Entry], world: World
) -> tuple[list[UnitResult], dict[int, JoinedFile]]:
    """Which units are done: the same text was embedded, and its outputs are intact. Every rank checks its share.

    Returns
    -------
    results of the units that are done, and the outputs of files whose pieces were joined
    """
    by_output = {str(files[unit.file].output): unit.file for unit in units}
    by_file: dict[int, list[Unit]] = {}
    for unit in units:
        by_file.setdefault(unit.file, []).append(unit)
    candidates = []
    for entry in entries:
        same = covered(entry, by_file[by_output[entry.output]]) if entry.output in by_output else []
        if same:
            candidates.append((entry, same))
    mine = range(world.rank, len(candidates), world.world_size)
    good = [index for index in mine if is_done(*candidates[index], config)]
    found = sorted(index for text in world.exchange(json.dumps(good)) for index in json.loads(text))
    done: dict[tuple[int, int], UnitResult] = {}
    joined: dict[int, JoinedFile] = {}
    for entry, same in (candidates[index] for index in found):
        done |= {(result.file, result.ordinal): result for result in as_results(entry, same)}
        if entry.is_joined or len(same) > 1:
            joined[same[0].file] = joined_file(entry)
        else:
            joined.pop(same[0].file, None)
    return list(done.values()), joined


def as_results(entry: Entry, units: Sequence[Unit]) -> list[UnitResult]:
    """An entry as the results of the units that it stands for. Of a whole file only the sum is known: it stands with the first."""
    texts = entry.digests if is_cut_alike(entry, units) else [""] * len(units)
    sums = [(entry.tally, entry.seconds), *((Tally(), 0.0) for _ in units[1:])]
    return [
        UnitResult(unit.file, unit.ordinal, tuple(entry.written), text, tally, entry.rank, seconds)
        for unit, text, (tally, seconds) in zip(units, texts, sums, strict=False)
    ]


def since(entries: Sequence[Entry], plan: Plan) -> tuple[list[UnitResult], dict[int, JoinedFile]]:
    """What one launch's entries stand for, taken at their word: results of units, and outputs of files whose pieces were joined."""
    by_output = {str(file.output): number for number, file in enumerate(plan.files)}
    results: list[UnitResult] = []
    joined: dict[int, JoinedFile] = {}
    for entry in entries:
        same = covered(entry, plan.units_of(by_output[entry.output])) if entry.output in by_output else []
        if same and entry.is_joined:
            joined[same[0].file] = joined_file(entry)
        else:
            results += as_results(entry, same)
    return results, joined


def joined_file(entry: Entry) -> JoinedFile:
    """The output that an entry of joined pieces stands for."""
    return JoinedFile(entry.written[0], entry.tally.duplicate_ids)


def covered(entry: Entry, units: Sequence[Unit]) -> list[Unit]:
    """The units of a file that an entry stands for: all of them, however they are cut, or the one of the same text; [] if there is none."""
    if is_of_whole_file(entry) and units[0].first_part is None:
        return list(units)
    return [unit for unit in units if is_cut_alike(entry, [unit]) and unit.unreadable is None]


def is_of_whole_file(entry: Entry) -> bool:
    """Whether an entry stands for the one output of a file."""
    return len(entry.written) == 1 and (entry.is_joined or entry.slices == [(0, None)])


def is_cut_alike(entry: Entry, units: Sequence[Unit]) -> bool:
    """Whether an entry covers the text of units slice by slice."""
    return entry.slices == [(unit.slice.start, unit.slice.stop) for unit in units]


def is_done(entry: Entry, units: Sequence[Unit], config: Config) -> bool:
    """Whether the inputs have the text that was embedded, and the outputs the bytes that were written."""
    if not all(
        (config.output_dir / one.path).exists() for one in entry.written
    ):  # pieces that were joined: no need to read their text
        return False
    return as_value(digests, entry, units) == entry.digests and is_intact(entry, config.output_dir)


def digests(entry: Entry, units: Sequence[Unit]) -> list[str]:
    """What the digests of an entry would be today, given the units that it stands for."""
    if is_cut_alike(entry, units):
        return [digest(unit.slice) for unit in units]
    seen = Digests(entry.slices)
    for _ in raw_blocks(whole(units[0].slice.path), seen.update):
        pass
    is_all = entry.slices[-1][1] in (None, seen.num_bytes)
    return seen.hexdigests() if is_all else []
