"""fair-esm's alphabet as a lookup table over bytes: sequences to tokens without a Python loop.

The table is read off fair-esm's own `Alphabet` at its first use, so the tokens are fair-esm's by
construction. fair-esm brings torch along, which takes seconds to import: code that only reads FASTA does
not pay for it.
"""

from __future__ import annotations

from functools import cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from dist_esm.fasta.letters import RESIDUES
from dist_esm.types import MASK

_UINT8 = np.dtype(np.uint8)


class TokenTable(NamedTuple):
    """fair-esm's token of each residue letter, and its special tokens."""

    token_of_byte: bytes
    """256 tokens, to be used with `bytes.translate`; the mask token for `MASK`, else `<unk>`."""
    bos: int
    eos: int
    pad: int
    mask: int
    num_tokens: int
    """Size of the alphabet: rows of the model's embedding table."""


@cache
def token_table() -> TokenTable:
    """fair-esm's tokens; the first call imports fair-esm."""
    from dist_esm.fair_esm import ALPHABET

    token_of_byte = bytearray([ALPHABET.unk_idx]) * 256
    for letter in RESIDUES:
        token_of_byte[letter] = ALPHABET.get_idx(chr(letter))
    token_of_byte[ord(MASK)] = ALPHABET.mask_idx
    return TokenTable(
        bytes(token_of_byte),
        bos=ALPHABET.cls_idx,
        eos=ALPHABET.eos_idx,
        pad=ALPHABET.padding_idx,
        mask=ALPHABET.mask_idx,
        num_tokens=len(ALPHABET),
    )


@cache
def _frame() -> tuple[bytes, bytes, bytes]:
    """The table for residues, BOS and EOS, as `tokenize` joins them."""
    table = token_table()
    return table.token_of_byte, bytes([table.bos]), bytes([table.eos])


def tokenize(residues: bytes) -> NDArray[np.uint8]:
    """fair-esm's tokens of a sequence of `RESIDUES`.

    Returns
    -------
    uint8 array, shape (len(residues) + 2,)
        BOS, one token for each residue, EOS; read-only.
    """
    token_of_byte, bos, eos = _frame()
    return np.frombuffer(b"".join((bos, residues.translate(token_of_byte), eos)), _UINT8)
