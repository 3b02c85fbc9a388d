"""The id of a protein: the first word of its header, or the accession that databases put into that word."""

from __future__ import annotations

import re

_SECOND = frozenset(
    ("sp", "tr", "ref", "gb", "emb", "dbj", "tpg", "tpe", "tpd", "gpp", "nat", "nxp", "lcl", "bbs")
)
"""Databases whose words are ``db|ACCESSION``, with or without a name behind another ``|``."""
_THIRD = frozenset(("pir", "prf", "gnl"))
"""Those whose accession comes behind an empty field, or behind the name of a database."""
_UNIPROT = re.compile(
    r"((?:[OPQ][0-9][A-Z0-9]{3}[0-9]|[A-NR-Z][0-9](?:[A-Z][A-Z0-9]{2}[0-9]){1,2})(?:-[0-9]+)?)\.[0-9]+"
)
"""An accession of UniProt with the version that NCBI puts behind it."""


def accession_of(word: str) -> str:
    """Return the accession in the first word of a header; the word itself if it has none.

    Parameters
    ----------
    word
        As UniProt (``sp|P12345|NAME``) and NCBI (``gi|1|ref|NP_000001.1|``, ``pdb|1ABC|A``) write them.

    Examples
    --------
    >>> accession_of("sp|P12345|AATM_RABIT"), accession_of("UniRef50_P12345")
    ('P12345', 'UniRef50_P12345')
    """
    if "|" not in word:
        return word
    database, *fields = word.split("|")
    if database.lower() == "gi" and len(fields) > 2:
        _, database, *fields = fields
    database = database.lower()
    fields += ["", ""]
    if database == "pdb" and fields[0]:
        return f"{fields[0]}_{fields[1]}" if fields[1] else fields[0]
    accession = fields[0] if database in _SECOND else fields[1] if database in _THIRD else ""
    if database in ("sp", "tr") and (versioned := _UNIPROT.fullmatch(accession)):
        accession = versioned[1]
    return accession or word
