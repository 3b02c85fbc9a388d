"""One unit of FASTA to proteins: Biopython parses, a filter in front of it checks, a policy behind it puts letters right.

The filter sees every line with its number, so a file that is no FASTA fails with the line that shows it, and nothing that
Biopython would drop silently (text before the first ``>``, blanks inside a sequence) reaches it unnoticed. Whatever comes
through has letters of `RESIDUES` only, and one per-residue row for each of them.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator

from Bio.SeqIO.FastaIO import SimpleFastaParser

from dist_esm.config import ResidueConfig
from dist_esm.fasta.blocks import FastaError, Tee, lines
from dist_esm.fasta.letters import make_protein
from dist_esm.types import Protein, Unit

MAX_RESIDUES = 1_000_000
"""A longer record is no protein (the longest known has 45,212 residues, doi:10.1126/science.ado3290): most often a genome."""

_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")
_BRACKETED = re.compile(
    r"<[^<>]*>"
)  # such as <mask>, which has no special meaning: unknown letters like others
_BLANK = re.compile(r"\s")
_LETTERS = string.ascii_letters.encode()


def read_proteins(unit: Unit, policy: ResidueConfig, tee: Tee | None = None) -> Iterator[Protein]:
    """The records of a unit, in order, each either with residues or with the reason why it is skipped.

    Each block of the unit's text is passed to `tee`, too, for whoever wants a digest.

    Raises
    ------
    FastaError
        If the file is no FASTA, is not text, is cut off, or has a letter that the policy does not let pass.
    OSError
        If the file cannot be read.
    """
    if unit.unreadable:
        raise FastaError(unit.unreadable)
    for number, (header, letters) in enumerate(
        SimpleFastaParser(_checked_lines(unit, tee)), start=unit.before.sequences + 1
    ):
        yield make_protein(header, letters, number, policy)


def _checked_lines(unit: Unit, tee: Tee | None) -> Iterator[str]:
    """The header and sequence lines of a unit, fit for Biopython; blanks inside a sequence line come as `?`."""
    number = unit.before.lines
    length: int | None = None  # residues of the record so far; None: no record yet
    for raw in lines(unit.slice, tee):
        number += 1
        if (
            raw and length is not None and not raw.translate(None, _LETTERS)
        ):  # nearly every line: there is nothing in it to check
            length = _longer(length, len(raw), number)
            yield raw.decode("ascii")
            continue
        is_header = raw.startswith(b">")
        if b"\0" in raw or (not is_header and _CONTROL.search(raw)):
            raise FastaError(f"line {number} holds control characters: this is not text, so no FASTA file")
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FastaError(
                f"line {number}, byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8 text: "
                f"if the file is FASTA in another encoding, convert it, for example with iconv -f latin1 -t utf-8"
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
                f"line {number} has text before the first '>' ({line[:40]!r}): this is no FASTA file, or its first header is missing"
            )
        if "\ufeff" in line or ">" in _BRACKETED.sub("", line):
            raise FastaError(
                f"line {number} has a '>' or a byte order mark inside a sequence: a line end is missing before it, as when files are joined with cat"
            )
        length = _longer(length, len(line), number)
        yield _BLANK.sub("?", line)


def _longer(length: int, more: int, number: int) -> int:
    """The length of a record with the line of this number."""
    if length + more > MAX_RESIDUES:
        raise FastaError(
            f"the record that reaches line {number} has more than {MAX_RESIDUES} letters: no protein, perhaps a genome"
        )
    return length + more
