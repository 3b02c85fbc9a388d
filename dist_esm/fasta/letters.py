"""The policy for letters, the same for files and notebooks: which are put right, replaced, or left out.

It starts from fair-esm's own reading: blanks inside a sequence mean nothing, and text such as ``<mask>`` is
a token and no letters. What is no protein (two chains in one record, scores, digits) is skipped with its
reason, not replaced.
"""

from __future__ import annotations

import re
from collections import Counter

from dist_esm.config import Chains, Config, Letter, ProteinId, ResidueConfig, SpecialTokens, Unknown
from dist_esm.fasta.blocks import ELSEWHERE, FastaError
from dist_esm.fasta.ids import accession_of
from dist_esm.types import MASK, NO_CHANGES, Changes, Protein

RESIDUES = b"ACDEFGHIKLMNPQRSTVWYXBUZO"
"""The letters that a protein may have once the residue policy has been applied."""
NUCLEOTIDES = b"ACGTUN"
FEWEST_NUCLEOTIDES = 8
"""Shorter records may be of these letters by chance."""

SPECIAL_TOKEN = re.compile(
    r"<\s*(?:cls|pad|eos|bos|unk|mask|sep|null_)\w*\s*>?|<[^<>]*>|\[[^\[\]]*\]|\([^()]*\)|\{[^{}]*\}",
    re.IGNORECASE,
)
"""fair-esm's special tokens, those of other models, and any text in brackets, such as a modification; tokens
that are not closed, too."""
_NAMED_TOKEN = re.compile(r"<(?:cls|pad|eos|bos|unk|mask|sep|null_\d)>|\[(?:cls|pad|eos|bos|unk|mask|sep)\]")
_MASK_TOKEN = re.compile(r"<\s*m\s*a\s*s\s*k\s*>", re.IGNORECASE)
_CHAIN_SEPARATOR = re.compile(r"[:/|]")
_POSITION = re.compile(r"(?<!\S)[0-9]+|[0-9]+(?!\S)")
_THREE_LETTERS = (
    "Ala|Arg|Asn|Asp|Asx|Cys|Gln|Glu|Glx|Gly|His|Ile|Leu|Lys|Met|Phe|Pro|Pyl|Sec|Ser|Thr|Trp|Tyr|Val|Xaa|Ter"
)
_THREE_LETTER_CODES = re.compile(
    rf"(?:(?:{_THREE_LETTERS})[-\s]*){{2,}}|(?=\w+[-\s])(?i:(?:{_THREE_LETTERS}|[-\s]){{3,}})"
)
"""Side by side as in `MetLys`, where the case tells, or apart as in `MET-LYS`."""
_TERMINATOR = re.compile(r"(?<!\S)//\s*$")  # as GenBank ends a record
_LOWER = b"abcdefghijklmnopqrstuvwxyz"
_NO_LETTERS = bytes(set(range(256)) - set(_LOWER + _LOWER.upper() + MASK))
_NEUTRAL = b" \t\n\r\x0b\x0c.*-"
_REPLACE = bytes(letter if letter in RESIDUES + MASK else ord("X") for letter in range(256))


def make_proteins(header: str, letters: str, record_number: int, config: Config) -> list[Protein]:
    """Return one record under the policy for letters.

    Parameters
    ----------
    header
        Its header line without `>`; its first word, or the accession in it, is the id.
    letters
        Its sequence as it was given. A line feed ends a line and is not counted as a blank.
    record_number
        Its place in its file, from 1.
    config
        ``residues.*``, `special_tokens`, `chains` and `id` decide.

    Returns
    -------
    list of Protein
        One, with residues or with the reason why it is skipped; under ``chains=split`` one for each chain.

    Raises
    ------
    FastaError
        If it has something that the policy does not let pass.
    """
    words = header.split(None, 1)
    name = words[0] if words else f"unnamed_{record_number}"
    if config.id is ProteinId.accession:
        name = accession_of(name)
    if letters.isascii():
        residues = letters.encode("ascii")
        if residues and not residues.translate(None, RESIDUES):  # nearly every record
            return [
                Protein(name, header, residues, is_unnamed=not words, is_nucleotide=is_nucleotide(residues))
            ]
    place = f"record {record_number} ({name})"
    letters = _TERMINATOR.sub("", letters)
    try:
        letters, skipped = _mask_tokens(letters.replace(MASK.decode(), "?"), config.special_tokens)
        skipped = skipped or _not_a_protein(letters, config.residues)
    except FastaError as error:
        raise FastaError(f"{place} {error}") from None
    chains = [letters]
    if skipped is None and _CHAIN_SEPARATOR.search(letters):
        chains = [chain for chain in _CHAIN_SEPARATOR.split(letters) if chain.strip()]
        if config.chains is Chains.skip:
            chains, skipped = [letters], "chain separators"
    return [
        _make_protein(
            name if len(chains) == 1 else f"{name}_{index + 1}",
            header,
            chain,
            place,
            skipped,
            config.residues,
        )._replace(is_unnamed=not words, is_continued=index > 0)
        for index, chain in enumerate(chains)
    ]


