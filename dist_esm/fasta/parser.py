"""One unit of FASTA to proteins: a filter checks lines, Biopython parses, the policy puts letters right.

The filter sees every line with its number, so a file that is no FASTA fails with the line that shows it.
Biopython drops some things silently (text before the first ``>``, blanks inside a sequence): the filter
lets none of these pass. Records of PIR (NBRF) are turned into FASTA on the way: the line under ``>P1;ID``
is a description, and ``*`` ends a sequence. A protein that comes out has letters of `RESIDUES` only, and
one per-residue row for each of them.
"""

from __future__ import annotations

import re
import string
from collections.abc import Iterator
from dataclasses import replace
from itertools import islice

from Bio.SeqIO.FastaIO import SimpleFastaParser

from dist_esm.config import Config, HeaderEncoding, Long
from dist_esm.fasta.blocks import ELSEWHERE, FastaError, Tee, text_lines
from dist_esm.fasta.formats import name_of_text
from dist_esm.fasta.letters import RESIDUES, make_proteins
from dist_esm.types import Count, Protein, Slice, Unit

MAX_RESIDUES = 1_000_000
"""Letters of a record that are looked at. One that is not truncated must not have more: it is a
genome. The longest protein that is known has 45,212 residues (doi:10.1126/science.ado3290)."""

FIRST_RECORDS, FIRST_BYTES = 20, 1 << 14
"""Records, and bytes of a plain file, that `look_at_first_records` looks at."""

_CONTROL = re.compile(rb"[\x00-\x08\x0e-\x1f\x7f]")
_BRACKETED = re.compile(r"<[^<>]*>")  # such as <mask>
_OPEN_BRACKET = re.compile(r"<\s*[A-Za-z_0-9]{0,6}$")  # a token that goes on in the next line
_BLANK = re.compile(r"\s")
_LETTERS = string.ascii_letters.encode()
_PIR_HEADER = re.compile(r">(?:P1|F1|D1|DL|DC|RL|RC|N1|N3|XX);(.*)", re.DOTALL | re.IGNORECASE)
_PIR_ANNOTATION = re.compile(r"[A-Z];")


