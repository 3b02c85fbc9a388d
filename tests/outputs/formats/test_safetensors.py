"""format=safetensors through its own library."""

from __future__ import annotations

import json

import numpy as np
import pytest
from safetensors import safe_open

from dist_esm.config import Format
from helpers.compare import assert_same
from helpers.outputs import (
    EVERYTHING,
    HEADERS,
    IDS,
    SEQUENCES,
    embed_text,
    expected_bos,
    expected_mean,
    expected_rows,
    table_of,
    write_table,
)


def test_safetensors_through_its_own_library(tmp_path):
    with safe_open(embed_text(tmp_path, Format.safetensors, **EVERYTHING), framework="numpy") as file:
        said = file.metadata()
        assert (json.loads(said["ids"]), json.loads(said["lengths"])) == (
            IDS,
            [len(residues) for residues in SEQUENCES],
        )
        assert json.loads(said["headers"]) == HEADERS
        offsets = file.get_tensor("offsets")
        assert_same(offsets, np.cumsum([0, *(len(residues) for residues in SEQUENCES)]))
        assert set(file.keys()) == {
            "offsets",
            *(f"{kind}.{layer}" for kind in ("mean", "bos", "per_tok") for layer in (0, 1)),
        }
        for layer in (0, 1):
            assert_same(
                file.get_tensor(f"mean.{layer}"),
                np.stack([expected_mean(residues, layer) for residues in SEQUENCES]),
            )
            assert_same(
                file.get_tensor(f"bos.{layer}"),
                np.stack([expected_bos(residues, layer) for residues in SEQUENCES]),
            )
            for i, residues in enumerate(SEQUENCES):
                assert_same(
                    file.get_slice(f"per_tok.{layer}")[offsets[i] : offsets[i + 1]],
                    expected_rows(residues, layer),
                )


def test_safetensors_refuses_a_header_that_the_library_would_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("dist_esm.outputs.formats.safetensors.MAX_HEADER", 600)
    with pytest.raises(ValueError, match="lower max_proteins_per_output"):
        write_table(Format.safetensors, table_of(SEQUENCES), tmp_path / "a")
    assert not list(tmp_path.iterdir())
