"""The version names the code: package, commit, and whether files differ from it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import dist_esm
from dist_esm.version import __version__
from helpers.command import environment

ROOT = Path(dist_esm.__file__).parent.parent
SAY = "from dist_esm.version import code_version; print(code_version())"


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
    return subprocess.run(
        ["git", *identity, "-C", str(folder), *arguments],
        check=True,
        capture_output=True,
        text=True,
        env=environment(GIT_CONFIG_GLOBAL="/dev/null"),
    ).stdout.strip()


def say(folder: Path, *command: str, **extra: str) -> str:
    """What a program says that imports the package from a folder."""
    result = subprocess.run(
        [sys.executable, *(command or ("-c", SAY))],
        check=True,
        capture_output=True,
        text=True,
        cwd=folder,
        env=environment(PYTHONPATH=str(folder), PYTHONDONTWRITEBYTECODE="1", **extra),
    )
    return result.stdout.strip()


def copy(folder: Path) -> Path:
    """Copy the package with its configuration, as a checkout or site-packages has it."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "dist_esm", folder / "dist_esm", ignore=ignore)
    shutil.copytree(ROOT / "conf", folder / "conf")
    return folder


def commit(folder: Path) -> str:
    git(folder, "init", "-q")
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "a commit")
    return git(folder, "rev-parse", "--short=7", "HEAD")


def test_a_checkout_names_its_commit_and_says_when_it_was_changed(tmp_path):
    checkout = copy(tmp_path)
    name = commit(checkout)
    assert say(checkout) == f"{__version__}+g{name}"
    (checkout / "notes.txt").write_text("no part of the package")
    assert say(checkout) == f"{__version__}+g{name}"
    assert say(checkout, GIT_DIR=str(ROOT / ".git")) == f"{__version__}+g{name}"
    (checkout / "dist_esm" / "attempt.py").write_text("# another\n")
    assert say(checkout) == f"{__version__}+g{name}.dirty"


def test_another_projects_repository_around_the_package_is_not_named(tmp_path):
    copy(tmp_path / "site-packages")
    commit(tmp_path)
    assert say(tmp_path / "site-packages") == __version__


def test_without_git_and_without_an_installed_package_the_version_is_known(tmp_path):
    """importlib.metadata finds every package but this one, as in a checkout that nobody installed."""
    checkout = copy(tmp_path)
    commit(checkout)
    assert say(checkout, PATH="/nowhere") == __version__
    program = """
import importlib.metadata, runpy, sys
real = importlib.metadata.distribution
def distribution(name):
    if name.replace("_", "-") == "dist-esm":
        raise importlib.metadata.PackageNotFoundError(name)
    return real(name)
importlib.metadata.distribution = distribution
sys.argv = ["dist_esm", "--version"]
runpy.run_module("dist_esm", run_name="__main__")
"""
    assert say(checkout, "-c", program, PATH="/nowhere") == f"dist_esm {__version__}"