def read_proteins(unit: Unit, config: Config, tee: Tee | None = None) -> Iterator[Protein]:
    """Yield the records of a unit, in order, each either with residues or with the reason why it is skipped.

    Parameters
    ----------
    unit
        What to read.
    config
        The policies for letters, headers and lengths are looked at.
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
    lines = _Lines(unit, config, tee)
    records = SimpleFastaParser(iter(lines))
    for record_number, (header, letters) in enumerate(records, start=unit.before.sequences + 1):
        proteins = make_proteins(header, letters, record_number, config)
        if lines.remarks and (remark := lines.remarks.pop(record_number, None)):
            proteins[0] = proteins[0]._replace(is_latin1=remark.is_latin1)
            proteins[-1] = proteins[-1]._replace(num_unread=remark.num_unread)
            if remark.skipped:
                proteins = [proteins[0]._replace(residues=b"", num_unread=0, skipped=remark.skipped)]
        yield from proteins


def look_at_first_records(slice_: Slice, config: Config) -> str | None:
    """Return a warning if most of the first records of a file look like DNA or RNA, else None.

    It is a look at a few kilobytes, so that a person hears of it before the file is embedded. A file that
    cannot be read gives no warning: it fails later, with its reason.
    """
    if slice_.compression is None:
        slice_ = replace(slice_, stop=min(FIRST_BYTES, slice_.stop or FIRST_BYTES))
    unit = Unit(0, 0, slice_, Count(), Count(), is_whole=True)
    try:
        first = list(islice(read_proteins(unit, config), FIRST_RECORDS))
    except (OSError, FastaError):
        return None
    proteins = [protein for protein in first if protein.skipped is None]
    num_nucleotide = sum(protein.is_nucleotide for protein in proteins)
    if 2 * num_nucleotide <= len(proteins):
        return None
    return (
        f"looks like DNA: {num_nucleotide} of its first {len(proteins)} records; embed its proteins instead"
    )


class _Remark:
    """What the filter knows of a record and Biopython does not pass on."""

    def __init__(self) -> None:
        self.is_latin1 = False
        self.num_unread = 0
        self.skipped: str | None = None


class _Lines:
    """The header and sequence lines of a unit, checked, as Biopython is to read them.

    Inner blanks become tabs, which Biopython leaves where they are. A line that begins with a digit, or
    follows a digit, begins with a line feed, so that numbers at the ends of lines stay apart.
    """

    def __init__(self, unit: Unit, config: Config, tee: Tee | None) -> None:
        self.unit = unit
        self.tee = tee
        self.is_latin1_allowed = config.header_encoding is HeaderEncoding.auto
        limit = config.truncation_seq_length
        self.is_truncated = (
            limit is not None and limit <= MAX_RESIDUES and config.long in (Long.truncate, Long.skip)
        )
        self.remarks: dict[int, _Remark] = {}
        """By number of the record; of those that have any."""
        self._record_number = unit.before.sequences

    def __iter__(self) -> Iterator[str]:
        line_number = self.unit.before.lines
        length: int | None = None  # letters of the record so far; None: no record yet
        is_after_digit = False
        open_token = ""  # the beginning of a token that the last line ended in
        pir: list[str] | None = None  # lines of the record so far, if it is one of PIR
        pir_has_ended = False
        for raw in text_lines(self.unit.slice, self.tee):
            line_number += 1
            # Nearly every line is letters alone: there is nothing in it to check.
            if (
                raw
                and length is not None
                and not (is_after_digit or open_token or pir)
                and not raw.translate(None, _LETTERS)
            ):
                kept = raw.decode("ascii")
                length += len(raw)
                if length > MAX_RESIDUES:
                    kept = self._within_limit(kept, length, line_number)
                if kept:
                    yield kept
                continue
            is_header = raw.startswith(b">")
            if b"\0" in raw or (not is_header and _CONTROL.search(raw)):
                raise FastaError(
                    f"line {line_number} holds control characters: this is not text, so no FASTA file"
                )
            if is_header:
                if pir is not None:
                    yield from self._pir_as_fasta(pir)
                pir, pir_has_ended = None, False
                self._record_number += 1
                line = self._decode_header(raw, line_number)
                length, is_after_digit, open_token = 0, False, ""
                if _PIR_HEADER.match(line):
                    pir = [line]
                else:
                    yield line
                continue
            line = self._decode(raw, line_number).strip()
            if pir is not None and len(pir) == 1:
                pir.append(line)
                continue
            if not line or line.startswith(";"):
                continue
            if length is None:
                raise FastaError(
                    f"line {line_number} has text before the first '>' ({line[:40]!r}): "
                    + (name_of_text(line) or "this is no FASTA file, or its first header is missing")
                )
            if not pir_has_ended:
                if "\ufeff" in line or ">" in _BRACKETED.sub("", open_token + line):
                    raise FastaError(
                        f"line {line_number} has a '>' or a byte order mark inside a sequence: "
                        "a line end is missing before it, as when files are joined with cat"
                    )
                found = _OPEN_BRACKET.search(open_token + line)
                open_token = found[0] if found else ""
            length += len(line)
            if length > MAX_RESIDUES:
                line = self._within_limit(line, length, line_number)
                if not line:
                    continue
            begins_apart = is_after_digit or line[0] in string.digits or line == "//"
            is_after_digit = line[-1] in string.digits
            line = ("\n" if begins_apart else "") + _BLANK.sub("\t", line)
            if pir is None:
                yield line
            else:
                pir.append(line)
                pir_has_ended = pir_has_ended or "*" in line
        if pir is not None:
            yield from self._pir_as_fasta(pir)

    def _remark(self) -> _Remark:
        return self.remarks.setdefault(self._record_number, _Remark())

    def _decode_header(self, raw: bytes, line_number: int) -> str:
        if self.is_latin1_allowed:
            try:
                return raw.decode("utf-8")
            except UnicodeDecodeError:
                self._remark().is_latin1 = True
                return raw.decode("latin-1")
        return self._decode(raw, line_number, f"use header_encoding=auto {ELSEWHERE}, or ")

    def _decode(self, raw: bytes, line_number: int, remedy: str = "") -> str:
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise FastaError(
                f"line {line_number}, byte {error.start + 1} (0x{raw[error.start]:02x}) is not UTF-8 text: "
                f"if the file is FASTA in another encoding, {remedy}convert it, for example with "
                "iconv -f latin1 -t utf-8"
            ) from None

    def _within_limit(self, line: str, length: int, line_number: int) -> str:
        """Return what of a line is within `MAX_RESIDUES`; its record has `length` with it. Count the rest."""
        if not self.is_truncated:
            raise FastaError(
                f"the record that reaches line {line_number} has more than {MAX_RESIDUES} letters: "
                "no protein, perhaps a genome; with truncation_seq_length=1022, long=truncate embeds its "
                f"beginning, and long=skip leaves it out {ELSEWHERE}"
            )
        num_over = min(length - MAX_RESIDUES, len(line))
        self._remark().num_unread += num_over
        return line[: len(line) - num_over]

    def _pir_as_fasta(self, lines: list[str]) -> Iterator[str]:
        """Yield the lines of a record whose header is one of PIR.

        FASTA may have such a header, too: then there is no `*`, or no description above the sequence.
        """
        header, rest = lines[0], lines[1:]
        sequence = rest[1:]
        index = next((index for index, line in enumerate(sequence) if "*" in line), None)
        first_is_letters = (
            bool(rest)
            and bool(rest[0])
            and not rest[0].upper().encode("ascii", "replace").translate(None, RESIDUES + b"*")
        )
        if not rest or (first_is_letters and (index is None or rest[0].endswith("*"))):
            yield header
            yield from (line for line in rest if line)
            return
        match = _PIR_HEADER.match(header)
        assert match is not None
        yield f">{match[1].strip()} {rest[0]}".rstrip()
        if index is None:
            yield from sequence
            return
        yield from sequence[:index]
        yield sequence[index].partition("*")[0] + "*"
        behind = [
            line for line in (sequence[index].partition("*")[2], *sequence[index + 1 :]) if line.strip()
        ]
        if behind and not _PIR_ANNOTATION.match(behind[0].strip()):
            self._remark().skipped = "text behind the end of a PIR sequence"
