"""Weights that are not fair-esm's own file, through the command: the same outputs, named and never mixed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from dist_esm import Embedder
from helpers.checkpoints import A8M, random_state
from helpers.command import MODEL, read_report, run_ranks
from helpers.data import PROTEINS
from helpers.fasta import read_sequences

FILE = PROTEINS / "medium.faa"


def means(output_dir: Path) -> torch.Tensor:
    return torch.stack(torch.load(output_dir / "medium_ESM.pt", weights_only=True)["data"])


@pytest.fixture(scope="module")
def tuned(tmp_path_factory):
    """A Lightning checkpoint of the 8M model with the same numbers as `checkpoint_8m`."""
    path = tmp_path_factory.mktemp("tuned") / "last.ckpt"
    state = {f"model.esm.{name}": tensor for name, tensor in random_state(A8M).items()}
    torch.save({"epoch": 1, "state_dict": {**state, "model.head.weight": torch.zeros(1, 320)}}, path)
    return path


@pytest.mark.distributed
def test_model_auto_with_several_ranks_has_the_bits_of_fair_esms_file(tmp_path, tuned, checkpoint_8m):
    """Cut among ranks, and with resume by the name of the model that auto found."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    own = ["model=auto", f"model.weights={tuned}", f"output_dir={ours}", f"input={FILE}"]
    for options in (own, [MODEL, f"model.weights={checkpoint_8m}", f"output_dir={theirs}", f"input={FILE}"]):
        result = run_ranks(2, *options)
        assert result.returncode == 0, result.stderr
    assert torch.equal(means(ours), means(theirs))
    words = (
        "state dict of esm2_t6_8M_UR50D, under the prefix 'model.esm.', its body alone (head left out), "
        f"from {tuned}"
    )
    report = read_report(ours)
    assert report["model"]["weights_in_words"] == words
    assert report["model"]["model"] == report["config"]["model"]["name"] == "esm2_t6_8M_UR50D"
    assert report["model"]["weights"] != read_report(theirs)["model"]["weights"]
    named = run_ranks(None, MODEL, *own[1:])
    assert named.returncode == 0, named.stderr
    assert [entry["resumed"] for entry in read_report(ours)["files"]] == [True]
    again = run_ranks(None, MODEL, f"model.weights={checkpoint_8m}", *own[2:])
    assert again.returncode == 1
    (line,) = [line for line in again.stderr.splitlines() if "error" in line]
    assert f"({words}) before" in line
    assert f"from {checkpoint_8m}) now" in line


def test_layers_of_model_auto_are_checked_once_they_are_known(tmp_path, tuned):
    options = ["model=auto", f"model.weights={tuned}", f"input={FILE}", f"output_dir={tmp_path}"]
    result = run_ranks(None, *options, "repr_layers=[7]")
    assert result.returncode == 1
    assert "repr_layers: esm2_t6_8M_UR50D has no layer 7: use -7 to 6" in result.stderr


def test_the_embedder_takes_them_too(tuned, checkpoint_8m):
    letters = list(read_sequences(FILE).values())[:3]
    ours = Embedder("auto", weights=tuned, device="cpu")
    theirs = Embedder("esm2_t6_8M_UR50D", weights=checkpoint_8m, device="cpu")
    np.testing.assert_array_equal(ours.embed(letters), theirs.embed(letters))
    assert ours.config.resolved_layers() == [6]
    assert ours.weights.startswith("state dict of esm2_t6_8M_UR50D, under the prefix 'model.esm.'")


def test_selfcheck_measures_them_too(tmp_path, tuned):
    result = run_ranks(
        None,
        "job=selfcheck",
        "model=auto",
        f"model.weights={tuned}",
        f"input={FILE}",
        f"output_dir={tmp_path}",
        "selfcheck.proteins=3",
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "esm2_t6_8M_UR50D against fair-esm's own model in fp32" in result.stdout
