"""The real weights, held to numbers that others obtained with them (tests/data/reference).

Skipped where the weights are not in torch hub's cache.
"""

from __future__ import annotations

import json
import os
from itertools import combinations, pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from esm.modules import RobertaLMHead
from safetensors.torch import load_file

from dist_esm import Embedder
from dist_esm.fasta.tokens import tokenize
from dist_esm.jobs.selfcheck.yardstick import measure
from helpers.command import run_ranks
from helpers.data import DATA, PROTEINS
from helpers.fasta import read_sequences

REFERENCE = DATA / "reference"
FASTPLMS = REFERENCE / "fastplms_means.safetensors"
FASTPLMS_RESIDUES = load_file(REFERENCE / "fastplms_residues.safetensors")
TWO_IN_BF16 = 0.06
"""How far apart two results in bf16 may be, each within 3% of the spread of fp32."""
GPU = {
    "CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")
}  # 3B is for a GPU, if there is one


@pytest.mark.weights("esm2_t36_3B_UR50D")
def test_the_3b_means_are_virnucpros(tmp_path):
    """Through the command, as VirNucPro's users run it.

    The precision of the stored vectors is not recorded: as far off as two results in bf16 may be.
    """
    files = f"input=[{REFERENCE / 'virnucpro_orfs.fa'},{REFERENCE / 'virnucpro_fixed500.fa'}]"
    result = run_ranks(None, files, f"output_dir={tmp_path}", "model=esm2_t36_3B_UR50D", timeout=1800, **GPU)
    assert result.returncode == 0, result.stderr
    ours, theirs = [], []
    for name in ("virnucpro_orfs", "virnucpro_fixed500"):
        output = torch.load(tmp_path / f"{name}_ESM.pt", weights_only=True)
        expected = load_file(REFERENCE / f"{name}_esm2_3B_mean.safetensors")
        assert len(expected) == 4
        assert sorted(output["proteins"]) == sorted(expected)
        ours += [vector.numpy() for vector in output["data"]]
        theirs += [expected[protein].numpy() for protein in output["proteins"]]
    assert {vector.shape for vector in ours} == {(2560,)}
    assert max(measure(ours, theirs).errors) <= TWO_IN_BF16


def test_a_cosine_does_not_tell_the_stored_proteins_apart_and_the_yardstick_does():
    """Two of them are 71% alike: exchanged, a limit of 0.999 lets them pass."""
    theirs = list(load_file(REFERENCE / "virnucpro_orfs_esm2_3B_mean.safetensors").values())
    theirs += load_file(REFERENCE / "virnucpro_fixed500_esm2_3B_mean.safetensors").values()
    pairs = [
        (torch.cosine_similarity(a, b, dim=0), i, j) for (i, a), (j, b) in combinations(enumerate(theirs), 2)
    ]
    cosine, i, j = max(pairs)
    assert 0.999 < cosine < 0.9999
    exchanged = [vector.numpy() for vector in theirs]
    exchanged[i], exchanged[j] = exchanged[j], exchanged[i]
    assert max(measure(exchanged, [vector.numpy() for vector in theirs]).errors) > 2 * TWO_IN_BF16


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.weights(name)) for name in load_file(FASTPLMS)],
)
def test_the_means_of_three_proteins_are_those_of_fair_esms_modules_in_bf16(name):
    texts = list(read_sequences(REFERENCE / "fastplms.fa").values())
    ours = Embedder(name).embed(texts)
    assert max(measure(list(ours), list(load_file(FASTPLMS)[name].numpy())).errors) <= TWO_IN_BF16


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.weights(name)) for name in load_file(FASTPLMS)],
)
def test_the_residues_of_three_proteins_are_those_of_fair_esms_modules_in_bf16(name):
    """And so are their logits, once the checkpoint's own head is on them."""
    texts = list(read_sequences(REFERENCE / "fastplms.fa").values())
    ours = np.vstack(Embedder(name).embed(texts, include="per_tok"))
    theirs = FASTPLMS_RESIDUES[f"{name}.residues"].float().numpy()
    errors = np.square(measure(list(ours), list(theirs)).errors)
    bounds = np.cumsum([0, *map(len, texts)])
    for start, stop in pairwise(bounds):
        assert np.sqrt(errors[start:stop].mean()) <= TWO_IN_BF16
    logits = head_of(name)(torch.from_numpy(ours)).detach()
    assert (
        logits.argmax(1).tolist()
        == np.concatenate([tokenize(text.encode())[1:-1] for text in texts]).tolist()
    )
    expected = FASTPLMS_RESIDUES[f"{name}.logits"].float()
    assert float((logits - expected).square().mean() / expected.var()) <= TWO_IN_BF16**2


def head_of(name: str) -> torch.nn.Module:
    """The head of a checkpoint that makes logits of the last layer's residues."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / f"{name}.pt"
    state = torch.load(path, map_location="cpu", weights_only=False)["model"]
    prefix = "encoder.lm_head."
    own = {key.removeprefix(prefix): value.float() for key, value in state.items() if key.startswith(prefix)}
    weight = torch.nn.Parameter(own["weight"])
    head = RobertaLMHead(weight.shape[1], len(weight), weight)
    head.load_state_dict(own)
    return head


def test_the_stored_residues_come_to_the_stored_means():
    lengths = [len(text) for text in read_sequences(REFERENCE / "fastplms.fa").values()]
    for name, means in load_file(FASTPLMS).items():
        residues = FASTPLMS_RESIDUES[f"{name}.residues"].float().split(lengths)
        ours = [rows.mean(0).numpy() for rows in residues]
        assert max(measure(ours, list(means.numpy())).errors) < 0.005  # they are rounded to fp16


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
