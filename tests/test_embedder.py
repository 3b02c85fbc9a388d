"""The Python API gives the numbers of the command line."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from dist_esm import Embedder
from helpers.command import MODEL, environment, run_ranks
from helpers.data import PROTEINS
from helpers.fasta import read_sequences


@pytest.fixture(scope="module")
def embedder(checkpoint_8m):
    return Embedder("esm2_t6_8M_UR50D", weights=checkpoint_8m, device="cpu", toks_per_batch=300)


WINDOWS = {"long": "window", "truncation_seq_length": 60, "window_overlap": 20}


@pytest.mark.parametrize("options", [{}, WINDOWS], ids=["truncate", "window"])
def test_same_bits_as_the_command(checkpoint_8m, tmp_path, options):
    source = PROTEINS / "medium.faa"
    settings = ["include=[mean,bos,per_tok]", *(f"{key}={value}" for key, value in options.items())]
    result = run_ranks(
        None, f"input={source}", f"output_dir={tmp_path}", MODEL, f"model.weights={checkpoint_8m}", *settings
    )
    assert result.returncode == 0, result.stderr
    content = torch.load(tmp_path / "medium_ESM.pt", weights_only=True)
    embedder = Embedder(
        "esm2_t6_8M_UR50D", weights=checkpoint_8m, device="cpu", toks_per_batch=300, **options
    )
    letters = list(read_sequences(source).values())
    np.testing.assert_array_equal(embedder.embed(letters), content["mean_representations"][6])
    np.testing.assert_array_equal(embedder.embed(letters, include="bos"), content["bos_representations"][6])
    for mine, theirs in zip(
        embedder.embed(letters, include="per_tok"), content["representations"][6], strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)


def test_letters_are_put_right_as_on_the_command_line(embedder):
    np.testing.assert_array_equal(embedder.embed(["mkt-AY*", "MKTJ"]), embedder.embed(["MKTAY", "MKTX"]))


def test_wrong_input_is_named(embedder):
    with pytest.raises(ValueError, match="sequence 1 is left out: empty sequence"):
        embedder.embed(["MKT", ""])
    with pytest.raises(ValueError, match="sequences is one string"):
        embedder.embed("MKT")
    with pytest.raises(ValueError, match=r"include=median is no choice: .*use one of mean, bos, per_tok$"):
        embedder.embed(["MKT"], include="median")
    assert embedder.embed([]).shape == (0, 320)


def test_it_lives_in_a_program_that_uses_hydra(tmp_path, checkpoint_8m):
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    program = f"""
import sys
import dist_esm.embedder
assert "hydra" not in sys.modules
from hydra import compose, initialize_config_dir
with initialize_config_dir({str(tmp_path)!r}, version_base="1.3"):
    embedder = dist_esm.embedder.Embedder("esm2_t6_8M_UR50D", weights={str(checkpoint_8m)!r}, device="cpu")
    assert compose("config").mine == 1
print(embedder.embed(["MKT"]).shape)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment()
    )
    assert (result.returncode, result.stdout) == (0, "(1, 320)\n"), result.stderr


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("esm2_t33_650M_UR50", r"is no model: did you mean esm2_t33_650M_UR50D\?"),
        ("facebook/esm2_t6_8M_UR50D", r"is no model: did you mean esm2_t6_8M_UR50D\?"),
        ("650M", r"is no model: did you mean esm2_t33_650M_UR50D\?"),
        ("esm2-3b", r"is no model: did you mean esm2_t36_3B_UR50D\?"),
        ("esm1b_t33_650M_UR50S", "is not an ESM-2, and no other model is embedded here:"),
        ("esmc_600m", "is not an ESM-2, and no other model is embedded here:"),
        ("", "is no model:"),
    ],
)
def test_an_unknown_model_is_answered_with_those_that_there_are(name, problem):
    names = (
        "esm2_t6_8M_UR50D, esm2_t12_35M_UR50D, esm2_t30_150M_UR50D, esm2_t33_650M_UR50D, esm2_t36_3B_UR50D, "
    )
    with pytest.raises(
        ValueError, match=f"^model={name} {problem} use one of {names}esm2_t48_15B_UR50D, auto$"
    ):
        Embedder(name)
