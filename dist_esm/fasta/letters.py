"""The policy for letters, the same for files and notebooks: which are put right, replaced, or left out."""

from __future__ import annotations

from dist_esm.config import Letter, ResidueConfig, Unknown
from dist_esm.fasta.blocks import FastaError
from dist_esm.types import NO_CHANGES, Changes, Protein

RESIDUES = b"ACDEFGHIKLMNPQRSTVWYXBUZO"
"""The letters that a protein may have once the residue policy has been applied."""

_LOWER = bytes(range(ord("a"), ord("z") + 1))
_REPLACE = bytes(letter if letter in RESIDUES else ord("X") for letter in range(256))


def make_protein(header: str, letters: str, record_number: int, policy: ResidueConfig) -> Protein:
    """Return one record under the residue policy.

    Parameters
    ----------
    header
        Its header line without `>`.
    letters
        Its sequence as it was given.
    record_number
        Its place in its file, from 1.
    policy
        ``residues.*`` of the configuration.

    Raises
    ------
    FastaError
        If it has a letter that the policy does not let pass.
    """
    words = header.split(None, 1)
    name = words[0] if words else f"unnamed_{record_number}"
    residues, changes = fix_letters(letters.encode("ascii", "replace"), policy)
    strange = residues.translate(None, RESIDUES)
    skipped = None
    if strange:
        shown = ", ".join(repr(chr(letter)) for letter in sorted(set(strange)))
        if policy.unknown is Unknown.fail:
            raise FastaError(
                f"record {record_number} ({name}) has letters outside the alphabet: {shown}; "
                "residues.unknown=replace makes them X"
            )
        if policy.unknown is Unknown.skip:
            residues, skipped = b"", "unknown letters"
        else:
            residues = residues.translate(_REPLACE)
            changes = changes._replace(replaced=len(strange))
    if not residues and skipped is None:
        skipped = "no residues left" if letters else "empty sequence"
    return Protein(name, header, residues, changes, is_unnamed=not words, skipped=skipped)


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
