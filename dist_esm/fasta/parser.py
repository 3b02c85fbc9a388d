"""One unit of FASTA to proteins: a filter checks lines, Biopython parses, the policy puts letters right.

The filter sees every line with its number, so a file that is no FASTA fails with the line that shows it.
Biopython drops some things silently (text before the first ``>``, blanks inside a sequence): the filter
lets none of these pass. A protein that comes out has letters of `RESIDUES` only, and one per-residue row
for each of them.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator

from Bio.SeqIO.FastaIO import SimpleFastaParser

from dist_esm.config import ResidueConfig
from dist_esm.fasta.blocks import FastaError, Tee, text_lines
from dist_esm.fasta.letters import make_protein
from dist_esm.types import Protein, Unit

MAX_RESIDUES = 1_000_000
"""A longer record is no protein, most often a genome. The longest protein that is known has 45,212 residues
(doi:10.1126/science.ado3290)."""

_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")
_BRACKETED = re.compile(r"<[^<>]*>")  # such as <mask>: unknown letters like others
_BLANK = re.compile(r"\s")
_LETTERS = string.ascii_letters.encode()


def read_proteins(unit: Unit, policy: ResidueConfig, tee: Tee | None = None) -> Iterator[Protein]:
    """Yield the records of a unit, in order, each either with residues or with the reason why it is skipped.

    Parameters
    ----------
    unit
        What to read.
    policy
        ``residues.*`` of the configuration.
    tee
        Called with each block of the unit's text, for example `update` of a hash.

    Raises
    ------
    FastaError
        If the file is no FASTA, is not text, is cut off, or has a letter that the policy does not let pass.
    OSError
        If the file cannot be read.
    """
    if unit.unreadable:
        raise FastaError(unit.unreadable)
    records = SimpleFastaParser(_checked_lines(unit, tee))
    for record_number, (header, letters) in enumerate(records, start=unit.before.sequences + 1):
        yield make_protein(header, letters, record_number, policy)


def _checked_lines(unit: Unit, tee: Tee | None) -> Iterator[str]:
    """Yield the header and sequence lines of a unit, fit for Biopython; inner blanks become `?`."""
    line_number = unit.before.lines
    length: int | None = None  # letters of the record so far; None: no record yet
    for raw in text_lines(unit.slice, tee):
        line_number += 1
        # Nearly every line is letters alone: there is nothing in it to check.
        if raw and length is not None and not raw.translate(None, _LETTERS):
            length = _longer(length, len(raw), line_number)
            yield raw.decode("ascii")
            continue
        is_header = raw.startswith(b">")
        if b"\0" in raw or (not is_header and _CONTROL.search(raw)):
            raise FastaError(
                f"line {line_number} holds control characters: this is not text, so no FASTA file"
            )
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FastaError(
                f"line {line_number}, byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8 text: "
                "if the file is FASTA in another encoding, convert it, for example with "
                "iconv -f latin1 -t utf-8"
            ) from None
        if is_header:
            length = 0
            yield line
            continue
        line = line.strip()
        if not line or line.startswith(";"):
            continue
        if length is None:
            raise FastaError(
                f"line {line_number} has text before the first '>' ({line[:40]!r}): "
                "this is no FASTA file, or its first header is missing"
            )
        if "\ufeff" in line or ">" in _BRACKETED.sub("", line):
            raise FastaError(
                f"line {line_number} has a '>' or a byte order mark inside a sequence: "
                "a line end is missing before it, as when files are joined with cat"
            )
        length = _longer(length, len(line), line_number)
        yield _BLANK.sub("?", line)


def _longer(length: int, more: int, line_number: int) -> int:
    """Return the length of a record with one more line; a FastaError if it is too long for a protein."""
    if length + more > MAX_RESIDUES:
        raise FastaError(
            f"the record that reaches line {line_number} has more than {MAX_RESIDUES} letters: "
            "no protein, perhaps a genome"
        )
    return length + more
