"""`dist_esm.fasta` and `dist_esm.planning` as a whole: what they import, and the examples in their docs."""

from __future__ import annotations

import doctest
import json
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest
from esm.data import Alphabet

import dist_esm.fasta
from dist_esm.fasta.letters import RESIDUES
from dist_esm.fasta.tokens import token_table
from dist_esm.planning import assign, inputs
from dist_esm.types import MASK

READ = """
import importlib, json, sys
from pathlib import Path
path, names = Path(sys.argv[1]), sys.argv[2:]
for name in names:
    importlib.import_module(f"dist_esm.fasta.{name}")
from dist_esm.config import Config
from dist_esm.fasta.blocks import whole_file
from dist_esm.fasta.parser import read_proteins
from dist_esm.types import Count, Unit
unit = Unit(0, 0, whole_file(path), Count(), Count(), is_whole=True)
proteins = [(protein.id, protein.residues.decode()) for protein in read_proteins(unit, Config())]
print(json.dumps({"proteins": proteins, "torch": "torch" in sys.modules}))
"""


def test_reading_fasta_imports_no_torch(tmp_path):
    path = tmp_path / "a.fasta"
    path.write_text(">a one\nMKV\nLA\n>b\nmk*\n")
    names = [module.name for module in pkgutil.iter_modules(dist_esm.fasta.__path__)]
    assert {"blocks", "letters", "parser", "segments", "slices", "tokens"} <= {*names}
    command = [sys.executable, "-c", READ, str(path), *names]
    folder = Path(dist_esm.fasta.__path__[0]).parents[1]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder)
    assert json.loads(done.stdout) == {"proteins": [["a", "MKVLA"], ["b", "MK"]], "torch": False}


def test_the_table_of_tokens_is_fair_esms():
    alphabet, table = Alphabet.from_architecture("ESM-1b"), token_table()
    specials = (alphabet.cls_idx, alphabet.eos_idx, alphabet.padding_idx, alphabet.mask_idx, len(alphabet))
    assert (table.bos, table.eos, table.pad, table.mask, table.num_tokens) == specials
    for byte in range(256):
        token = {**{letter: chr(letter) for letter in RESIDUES}, ord(MASK): "<mask>"}.get(byte, "<unk>")
        assert table.token_of_byte[byte] == alphabet.get_idx(token)


@pytest.mark.parametrize("module", [assign, inputs])
def test_examples_in_the_documentation_give_what_they_say(module):
    results = doctest.testmod(module)
    assert results.attempted > 0
    assert results.failed == 0
