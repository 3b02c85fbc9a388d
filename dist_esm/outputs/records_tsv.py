"""What is counted of every record, and what is said of those that did not come as they should."""

from __future__ import annotations

from dist_esm.types import RecordOutcome, RecordRead, Tally


def note(record: RecordRead, number: int, tally: Tally, notes: list[str]) -> None:
    """Count a record, the one of this number in its file from 1, and add a line of `NOTE_COLUMNS` if anything about it is not as it came."""
    protein, changes = record.protein, record.protein.changes
    outcome = record.outcome.name
    is_windowed = record.outcome is RecordOutcome.windowed
    tally.outcomes[outcome] = tally.outcomes.get(outcome, 0) + 1
    tally.residues += record.num_embedded
    tally.unnamed += protein.is_unnamed
    tally.nucleotides += protein.is_nucleotide and protein.skipped is None
    tally.more_chains += protein.is_continued
    tally.latin1 += protein.is_latin1
    for letter, times in protein.replaced_letters:
        tally.replaced[letter] = tally.replaced.get(letter, 0) + times
    if is_windowed:
        tally.windows += record.num_segments
    if protein.skipped:
        tally.skipped[protein.skipped] = tally.skipped.get(protein.skipped, 0) + 1
    if changes:
        for name, count in {**changes._asdict(), "records": 1}.items():
            tally.changed[name] = tally.changed.get(name, 0) + count
    remarks = [protein.skipped or ""]
    remarks += ["no id in the header"] * protein.is_unnamed + ["header read as Latin-1"] * protein.is_latin1
    remark = "; ".join(filter(None, remarks))
    if changes or remark or record.outcome is not RecordOutcome.ok:
        replaced = " ".join(f"{visible(letter)}:{times}" for letter, times in protein.replaced_letters)
        windows = record.num_segments if is_windowed else 0
        columns = (
            number,
            protein.id,
            outcome,
            protein.num_residues,
            record.num_embedded,
            windows,
            *changes,
            replaced,
            remark,
        )
        notes.append("\t".join(map(str, columns)))


def visible(letter: str) -> str:
    """Return a letter as it can stand in a table: blanks and what is not printable are escaped."""
    return letter if letter.isprintable() and letter != " " else ascii(letter)[1:-1].replace(" ", r"\x20")
