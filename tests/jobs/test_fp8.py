"""A run in 8-bit numbers, by the implementation that runs anywhere."""

from __future__ import annotations

from dist_esm import load
from dist_esm.model.esm2 import Architecture
from helpers.checkpoints import random_state, write_checkpoint
from helpers.command import run_ranks
from helpers.compare import digests
from helpers.data import PROTEINS

NARROW = Architecture(3, 96, 6)


def test_two_ranks_in_8_bits_give_the_bits_of_one_and_do_not_mix_with_others(tmp_path):
    state = random_state(NARROW, seed=1, hard=True)
    weights_file = write_checkpoint(tmp_path / "narrow.pt", NARROW, state)
    options = [
        f"input={PROTEINS}",
        "model=auto",
        f"model.weights={weights_file}",
        "dtype=fp8",
        "linear=torch",
        "device=cpu",
    ]
    for num_ranks, name, cache in ((None, "one", "a"), (2, "two", "b"), (2, "kept", "b")):
        done = run_ranks(
            num_ranks,
            *options,
            f"output_dir={tmp_path / name}",
            timeout=300,
            XDG_CACHE_HOME=str(tmp_path / cache),
        )
        assert done.returncode == 0, done.stderr
        assert ("rounded weights are taken from" in done.stderr) is (name == "kept")
    assert digests(tmp_path / "one") == digests(tmp_path / "two") == digests(tmp_path / "kept") != {}
    assert len(list(tmp_path.glob("b/dist_esm/*.pt"))) == 1
    run = load(tmp_path / "one")
    assert (run.provenance["dtype"], run.provenance["fp8"]) == ("float8_e4m3fn", "all")
    other = run_ranks(None, *options, "fp8=ffn", f"output_dir={tmp_path / 'one'}")
    assert other.returncode == 1
    assert "fp8='all' before, 'ffn' now" in other.stderr
