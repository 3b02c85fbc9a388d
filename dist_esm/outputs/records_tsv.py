"""What is counted of every record, and what is said of those that did not come as they should."""

from __future__ import annotations

from dist_esm.types import RecordOutcome, RecordRead, Tally


def count_record(record: RecordRead, number: int, tally: Tally, notes: list[str]) -> None:
    """Count a record, the one of this number in its file from 1, and add a line of `NOTE_COLUMNS` if anything about it is not as it came."""
    protein, changes = record.protein, record.protein.changes
    outcome = record.outcome.name
    is_windowed = record.outcome is RecordOutcome.windowed
    tally.outcomes[outcome] = tally.outcomes.get(outcome, 0) + 1
    tally.residues += record.num_embedded
    tally.unnamed += protein.is_unnamed
    if is_windowed:
        tally.windows += record.num_segments
    if protein.skipped:
        tally.skipped[protein.skipped] = tally.skipped.get(protein.skipped, 0) + 1
    if changes:
        for name, count in {**changes._asdict(), "records": 1}.items():
            tally.changed[name] = tally.changed.get(name, 0) + count
    if changes or protein.is_unnamed or record.outcome is not RecordOutcome.ok:
        remark = protein.skipped or ("no id in the header" if protein.is_unnamed else "")
        windows = record.num_segments if is_windowed else 0
        columns = (
            number,
            protein.id,
            outcome,
            len(protein.residues),
            record.num_embedded,
            windows,
            *changes,
            remark,
        )
        notes.append("\t".join(map(str, columns)))
