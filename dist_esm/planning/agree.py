"""The plan on which all ranks agree: what there is to do, and what is done already.

Looking at the inputs costs reading them, so the ranks share it. Each counts its part of the bytes, digests
its part of what the journal says is done, and checks its part of the outputs. The results are exchanged,
every rank makes the same plan of them, and digests of the plans are compared before any work.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import astuple
from pathlib import Path

from dist_esm.attempt import as_value
from dist_esm.config import Config
from dist_esm.distributed import RefusedError, World
from dist_esm.fasta.blocks import Digests, raw_blocks, text_digest, whole_file
from dist_esm.fasta.parser import look_at_first_records
from dist_esm.names import number_of_part
from dist_esm.outputs.formats.registry import FORMATS
from dist_esm.outputs.in_hand import Deaths
from dist_esm.outputs.journal import Entry, is_intact
from dist_esm.outputs.loose import is_loose
from dist_esm.outputs.output_dir import OutputDir
from dist_esm.outputs.placed import read_placed_shard
from dist_esm.planning.assign import assign_to_bins
from dist_esm.planning.layout import lay_out
from dist_esm.planning.units import CountedSlice, Plan, count_slice, cut_files, make_plan, make_units
from dist_esm.types import (
    Count,
    FastaFile,
    JoinedFile,
    LengthHistogram,
    Slice,
    Tally,
    Unit,
    UnitResult,
)

log = logging.getLogger("dist_esm")

SAME_FILES = "give all ranks the same files, and wait until a file system that lags shows them"


def agree_on_plan(
    config: Config,
    files: Sequence[FastaFile],
    entries: Sequence[Entry],
    world: World,
    deaths: Mapping[str, Deaths] | None = None,
) -> Plan:
    """Make the same plan on every rank.

    Parameters
    ----------
    config
        Checked configuration.
    files
        The inputs.
    entries
        What the journal says is done under the same settings, the oldest first.
    world
        The ranks.
    deaths
        Units whose processes died in earlier launches.

    Raises
    ------
    RefusedError
        If ranks see different inputs or journals.
    """
    agree_on_inputs(files, world)
    agree_on_journal(entries, world)
    units, remarks, lengths = count_units(config, files, world)
    if world.is_main:
        for file, remark in remarks.items():
            log.warning("%s %s", files[file].path, remark)
    done, joined = find_done(config, files, units, entries, world)
    units = lay_out(config, units, done, world)
    plan = make_plan(
        files,
        units,
        world.world_size,
        config.assign_by,
        config.model.embed_dim,
        done,
        joined,
        deaths,
        remarks,
        lengths,
    )
    # Files of the same sizes, of which ranks read other text, are cut or counted otherwise.
    (main, plan_of_main), *others = world.exchange_by_name(plan.digest())
    odd = [name for name, digest in others if digest != plan_of_main]
    if odd:
        world.agree(f"the ranks see different inputs: {main} and {odd[0]} make different plans: {SAME_FILES}")
    else:
        world.agree(None)
    return plan


def agree_on_inputs(files: Sequence[FastaFile], world: World) -> None:
    """Go on only if all ranks see the same files with the same sizes and times.

    Raises
    ------
    RefusedError
        On every rank, with the first file of which two ranks see something else.
    """
    seen = sorted((str(file.path), file.num_bytes, file.mtime_ns) for file in files)

    def is_alike(stop: int) -> bool:
        digest = hashlib.sha256(repr(seen[:stop]).encode()).hexdigest()
        return len(set(world.exchange(digest))) == 1

    alike, most = 0, max(map(int, world.exchange(str(len(seen)))))
    if is_alike(most):
        return
    while alike + 1 < most:  # the first `alike` are, the first `most` are not
        middle = (alike + most) // 2
        alike, most = (middle, most) if is_alike(middle) else (alike, middle)
    path = min(filter(None, world.exchange(seen[alike][0] if alike < len(seen) else "")))
    _, num_bytes, mtime_ns = next((file for file in seen if file[0] == path), ("", None, None))
    words = "is not there" if num_bytes is None else f"has {num_bytes} bytes"
    answers = world.exchange_by_name(words)
    if len({text for _, text in answers}) == 1:
        answers = world.exchange_by_name(f"was changed at {mtime_ns} ns")
    (main, of_main), *others = answers
    name, of_other = next((name, text) for name, text in others if text != of_main)
    seen_by_two = f"{path} {of_main} for {main} and {of_other} for {name}"
    raise RefusedError([f"the ranks see different inputs: {seen_by_two}: {SAME_FILES}"])


def agree_on_journal(entries: Sequence[Entry], world: World) -> None:
    """Go on only if all ranks read the same of what is done.

    Raises
    ------
    RefusedError
        On every rank, if one reads something else than rank 0.
    """
    digest = hashlib.sha256(repr(entries).encode()).hexdigest()
    (main, of_main), *others = world.exchange_by_name(f"{len(entries)} entries ({digest[:8]})")
    odd = [(name, text) for name, text in others if text != of_main]
    if odd:
        raise RefusedError(
            [
                f"the ranks see different journals in output_dir: {of_main} for {main}, {odd[0][1]} for "
                f"{odd[0][0]}: start it again when their file systems show the same"
            ]
        )


def agree_on_output_dir(out: OutputDir, world: World) -> None:
    """Go on only if every rank sees what rank 0 writes to the output directory.

    Raises
    ------
    RefusedError
        On every rank, if it is another directory on one of the hosts.
    """
    of_main = out.scratch.with_name(f"{out.launch:020d}.{0:05d}")
    (main, _), *others = world.exchange_by_name("" if of_main.is_dir() else "missing")
    blind = [name for name, text in others if text]
    if blind:
        raise RefusedError(
            [
                f"{blind[0]} does not see what {main} writes to output_dir={out.path}: "
                "name a directory on a file system that all hosts share"
            ]
        )


def count_units(
    config: Config, files: Sequence[FastaFile], world: World
) -> tuple[list[Unit], dict[int, str], LengthHistogram]:
    """Cut the files into units and count what is in each; every rank counts its share of the bytes.

    Returns
    -------
    list of Unit
        Of all files, in their order.
    dict of int to str
        By file, what a person should know of it before it is embedded.
    LengthHistogram
        Of all records.
    """
    max_text = FORMATS[config.format.name].max_text
    slices = cut_files(files, config.unit_share)
    sizes = [(slice_.stop or files[file].num_bytes) - slice_.start for file, slice_, _ in slices]
    keys = [(str(files[file].path), index) for index, (file, _, _) in enumerate(slices)]
    cut_into_slices = {file for file, slice_, _ in slices if slice_.stop is not None}
    own, own_remarks, own_lengths = [], {}, LengthHistogram()
    for index in sorted(assign_to_bins(sizes, keys, world.world_size)[world.rank]):
        file, slice_, unreadable = slices[index]
        if slice_.start == 0 and (remark := look_at_first_records(slice_, config)):
            own_remarks[file] = remark
        counted = [(slice_, Count())]
        if unreadable is None:
            counted, unreadable = count_slice(
                slice_,
                config.truncation_seq_length,
                config.max_proteins_per_output,
                file in cut_into_slices,
                max_text,
                own_lengths,
            )
        own += [
            (index, part.start, part.stop, part.seek, list(astuple(count)), unreadable)
            for part, count in counted
        ]
    told = world.all_gather([own, list(own_remarks.items()), own_lengths], LengthHistogram)
    everything = sorted((item for items, _, _ in told for item in items), key=lambda item: item[:2])
    remarks = {file: remark for _, pairs, _ in told for file, remark in pairs}
    lengths = LengthHistogram()
    for _, _, of_rank in told:
        lengths.merge(of_rank)
    merged: list[CountedSlice] = []
    for index, start, stop, seek, counts, unreadable in everything:
        file, slice_, _ = slices[index]
        part = Slice(slice_.path, start, stop, (seek[0], seek[1]), slice_.compression)
        merged.append((file, part, Count(*counts), unreadable))
    units = make_units(merged, config.max_proteins_per_output, max_text)
    return units, dict(sorted(remarks.items())), lengths


def find_done(
    config: Config, files: Sequence[FastaFile], units: Sequence[Unit], entries: Sequence[Entry], world: World
) -> tuple[list[UnitResult], dict[int, JoinedFile]]:
    """Find the units that are done: the same text was embedded, and the outputs are intact.

    Every rank checks its share of the entries.

    Returns
    -------
    list of UnitResult
        One for each unit that is done.
    dict of int to JoinedFile
        By file, the outputs that were joined of several units.
    """
    by_output = {str(files[unit.file].output): unit.file for unit in units}
    by_file: dict[int, list[Unit]] = {}
    for unit in units:
        by_file.setdefault(unit.file, []).append(unit)
    candidates = []
    for entry in entries:
        covered = units_covered(entry, by_file[by_output[entry.output]]) if entry.output in by_output else []
        if covered:
            candidates.append((entry, covered))
    own = range(world.rank, len(candidates), world.world_size)
    intact = [index for index in own if is_done(*candidates[index], config)]
    everything = sorted(index for share in world.all_gather(intact) for index in share)
    return newest(candidates[index] for index in everything)


def newest(
    entries: Iterable[tuple[Entry, Sequence[Unit]]],
) -> tuple[list[UnitResult], dict[int, JoinedFile]]:
    """Return what entries stand for, each with the units that it covers, the oldest first: the newest counts.

    Returns
    -------
    list of UnitResult
        One for each unit.
    dict of int to JoinedFile
        By file, the outputs that were joined of several units.
    """
    done: dict[tuple[int, int], UnitResult] = {}
    joined: dict[int, JoinedFile] = {}
    for entry, covered in entries:
        done |= {(result.file, result.ordinal): result for result in as_results(entry, covered)}
        if entry.is_joined or len(covered) > 1:
            joined[covered[0].file] = joined_file(entry)
        else:
            joined.pop(covered[0].file, None)
    return list(done.values()), joined


def as_results(entry: Entry, units: Sequence[Unit]) -> list[UnitResult]:
    """Return an entry as results of the units that it stands for.

    Of a whole file only the sum of its tallies is known: it stands with the first unit.
    """
    texts = entry.digests if is_cut_alike(entry, units) else [""] * len(units)
    sums = [(entry.tally, entry.seconds), *((Tally(), 0.0) for _ in units[1:])]
    return [
        UnitResult(unit.file, unit.ordinal, tuple(entry.written), text, tally, entry.rank, seconds)
        for unit, text, (tally, seconds) in zip(units, texts, sums, strict=False)
    ]


def results_in_journal(
    entries: Sequence[Entry], plan: Plan
) -> tuple[list[UnitResult], dict[int, JoinedFile]]:
    """Return the results that one launch's entries stand for, taken at their word.

    Returns
    -------
    list of UnitResult
        One for each unit that an entry covers.
    dict of int to JoinedFile
        By file, the outputs that were joined of several units.
    """
    by_output = {str(file.output): index for index, file in enumerate(plan.files)}
    results: list[UnitResult] = []
    joined: dict[int, JoinedFile] = {}
    for entry in entries:
        known = entry.output in by_output
        covered = units_covered(entry, plan.units_of(by_output[entry.output])) if known else []
        if covered and entry.is_joined:
            joined[covered[0].file] = joined_file(entry)
        else:
            results += as_results(entry, covered)
    return results, joined


def joined_file(entry: Entry) -> JoinedFile:
    """Return the output that an entry of joined shards stands for."""
    return JoinedFile(entry.written[0], entry.tally.duplicate_ids)


def units_covered(entry: Entry, units: Sequence[Unit]) -> list[Unit]:
    """Return the units of a file that an entry stands for.

    These are all of them, however they are cut, or the one of the same text, with as many records in front of
    it, that would be written to the same outputs, or none.
    """
    if is_of_whole_file(entry) and units[0].first_part is None:
        return list(units)
    return [
        unit
        for unit in units
        if is_cut_alike(entry, [unit])
        and entry.before in (None, unit.before.sequences)
        and unit.unreadable is None
        and is_named_alike(entry, unit, unit.ordinal == len(units) - 1)
    ]


def is_named_alike(entry: Entry, unit: Unit, is_last: bool) -> bool:
    """Tell if an entry's outputs have the names of those that a unit would write.

    Of a file in numbered parts they have not, if it was cut in other places before the unit: then another
    unit writes to these names.
    """
    if entry.is_shard or unit.is_shard:
        return entry.is_shard and unit.is_shard
    numbers = [number_of_part(written.path) for written in entry.written]
    if unit.first_part is None:
        return numbers == [None]
    first = unit.first_part + 1
    return numbers == list(range(first, first + len(numbers))) and entry.is_last in (None, is_last)


def is_of_whole_file(entry: Entry) -> bool:
    """Tell if an entry stands for the one output of a file."""
    return len(entry.written) == 1 and (entry.is_joined or entry.slices == [(0, None)])


def is_cut_alike(entry: Entry, units: Sequence[Unit]) -> bool:
    """Tell if an entry covers the text of units slice by slice."""
    return entry.slices == [(unit.slice.start, unit.slice.stop) for unit in units]


def is_done(entry: Entry, units: Sequence[Unit], config: Config) -> bool:
    """Tell if the inputs have the text that was embedded, and the outputs the bytes that were written."""
    # Of shards that were joined since, the outputs are gone: then there is no need to read the text.
    if not all((config.output_dir / output.path).exists() for output in entry.written):
        return False
    if as_value(digests_now, entry, units) != entry.digests or not is_intact(entry, config.output_dir):
        return False
    return not entry.is_shard or are_numbers_intact(config.output_dir / entry.written[0].path)


def are_numbers_intact(path: Path) -> bool:
    """Tell if the numbers of a shard, whose own file is intact, are in their places."""
    if is_loose(path):
        return True
    shard = as_value(read_placed_shard, path)
    return not isinstance(shard, Exception) and (shard is None or shard.is_intact())


def digests_now(entry: Entry, units: Sequence[Unit]) -> list[str]:
    """Return the digests of an entry's slices of the text as it is now; [] if it has become longer."""
    if is_cut_alike(entry, units):
        return [text_digest(unit.slice) for unit in units]
    digests = Digests(entry.slices)
    for _ in raw_blocks(whole_file(units[0].slice.path), digests.update):
        pass
    is_all = entry.slices[-1][1] in (None, digests.num_bytes)
    return digests.hexdigests() if is_all else []
