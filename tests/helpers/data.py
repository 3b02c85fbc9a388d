"""Where the test data lie."""

from __future__ import annotations

from pathlib import Path

DATA = Path(__file__).parents[1] / "data"
PROTEINS = DATA / "proteins"
INTAKE = DATA / "intake"
