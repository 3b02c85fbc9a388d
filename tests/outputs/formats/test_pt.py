"""format=pt through torch."""

from __future__ import annotations

import torch

from dist_esm.config import Format, Include
from helpers.compare import assert_same
from helpers.fasta import write_files
from helpers.outputs import (
    EVERYTHING,
    HEADERS,
    IDS,
    SEQUENCES,
    embed_text,
    expected_bos,
    expected_mean,
    expected_rows,
)
from helpers.standin import ALL_KINDS, embed_directory


def test_pt_through_torch(tmp_path):
    content = torch.load(embed_text(tmp_path, Format.pt, **EVERYTHING), weights_only=True)
    assert (content["proteins"], content["headers"]) == (IDS, HEADERS)
    assert content["lengths"] == [len(residues) for residues in SEQUENCES]
    for i, residues in enumerate(SEQUENCES):
        assert_same(content["data"][i], expected_mean(residues))
        for layer in (0, 1):
            assert_same(content["mean_representations"][layer][i], expected_mean(residues, layer))
            assert_same(content["bos_representations"][layer][i], expected_bos(residues, layer))
            assert_same(content["representations"][layer][i], expected_rows(residues, layer))


def test_every_wanted_representation_of_an_empty_file_has_its_shape(tmp_path):
    run = embed_directory(
        write_files(tmp_path / "in", empty=""),
        tmp_path / "out",
        include=ALL_KINDS,
        repr_layers=[0, 1],
    )
    content = run.load("empty_ESM")
    assert content["proteins"] == content["data"] == []
    assert {layer: tensor.shape for layer, tensor in content["mean_representations"].items()} == {
        0: (0, 6),
        1: (0, 6),
    }
    assert content["representations"] == {0: [], 1: []}


def test_tensors_of_a_kind_share_one_storage_no_larger_than_its_numbers(tmp_path):
    inputs = write_files(
        tmp_path / "in", a="".join(f">{i}\n{'MKTAYIAKQR' * (i % 7 + 1)}\n" for i in range(300))
    )
    run = embed_directory(inputs, tmp_path / "out", include=[Include.mean, Include.per_tok])
    content = run.load("a_ESM")
    assert len({tensor.untyped_storage().data_ptr() for tensor in content["data"]}) == 1
    assert content["data"][0].untyped_storage().nbytes() == 300 * 6 * 4
    rows = sum(content["lengths"])
    assert content["representations"][1][0].untyped_storage().nbytes() == rows * 6 * 4
