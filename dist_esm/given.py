"""Proteins as a program has them: lists, dicts, pairs, records of Biopython or a FASTA file.

They go through the same policies for letters and lengths as files do. What a file would list as skipped is an
error here, since the caller counts on an answer for each.
"""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dist_esm.config import Config
from dist_esm.fasta.blocks import ELSEWHERE, FastaError, whole_file
from dist_esm.fasta.formats import SUFFIXES as PACKED
from dist_esm.fasta.letters import make_proteins
from dist_esm.fasta.parser import MAX_RESIDUES, read_proteins
from dist_esm.fasta.segments import Span, apply_length_policy
from dist_esm.planning.inputs import SUFFIXES
from dist_esm.types import Count, Protein, RecordOutcome, Unit

KINDS = (
    "a list of sequences, a dict of id to sequence, pairs of id and sequence, records of Biopython, "
    "or the path of a FASTA file"
)
_BRACKETED = re.compile(r"<[^<>]*>")  # such as <mask>
_BEGINS_AS_PATH = re.compile(r"(?:[/\\~]|\.{1,2}[/\\]|[A-Za-z]:[/\\])")
MOST_NAMED = 5
"""Proteins that a warning names."""
_ID_DIGITS = 1 / 3
"""A word of which so much is digits is an id; lines of sequences may be numbered."""


class GivenProtein(NamedTuple):
    """A protein that is to be embedded."""

    id: str
    residues: bytes
    spans: list[Span]
    """Its segments."""
    outcome: RecordOutcome
    """ok, truncated or windowed."""
    protein: Protein
    """As the policy for letters left it."""


def read_given(sequences: Any, config: Config) -> list[GivenProtein]:
    """Read what a program gave.

    Parameters
    ----------
    sequences
        As for `Embedder.embed`.
    config
        The policies for letters and lengths.

    Raises
    ------
    ValueError
        If it is something else, is no FASTA, or one of its proteins would get no embedding; the message names
        it by its place, from 0, and its id.
    """
    path = path_of(sequences)
    if path is not None:
        return list(read_path(path, config))
    return [
        make_given(place, name, letters, config)
        for place, (name, letters) in enumerate(named_letters(sequences))
    ]


def path_of(sequences: Any) -> Path | None:
    """Return the path that was given; None if it is something else.

    Raises
    ------
    ValueError
        If it is text that names no file, or a path of something that is no file.
    """
    if not isinstance(sequences, (str, os.PathLike)):
        return None
    text = os.fspath(sequences)
    if isinstance(text, bytes):
        text = os.fsdecode(text)
    path = Path(text).expanduser()
    is_path = isinstance(sequences, os.PathLike) or looks_like_path(text)
    if path_exists(path):
        if path.is_dir():
            raise ValueError(f"{path} is a folder: embed_file embeds the FASTA files in it")
        return path
    if is_path:
        raise ValueError(f"{path} is not there: name an existing FASTA file")
    raise ValueError(f"sequences is one string, and no file has that name: pass {KINDS}")


