"""Checkpoints in fair-esm's on-disk format, fair-esm's own model as the oracle, and real ranks."""

from __future__ import annotations

from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_esm.model.checkpoints.checkpoint import KNOWN
from helpers.checkpoints import A8M, random_state, write_checkpoint


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run the tests that take minutes, too")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the tests that wait more than they work: at the end nothing would run beside them."""
    items.sort(key=lambda item: item.get_closest_marker("slurm") is None)


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


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, Any, Any]:
    """Let what a test printed travel between pytest's workers, which send nothing but UTF-8."""
    report = yield
    report.sections = [
        (name, text.encode(errors="backslashreplace").decode()) for name, text in report.sections
    ]
    return report


@pytest.fixture(scope="session")
def checkpoint_8m(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The 8M model with seeded weights."""
    return write_checkpoint(tmp_path_factory.mktemp("weights") / f"{KNOWN[A8M]}.pt", A8M, random_state(A8M))
