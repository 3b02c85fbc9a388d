"""The command that goes on with a run, read back by the command line's own reader."""

from __future__ import annotations

import shlex

import pytest

from dist_esm.commandline.cli import compose_config
from dist_esm.config import plain_values
from dist_esm.jobs.report.again import command_again

MODEL = "model=esm2_t6_8M_UR50D"
LINES = [
    ["input=proteins/", "output_dir=out"],
    ["input=it's.fasta", MODEL, "include=[mean,per_tok]", "repr_layers=[0,6,-2]"],
    ['input="a b.fasta"', 'output_dir="o u t"', MODEL, "truncation_seq_length=null", "residues.gaps=unknown"],
    ['input="a,b (1).fasta"', MODEL, "dedupe=false", "unit_share=0.5"],
    ['input=["a b.fasta","it\'s, c.fasta",plain.fasta]', MODEL, "model.seed=3", "toks_per_batch=500"],
    ['input=["ü b.fasta",ü.fasta]', MODEL],
    ['input="[a].fasta"', MODEL],
    ["input=*.fasta", MODEL, 'model.weights="my weights.pt"', "selfcheck.max_relative_error=0.9"],
    ["input=[a#b.fasta,ü.fasta]", "model=esm2_t33_650M_UR50D", "format=fair_esm", "save_dtype=float16"],
    ['input=["{x}.fasta","[y].fasta","a=b.fasta","c:d.fasta"]', MODEL],
]


@pytest.mark.parametrize("line", LINES, ids=lambda line: line[0])
def test_the_command_makes_the_same_configuration(line):
    config = compose_config(line)
    command = shlex.split(command_again(plain_values(config), num_ranks=1))
    assert command[:3] == ["python", "-m", "dist_esm"]
    assert compose_config(command[3:]) == config
    assert len(command) - 3 <= len(line) + 2, "only what differs from the defaults"