def path_exists(path: Path) -> bool:
    """Tell whether something has this name; a long sequence is no name."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def looks_like_path(text: str) -> bool:
    """Tell whether text is written as a path is, and no sequence is.

    Examples
    --------
    >>> looks_like_path("x.fasta"), looks_like_path("/data/x"), looks_like_path("MKT.AY-K*")
    (True, True, False)
    """
    name = text.strip().lower()
    stem = name.removesuffix(next((suffix for suffix in PACKED if name.endswith(suffix)), ""))
    return "\n" not in name and bool(stem.endswith(SUFFIXES) or _BEGINS_AS_PATH.match(name))


def read_path(path: Path, config: Config) -> Iterator[GivenProtein]:
    """Read a FASTA file.

    Raises
    ------
    ValueError
        If it is none, or a record in it would get no embedding.
    """
    try:
        unit = Unit(0, 0, whole_file(path), Count(), Count(), is_whole=True)
        for place, protein in enumerate(read_proteins(unit, config)):
            yield apply_policies(protein, f"record {place + 1} ({protein.id})", config)
    except FastaError as error:
        raise FastaError(f"{path}: {without_remedy_of_runs(error)}") from None


def without_remedy_of_runs(error: FastaError) -> str:
    """Return a message without the hint that is for the outputs of a run."""
    return str(error).replace(f" {ELSEWHERE}", "")


def named_letters(sequences: Any) -> Iterator[tuple[str | None, str]]:
    """Give the id, None if it has none, and the letters of each protein.

    Raises
    ------
    ValueError
        If something is no protein.
    """
    if is_record(sequences) or is_seq(sequences) or isinstance(sequences, (bytes, bytearray)):
        raise ValueError(f"sequences is one {type(sequences).__name__}: pass {KINDS}")
    if hasattr(sequences, "columns"):
        raise ValueError(
            "sequences is a data frame: pass the pairs of two of its columns, zip(frame.id, frame.sequence)"
        )
    if isinstance(sequences, Mapping):
        for name, value in sequences.items():
            yield text_of_id(name), letters_of(value, f"the sequence of {name!r}")
        return
    if not isinstance(sequences, Iterable):
        raise ValueError(f"sequences is a {type(sequences).__name__}: pass {KINDS}")
    for place, item in enumerate(sequences):
        if isinstance(item, (tuple, list)):
            if len(item) != 2:
                raise ValueError(
                    f"sequence {place} is a {type(item).__name__} of {len(item)}: pass pairs (id, sequence)"
                )
            name, value = item
            yield text_of_id(name), letters_of(value, f"the sequence of {name!r}")
        elif is_record(item):
            yield text_of_id(item.id), letters_of(item, f"the record {item.id!r}")
        else:
            yield None, letters_of(item, f"sequence {place}")


def is_record(item: Any) -> bool:
    """Tell whether something is a record of Biopython."""
    return hasattr(item, "seq") and hasattr(item, "id")


def is_seq(item: Any) -> bool:
    """Tell whether something is a sequence of Biopython."""
    return type(item).__module__ == "Bio.Seq"


def text_of_id(name: Any) -> str:
    """Return an id as text.

    Raises
    ------
    ValueError
        If it is neither text nor a whole number.
    """
    if isinstance(name, bool) or not isinstance(name, (str, int)):
        raise ValueError(f"{name!r} is no id: use text")
    return str(name)


def letters_of(value: Any, what: str) -> str:
    """Return the letters of a sequence.

    Parameters
    ----------
    value
        Text, or a sequence or record of Biopython.
    what
        Names it in messages.

    Raises
    ------
    ValueError
        If it is something else: a path, an id, text in FASTA.
    """
    if is_record(value):
        value = value.seq
    if is_seq(value):
        try:
            value = str(value)
        except ValueError:  # Biopython's own, if only the length is known
            raise ValueError(f"{what} has a length and no letters") from None
    if isinstance(value, os.PathLike) or (isinstance(value, str) and looks_like_path(value)):
        raise ValueError(
            f"{what} looks like a path ({os.fspath(value)!r}): pass one path alone, or several to embed_file"
        )
    if not isinstance(value, str):
        raise ValueError(f"{what} is a {type(value).__name__}: pass {KINDS}")
    if ">" in _BRACKETED.sub("", value):
        raise ValueError(f"{what} is text in FASTA: pass the path of its file, or a dict of id to sequence")
    num_digits = sum(map(str.isdigit, value)) if not value.isalpha() else 0
    if num_digits >= _ID_DIGITS * len(value) > 0 and len(value.split()) == 1 and any(map(str.isalpha, value)):
        raise ValueError(f"{what} looks like an id ({value!r}): pass its letters")
    return value


def make_given(place: int, name: str | None, letters: str, config: Config) -> GivenProtein:
    """Put letters right, and cut what is too long.

    Raises
    ------
    ValueError
        If a policy leaves it out.
    """
    header = f"sequence_{place}" if name is None else name
    what = f"sequence {place}" if name is None else f"protein {place} ({name})"
    (protein,) = make_proteins(header, letters, place + 1, config)
    num_unread = max(0, len(protein.residues) - MAX_RESIDUES)
    protein = protein._replace(id=header, residues=protein.residues[:MAX_RESIDUES], num_unread=num_unread)
    try:
        return apply_policies(protein, what, config)
    except FastaError as error:
        raise FastaError(without_remedy_of_runs(error)) from None


def apply_policies(protein: Protein, what: str, config: Config) -> GivenProtein:
    """Cut a protein into segments.

    Raises
    ------
    FastaError
        If a policy leaves it out.
    """
    protein, outcome, spans = apply_length_policy(protein, config)
    if protein.skipped is not None:
        raise FastaError(
            f"{what} is left out: {protein.skipped}; take it out of what is embedded, or use embed_file, "
            "which skips such records and lists them"
        )
    return GivenProtein(protein.id, protein.residues[: spans[-1].stop], spans, outcome, protein)


def warn_of_changes(given: Sequence[GivenProtein], config: Config) -> None:
    """Warn of proteins that are not embedded as they were given: truncated, with unknown letters, or DNA."""
    total = f"of {len(given)} proteins"
    truncated = [one.id for one in given if one.outcome is RecordOutcome.truncated]
    if truncated:
        limit = f"truncation_seq_length={config.truncation_seq_length}"
        warn(
            f"{len(truncated)} {total} are longer than {limit} and embedded by their first residues alone "
            f"({named(truncated)}): Embedder(long='window') embeds all of them"
        )
    replaced = [one.id for one in given if one.protein.changes.replaced]
    if replaced:
        warn(f"{len(replaced)} {total} have unknown letters, and X in their place ({named(replaced)})")
    nucleotide = [one.id for one in given if one.protein.is_nucleotide]
    if nucleotide:
        warn(f"{len(nucleotide)} {total} look like DNA ({named(nucleotide)}): embed their proteins instead")


def warn(message: str) -> None:
    """Warn whoever called `Embedder.embed`."""
    warnings.warn(message, UserWarning, stacklevel=4)


def named(names: Sequence[str]) -> str:
    """Return the first names, and how many there are more."""
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return ", ".join(names[:MOST_NAMED]) + more
