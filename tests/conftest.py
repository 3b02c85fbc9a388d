"""Checkpoints in fair-esm's on-disk format, fair-esm's own model as the oracle, and real ranks."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from esm.model import esm2 as fair_esm

from dist_esm.model.esm2 import Architecture
from dist_esm.model.weights import KNOWN, random_tensor, tensor_shapes

DATA = Path(__file__).parent / "data"
PROTEINS = DATA / "proteins"
A8M, A35M, A3B_SHAPED = Architecture(6, 320, 20), Architecture(12, 480, 20), Architecture(2, 2560, 40)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, with the reason, what this machine cannot run or was not asked to."""
    if item.get_closest_marker("slow") and not item.config.getoption("--slow"):
        pytest.skip("takes minutes: run with --slow")
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA GPU is visible")
    for mark in item.iter_markers("weights"):
        path = Path(torch.hub.get_dir()) / "checkpoints" / f"{mark.args[0]}.pt"
        if not path.is_file():
            pytest.skip(f"the real weights are not there: {path}")


def random_state(arch: Architecture, seed: int = 0, hard: bool = False) -> dict[str, torch.Tensor]:
    """Seeded tensors under fair-esm's names. Hard ones have peaky attention, outlier channels and large LayerNorm gains."""
    generator = torch.Generator().manual_seed(seed)
    state = {
        name: random_tensor(name, shape, arch.num_layers, generator)
        for name, shape in tensor_shapes(arch).items()
    }
    state |= {
        f"layers.{n}.self_attn.rot_emb.inv_freq": state["layers.0.self_attn.rot_emb.inv_freq"]
        for n in range(arch.num_layers)
    }
    if hard:
        channels = torch.randperm(arch.embed_dim, generator=generator)[:4]
        for name, tensor in state.items():
            if name.endswith(("q_proj.weight", "k_proj.weight")):
                tensor *= 1.5
            elif name.endswith("layer_norm.weight"):
                tensor[channels] *= 4
            elif name.endswith("fc2.weight"):
                tensor[channels] *= 8
    return state


def fair_esm_model(arch: Architecture, state: dict[str, torch.Tensor]) -> fair_esm.ESM2:
    """fair-esm's own module with these parameters, in fp32."""
    model = fair_esm.ESM2(arch.num_layers, arch.embed_dim, arch.attention_heads, "ESM-1b", token_dropout=True)
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys
    assert all(key.startswith(("lm_head", "contact_head")) for key in result.missing_keys)
    return model.eval()


def write_checkpoint(path: Path, arch: Architecture, state: dict[str, torch.Tensor]) -> Path:
    """A file as fair-esm ships them: Namespace, prefixes, LM head."""
    width = arch.embed_dim
    head = {
        "weight": state["embed_tokens.weight"],
        "bias": torch.zeros(33),
        "dense.weight": torch.eye(width),
        "dense.bias": torch.zeros(width),
    }
    head |= {"layer_norm.weight": torch.ones(width), "layer_norm.bias": torch.zeros(width)}
    tensors = {f"encoder.sentence_encoder.{name}": tensor for name, tensor in state.items()}
    tensors |= {f"encoder.lm_head.{name}": tensor for name, tensor in head.items()}
    settings = argparse.Namespace(
        arch="esm2",
        encoder_layers=arch.num_layers,
        encoder_embed_dim=width,
        encoder_attention_heads=arch.attention_heads,
        token_dropout=True,
    )
    torch.save({"args": argparse.Namespace(arch="esm2"), "cfg": {"model": settings}, "model": tensors}, path)
    return path


@pytest.fixture(scope="session")
def checkpoint_8m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 8M model with seeded weights."""
    return write_checkpoint(tmp_path_factory.mktemp("weights") / f"{KNOWN[A8M]}.pt", A8M, random_state(A8M))


def environment(**extra: str) -> dict[str, str]:
    """The environment for a rank: no torchrun variables of ours, no user's hub cache."""
    kept = {
        key: value
        for key, value in os.environ.items()
        if key not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    }
    return {**kept, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **extra}


def command(num_ranks: int | None, *overrides: object) -> list[str]:
    """The command line: torchrun with so many ranks, or without torchrun for None."""
    launcher = [sys.executable, "-m"]
    if num_ranks is not None:
        launcher += ["torch.distributed.run", "--standalone", f"--nproc_per_node={num_ranks}", "-m"]
    return [*launcher, "dist_esm", *(str(item) for item in overrides)]


def run_ranks(
    num_ranks: int | None, *overrides: object, timeout: float = 120, **extra: str
) -> subprocess.CompletedProcess[str]:
    """Run the command to its end."""
    return subprocess.run(
        command(num_ranks, *overrides),
        capture_output=True,
        text=True,
        timeout=timeout,
        env=environment(**extra),
        check=False,
    )


def run_meanwhile(place: str, shell: str, *overrides: object) -> subprocess.CompletedProcess[str]:
    """Run the command without torchrun, and the shell command when it comes to a function."""
    line = [
        sys.executable,
        str(Path(__file__).parent / "helpers" / "meanwhile.py"),
        place,
        shell,
        *map(str, overrides),
    ]
    return subprocess.run(line, capture_output=True, text=True, timeout=120, env=environment(), check=False)


def read_report(output_dir: Path) -> dict:
    return json.loads((output_dir / "report.json").read_text())


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest ||ours - theirs|| / ||theirs|| over rows."""
    assert ours.shape == theirs.shape
    assert theirs.norm() > 0
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())