def _mask_tokens(letters: str, policy: SpecialTokens) -> tuple[str, str | None]:
    """Return the letters with `MASK` for mask tokens, and the reason to skip the record for its tokens."""
    found = {"".join(token.split()).lower() for token in SPECIAL_TOKEN.findall(letters.replace("\n", ""))}
    if not found:
        return letters, None
    named = sorted(token for token in found if _NAMED_TOKEN.fullmatch(token))
    words = f"special token {named[0]}" if named else "text in brackets"
    if policy is SpecialTokens.fail:
        raise FastaError(f"has a {words}: special_tokens=skip leaves such records out {ELSEWHERE}")
    if policy is SpecialTokens.skip or found != {"<mask>"}:
        return letters, words
    return _MASK_TOKEN.sub(MASK.decode(), letters), None


def _not_a_protein(letters: str, policy: ResidueConfig) -> str | None:
    """Return the reason to skip a record of codes of three letters, or that is mostly no letters, such as
    scores; gaps and stops aside."""
    if _THREE_LETTER_CODES.fullmatch(letters.strip("- \n")):
        if policy.unknown is Unknown.fail:
            raise FastaError(
                f"is in codes of three letters; residues.unknown=replace skips such records {ELSEWHERE}"
            )
        return "three-letter codes"
    text = "".join(letters.split()).encode("ascii", "replace").translate(None, _NEUTRAL)
    if 2 * len(text.translate(None, _NO_LETTERS)) >= len(text):
        return None
    if policy.unknown is Unknown.fail:
        shown = ", ".join(repr(chr(letter)) for letter in sorted(set(text) & set(_NO_LETTERS)))
        raise FastaError(
            f"is mostly no residues ({shown}); residues.unknown=replace skips such records {ELSEWHERE}"
        )
    return "mostly no residues"


def _make_protein(
    name: str, header: str, letters: str, place: str, skipped: str | None, policy: ResidueConfig
) -> Protein:
    """Return one chain with its letters put right, or marked as skipped."""
    if skipped is not None:
        return Protein(name, header, b"", skipped=skipped)
    is_empty = not letters.strip()
    digits_removed = blanks_removed = 0
    if policy.blanks is Letter.fix:
        without = _POSITION.sub("", letters)
        digits_removed = len(letters) - len(without)
        num_before = len(without) - without.count("\n")
        letters = "".join(without.split())
        blanks_removed = num_before - len(letters)
    else:
        letters = letters.replace("\n", "")
    foreign = Counter(letter for letter in letters if not letter.isascii())
    residues, changes = fix_letters(letters.encode("ascii", "replace"), policy)
    changes = changes._replace(blanks_removed=blanks_removed, digits_removed=digits_removed)
    strange = Counter(map(chr, residues.translate(None, RESIDUES + MASK)))
    replaced: tuple[tuple[str, int], ...] = ()
    if strange:
        strange = strange - Counter({"?": foreign.total()}) + foreign
        replaced = tuple(sorted(strange.items(), key=lambda item: (-item[1], item[0])))
        if policy.unknown is Unknown.fail:
            shown = ", ".join(repr(letter) for letter in sorted(strange))
            raise FastaError(
                f"{place} has letters outside the alphabet: {shown}; "
                f"residues.unknown=replace makes them X {ELSEWHERE}"
            )
        if policy.unknown is Unknown.skip:
            return Protein(name, header, b"", changes, skipped="unknown letters")
        residues = residues.translate(_REPLACE)
        changes = changes._replace(replaced=strange.total())
    if not residues:
        return Protein(
            name, header, b"", changes, skipped="empty sequence" if is_empty else "no residues left"
        )
    return Protein(
        name, header, residues, changes, is_nucleotide=is_nucleotide(residues), replaced_letters=replaced
    )


def fix_letters(letters: bytes, policy: ResidueConfig) -> tuple[bytes, Changes]:
    """Return the letters with case, gaps and stops at the end put right, and how many were changed."""
    if not letters.translate(None, RESIDUES):
        return letters, NO_CHANGES
    upper_cased = stops_removed = gaps_removed = 0
    if policy.lower_case is Letter.fix:
        upper_cased = len(letters) - len(letters.translate(None, _LOWER))
        letters = letters.upper()
    if policy.gaps is Letter.fix:
        without = letters.translate(None, b"-.")
        gaps_removed = len(letters) - len(without)
        letters = without
    if policy.trailing_stop is Letter.fix:
        without = letters.rstrip(b"*")
        stops_removed = len(letters) - len(without)
        letters = without
    return letters, Changes(upper_cased, stops_removed, gaps_removed)


def is_nucleotide(residues: bytes) -> bool:
    """Tell if nearly all of a sequence (19 of 20 letters) is A, C, G, T, U or N: then it is DNA or RNA."""
    return (
        len(residues) >= FEWEST_NUCLEOTIDES
        and len(residues[:20].translate(None, NUCLEOTIDES)) < 5
        and 20 * len(residues.translate(None, NUCLEOTIDES)) <= len(residues)
    )
