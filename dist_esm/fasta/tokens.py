"""fair-esm's alphabet as a lookup table over bytes: sequences to tokens without a Python loop.

The table is read off fair-esm's own `Alphabet`, so the tokens are fair-esm's by construction.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dist_esm.fair_esm import ALPHABET
from dist_esm.fasta.letters import RESIDUES

BOS: int = ALPHABET.cls_idx
EOS: int = ALPHABET.eos_idx
PAD: int = ALPHABET.padding_idx
NUM_TOKENS = len(ALPHABET)

TOKEN_OF_BYTE: NDArray[np.uint8] = np.full(256, ALPHABET.unk_idx, dtype=np.uint8)
for _letter in RESIDUES:
    TOKEN_OF_BYTE[_letter] = ALPHABET.get_idx(chr(_letter))
TOKEN_OF_BYTE.flags.writeable = False
_TABLE, _BOS, _EOS = TOKEN_OF_BYTE.tobytes(), bytes([BOS]), bytes([EOS])


def tokenize(residues: bytes) -> NDArray[np.uint8]:
    """fair-esm's tokens of a sequence of `RESIDUES`.

    Returns
    -------
    uint8 array, shape (len(residues) + 2,)
        BOS, one token for each residue, EOS; read-only.
    """
    return np.frombuffer(b"%b%b%b" % (_BOS, residues.translate(_TABLE), _EOS), dtype=np.uint8)
