"""Tokens are fair-esm's."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from dist_esm.fasta.tokens import tokenize
from helpers.fasta import LETTERS
from helpers.standin import FAIR_ESM, fair_esm_tokens


@settings(max_examples=200, deadline=None, derandomize=True)
@given(st.text(alphabet=LETTERS, max_size=300))
def test_tokens_are_fair_esms_for_every_valid_sequence(residues):
    right = [FAIR_ESM.cls_idx, *FAIR_ESM.encode(residues), FAIR_ESM.eos_idx]
    assert tokenize(residues.encode()).tolist() == fair_esm_tokens(residues).tolist() == right
