"""An output's ``.records.tsv``: a line for each record that did not come as it should, and the counts of
all."""

from __future__ import annotations

from dist_esm.types import RecordOutcome, RecordRead, Tally


def count_record(record: RecordRead, tally: Tally) -> None:
    """Count a record, whatever became of it."""
    protein = record.protein
    tally.outcomes[record.outcome.name] = tally.outcomes.get(record.outcome.name, 0) + 1
    tally.residues += record.num_embedded
    tally.unnamed += protein.is_unnamed
    if record.outcome is RecordOutcome.windowed:
        tally.windows += record.num_segments
    if protein.skipped:
        tally.skipped[protein.skipped] = tally.skipped.get(protein.skipped, 0) + 1
    if protein.changes:
        for name, count in {**protein.changes._asdict(), "records": 1}.items():
            tally.changed[name] = tally.changed.get(name, 0) + count


def tsv_line(record: RecordRead, place: int) -> str | None:
    """Return the line of a record; None if nothing about it deserves one.

    Parameters
    ----------
    record
        As it was read.
    place
        Of the record in its file, from 1.

    Returns
    -------
    str or None
        The columns of `NOTE_COLUMNS`, without a line end. None for a record that was embedded whole and as it
        came.
    """
    protein = record.protein
    if record.outcome is RecordOutcome.ok and not protein.changes and not protein.is_unnamed:
        return None
    remark = protein.skipped or ("no id in the header" if protein.is_unnamed else "")
    windows = record.num_segments if record.outcome is RecordOutcome.windowed else 0
    columns = (
        place,
        protein.id,
        record.outcome.name,
        len(protein.residues),
        record.num_embedded,
        windows,
        *protein.changes,
        remark,
    )
    return "\t".join(map(str, columns))
