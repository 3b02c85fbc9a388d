"""A file of any content, embedded by the stand-in beside a good one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from helpers.fasta import random_sequence, write
from helpers.standin import Embedded, accounts_add_up, embed_directory, expected

GOOD = b">good one\nMKV\n"
MANY = [(f"p{i % 37}", random_sequence(5 + (i * 7) % 40, i % 50)) for i in range(120)]
MANY_TEXT = "".join(
    f">{name} no {i}\n{residues}\n" + (">empty\n" if i % 10 == 9 else "")
    for i, (name, residues) in enumerate(MANY)
)


def embed_beside_good(
    tmp_path: Path, content: bytes | str, name: str = "a.fasta", **overrides: object
) -> Embedded:
    """Embed a file together with a good one, which must come out right whatever becomes of the first."""
    write(tmp_path / "in" / name, content)
    write(tmp_path / "in" / "zz_good.fasta", GOOD)
    done = embed_directory(tmp_path / "in", tmp_path / "out", **overrides)
    good = done.load("zz_good_ESM")
    assert good["proteins"] == ["good"]
    assert np.array_equal(good["data"][0].numpy(), expected("MKV").mean)
    assert accounts_add_up(done.report)
    return done


def failure_of(tmp_path: Path, content: bytes | str, name: str = "a.fasta", **overrides: object) -> str:
    """The message with which a file fails; there is no output of it, and the good file beside it is done."""
    done = embed_beside_good(tmp_path, content, name, **overrides)
    assert done.report.status == "partial"
    assert done.outputs() == ["zz_good_ESM"]
    return done.failure(name)


def check_output(content: dict, proteins: list[tuple[str, str]], has_all_kinds: bool = False) -> None:
    """An output holds these proteins, (id, residues), in order, each with its own vectors."""
    assert content["proteins"] == [name for name, _ in proteins]
    assert content["lengths"] == [len(residues) for _, residues in proteins]
    assert len(content["data"]) == len(content["headers"]) == len(proteins)
    for i, (_, residues) in enumerate(proteins):
        right = expected(residues)
        assert np.array_equal(content["data"][i].numpy(), right.mean)
        if has_all_kinds:
            assert np.array_equal(content["mean_representations"][1][i].numpy(), right.mean)
            assert np.array_equal(content["bos_representations"][1][i].numpy(), right.bos)
            assert np.array_equal(content["representations"][1][i].numpy(), right.rows)
