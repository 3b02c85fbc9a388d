"""The real weights, held to numbers that others obtained with them (tests/data/reference).

Skipped where the weights are not in torch hub's cache.
"""

from __future__ import annotations

import json
import os

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dist_esm import Embedder
from dist_esm.fasta.tokens import tokenize
from helpers.command import run_ranks
from helpers.data import DATA, PROTEINS

REFERENCE = DATA / "reference"
GPU = {
    "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")
}  # 3B is for a GPU, if there is one


@pytest.mark.weights("esm2_t36_3B_UR50D")
def test_the_3b_means_are_virnucpros(tmp_path):
    """Through the command, as VirNucPro's users run it.

    By cosine, since the precision of the stored vectors is not recorded.
    """
    files = f"input=[{REFERENCE / 'virnucpro_orfs.fa'},{REFERENCE / 'virnucpro_fixed500.fa'}]"
    result = run_ranks(None, files, f"output_dir={tmp_path}", "model=esm2_t36_3B_UR50D", timeout=1800, **GPU)
    assert result.returncode == 0, result.stderr
    for name in ("virnucpro_orfs", "virnucpro_fixed500"):
        output = torch.load(tmp_path / f"{name}_ESM.pt", weights_only=True)
        expected = load_file(REFERENCE / f"{name}_esm2_3B_mean.safetensors")
        assert len(expected) == 4
        assert sorted(output["proteins"]) == sorted(expected)
        for protein, vector in zip(output["proteins"], output["data"], strict=True):
            assert vector.shape == expected[protein].shape == (2560,)
            assert torch.cosine_similarity(vector.double(), expected[protein].double(), dim=0) >= 0.999, (
                protein
            )


@pytest.mark.weights("esm2_t6_8M_UR50D")
def test_the_8m_numbers_are_those_of_transformers():
    sequence = "GLDALQITV"
    assert tokenize(sequence.encode()).tolist() == [0, 6, 4, 13, 5, 4, 16, 12, 11, 7, 2]
    embedder = Embedder("esm2_t6_8M_UR50D", dtype="fp32")
    found = np.vstack(
        [embedder.embed([sequence], include="bos"), embedder.embed([sequence], include="per_tok")[0]]
    )
    expected = [[0.1444, 0.5413, 0.3248], [0.3034, 0.0053, 0.3108], [0.3228, -0.2499, 0.3415]]
    np.testing.assert_allclose(found[:3, :3], expected, rtol=0, atol=1e-4)


@pytest.mark.weights("esm2_t6_8M_UR50D")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_real_weights_are_within_the_limits_of_the_selfcheck(tmp_path, dtype):
    wanted = ["model=esm2_t6_8M_UR50D", f"dtype={dtype}", "include=[mean,bos,per_tok]", "toks_per_batch=1024"]
    result = run_ranks(None, f"input={PROTEINS}", f"output_dir={tmp_path}", "job=selfcheck", *wanted)
    assert result.returncode == 0, result.stdout + result.stderr
    assert json.loads((tmp_path / "selfcheck.json").read_text())["status"] == "ok"
