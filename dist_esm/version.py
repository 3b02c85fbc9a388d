"""Which code this is: the version of the package and, in a git checkout of it, the commit.

Outputs, reports and `--version` carry it, so that numbers can be traced to the code that made them.
"""

from __future__ import annotations

import os
import subprocess
from functools import cache
from pathlib import Path

__version__ = "0.1.0"
"""The version of the package; pyproject.toml reads it from here."""

GIT_SECONDS = 10.0


@cache
def code_version() -> str:
    """Return the version, with the commit if this is a git checkout of the package.

    Returns
    -------
    str
        `0.1.0` for an installed package, `0.1.0+g1a2b3c4` in a checkout, `0.1.0+g1a2b3c4.dirty` if files of
        the package differ from that commit. Without git it is the version alone.

    Examples
    --------
    >>> code_version().startswith(__version__)
    True
    """
    package = Path(__file__).resolve().parent
    answer = git(package, "rev-parse", "--show-toplevel", "--short=7", "HEAD")
    root, _, commit = (answer or "").strip().rpartition("\n")
    if (
        not root or Path(root).resolve() != package.parent
    ):  # another project's repository may be around a package
        return __version__
    changes = git(package, "status", "--porcelain", "--", ".")
    return f"{__version__}+g{commit}{'.dirty' if changes else ''}"


def git(folder: Path, *arguments: str) -> str | None:
    """Return what git says about a folder; None if there is no git or no repository."""
    # In a hook git names another repository to its children.
    environment = {key: value for key, value in os.environ.items() if not key.startswith("GIT_")}
    # A checkout may belong to another user, as in a container; its code runs here already.
    command = ["git", "--no-optional-locks", "-c", "safe.directory=*", "-C", str(folder), *arguments]
    try:
        answer = subprocess.run(
            command,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            env=environment,
            timeout=GIT_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return os.fsdecode(answer.stdout) if answer.returncode == 0 else None
