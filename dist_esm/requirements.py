"""The packages that the command needs, looked for before any of them is imported."""

from __future__ import annotations

import re
import shlex
import sys
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

REQUIRED = {
    "torch": "torch>=2.11",
    "esm": "fair-esm>=2.0,<3",
    "Bio": "biopython>=1.83",
    "hydra": "hydra-core>=1.3,<1.4",
    "omegaconf": "omegaconf>=2.3,<2.4",
    "yaml": "pyyaml>=6",
    "numpy": "numpy>=1.26",
    "filelock": "filelock>=3.15",
    "rich": "rich>=13",
}
"""Name to import, and what pip installs; the same stands in pyproject.toml."""


def unmet_requirements() -> str | None:
    """Say in one line which packages are absent or too old, and how to install them; None if none is.

    Versions are compared for torch alone, whose older ones fail late and in ways that nobody understands.
    """
    missing = [requirement for name, requirement in REQUIRED.items() if find_spec(name) is None]
    if missing:
        names = ", ".join(re.split("[<>=]", requirement)[0] for requirement in missing)
        return f"not installed for {sys.executable}: {names}: run {install(missing)}"
    have, need = version_or_none("torch"), REQUIRED["torch"].partition(">=")[2]
    if have is not None and numbers(have) < numbers(need):
        remedy = install(["--upgrade", REQUIRED["torch"]])
        return f"torch {have} is too old for {sys.executable}, {need} is needed: run {remedy}"
    return None


def install(words: list[str]) -> str:
    """Return the command that installs packages for this Python."""
    return shlex.join([sys.executable, "-m", "pip", "install", *words])


def numbers(text: str) -> tuple[int, ...]:
    """Return the first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", text)[:2])


def version_or_none(package: str) -> str | None:
    """Return the version of an installed package; None if it came without one, as a checkout does."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None
