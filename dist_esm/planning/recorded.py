"""A plan as a launch's record keeps it, so that a report can be made of the output directory alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dist_esm.outputs.journal import Entry
from dist_esm.outputs.launches import LaunchInput
from dist_esm.planning.agree import newest, units_covered
from dist_esm.planning.units import Plan
from dist_esm.types import Count, Failure, FastaFile, Slice, Unit, UnitFailure

UNIT_FIELDS = 7


def record_of(plan: Plan) -> dict[str, Any]:
    """Return what has to be kept of a plan, beside its inputs, as JSON can hold it.

    Of each unit: its file, where its slice starts and stops, its records and residues, the number of its
    first part, and whether an earlier launch had done it.
    """
    done = {(result.file, result.ordinal) for result in plan.done}
    units = [
        [
            unit.file,
            unit.slice.start,
            unit.slice.stop,
            unit.count.sequences,
            unit.count.residues,
            unit.first_part,
            (unit.file, unit.ordinal) in done,
        ]
        for unit in plan.units
    ]
    return {"units": units, "quarantined": [asdict(failure) for failure in plan.quarantined]}


def plan_of(record: Mapping[str, Any], inputs: Sequence[LaunchInput], earlier: Sequence[Entry]) -> Plan:
    """Make the plan of a launch again, as far as its report needs it: without bins and costs.

    Parameters
    ----------
    record
        What `record_of` made.
    inputs
        Of the launch.
    earlier
        The journal's entries of earlier launches whose outputs are there, the oldest first, taken at their
        word.

    Raises
    ------
    KeyError, IndexError, TypeError, AttributeError
        If it is no record of a plan.
    """
    files = tuple(FastaFile(Path(item.path), Path(item.output), 0, 0, item.source) for item in inputs)
    by_file: dict[int, list[list[Any]]] = {}
    for row in record["units"]:
        if len(row) != UNIT_FIELDS:
            raise TypeError(f"a unit has {len(row)} fields")
        by_file.setdefault(row[0], []).append(row)
    units, was_done = [], set()
    for file, rows in by_file.items():
        before = Count()
        for ordinal, (_, start, stop, sequences, residues, first_part, is_done) in enumerate(rows):
            count = Count(sequences=sequences, residues=residues)
            slice_ = Slice(files[file].path, start, stop)
            units.append(Unit(file, ordinal, slice_, count, before, len(rows) == 1, first_part))
            before += count
            if is_done:
                was_done.add((file, ordinal))
    plan = Plan(files, tuple(units), ())
    places = {str(file.output): index for index, file in enumerate(files)}
    known = [
        (entry, units_covered(entry, plan.units_of(places[entry.output])))
        for entry in earlier
        if entry.output in places
    ]
    results, joined = newest((entry, covered) for entry, covered in known if covered)
    quarantined = tuple(
        UnitFailure(**{**item, "failure": Failure(**item["failure"])}) for item in record["quarantined"]
    )
    return Plan(
        files,
        tuple(units),
        (),
        tuple(result for result in results if (result.file, result.ordinal) in was_done),
        {file: output for file, output in joined.items() if (file, 0) in was_done},
        quarantined=quarantined,
    )
