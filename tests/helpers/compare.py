"""Two results held against each other."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import torch

from dist_esm.config import Include, SelfcheckConfig
from dist_esm.jobs.selfcheck.compare import Comparison, Limits, compare


def relative_error(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """Largest ||ours - theirs|| / ||theirs|| over rows."""
    assert ours.shape == theirs.shape
    assert theirs.norm() > 0
    return float(((ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)).max())


def assert_within(include: Include, dtype: torch.dtype, ours, theirs) -> Comparison:
    """Hold embeddings to fair-esm's, by the yardstick and the default limits of `job=selfcheck`."""
    names = [str(index) for index in range(len(ours))]
    found = compare(include, 0, names, ours, theirs, Limits.of(SelfcheckConfig(), dtype, include))
    assert found.is_within, found
    return found


def digests(output_dir: Path) -> dict[str, str]:
    """The SHA-256 of each .pt file below a folder, by its path from there."""
    return {
        str(path.relative_to(output_dir)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(output_dir.rglob("*.pt"))
    }


def assert_same(got, want) -> None:
    """Hold two arrays to the same numbers of the same dtype, bit for bit."""
    got, want = np.asarray(got), np.asarray(want)
    assert (got.dtype, got.shape) == (want.dtype, want.shape)
    assert got.tobytes() == want.tobytes()
