"""The cost of importing the package."""

from __future__ import annotations

import subprocess
import sys

from dist_esm.config import Format
from dist_esm.outputs.journal import Entry, encode
from dist_esm.types import Tally, WrittenFile
from helpers.outputs import SEQUENCES, table_of, write_table


def test_importing_the_package_imports_neither_torch_nor_a_format_and_opening_reads_no_output(tmp_path):
    write_table(Format.pt, table_of(SEQUENCES), tmp_path / "a")
    gone = Entry(
        "gone",
        "gone.fasta",
        [(0, None)],
        ["d"],
        [WrittenFile("gone.pt", 1, "s")],
        Tally(),
        0,
        1.0,
        False,
        True,
    )
    journal = tmp_path / ".dist_esm" / "journal" / "00000000000000000001.00000.jsonl"
    journal.parent.mkdir(parents=True)
    journal.write_bytes(encode(gone))
    code = (
        "import sys, dist_esm; heavy = {'torch', 'h5py', 'pyarrow', 'safetensors'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        f"dist_esm.load({str(tmp_path)!r}); assert not heavy - {{'torch'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
