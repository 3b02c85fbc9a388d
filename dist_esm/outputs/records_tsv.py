"""An output's ``.records.tsv``: a line for each record that did not come as it should, and the counts of
all."""

from __future__ import annotations

from dist_esm.names import printable
from dist_esm.types import RecordOutcome, RecordRead, Tally


def count_record(record: RecordRead, tally: Tally) -> None:
    """Count a record, whatever became of it."""
    protein = record.protein
    tally.outcomes[record.outcome.name] = tally.outcomes.get(record.outcome.name, 0) + 1
    tally.residues += record.num_embedded
    tally.unnamed += protein.is_unnamed
    tally.nucleotides += protein.is_nucleotide and protein.skipped is None
    tally.more_chains += protein.is_continued
    tally.latin1 += protein.is_latin1
    for letter, times in protein.replaced_letters:
        tally.replaced[letter] = tally.replaced.get(letter, 0) + times
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
    remarks = [protein.skipped or ""]
    remarks += ["no id in the header"] * protein.is_unnamed + ["header read as Latin-1"] * protein.is_latin1
    remark = "; ".join(filter(None, remarks))
    if record.outcome is RecordOutcome.ok and not protein.changes and not remark:
        return None
    replaced = " ".join(f"{visible(letter)}:{times}" for letter, times in protein.replaced_letters)
    windows = record.num_segments if record.outcome is RecordOutcome.windowed else 0
    columns = (
        place,
        printable(protein.id),
        record.outcome.name,
        protein.num_residues,
        record.num_embedded,
        windows,
        *protein.changes,
        replaced,
        printable(remark),
    )
    return "\t".join(map(str, columns))


def visible(letter: str) -> str:
    """Return a letter as it can stand in a table: blanks and what is not printable are escaped."""
    return letter if letter.isprintable() and letter != " " else ascii(letter)[1:-1].replace(" ", r"\x20")
