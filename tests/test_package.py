"""The package: what importing it costs, what it needs, and the wheel in an environment of its own."""

from __future__ import annotations

import ast
import re
import site
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import dist_esm
from dist_esm.config import Format
from dist_esm.outputs.journal import Entry, encode
from dist_esm.requirements import REQUIRED
from dist_esm.types import Tally, WrittenFile
from helpers.command import MODEL, environment
from helpers.outputs import SEQUENCES, table_of, write_table

ROOT = Path(__file__).resolve().parent.parent


def run_python(*words: object, **extra: str) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, *map(str, words)]
    return subprocess.run(
        line, capture_output=True, text=True, timeout=120, env=environment(**extra), check=False
    )


def test_importing_the_package_imports_neither_torch_nor_a_format_and_opening_reads_no_output(tmp_path):
    write_table(Format.pt, table_of(SEQUENCES), tmp_path / "a")
    gone = Entry(
        "gone",
        "gone.fasta",
        [(0, None)],
        ["d"],
        [WrittenFile("gone.pt", 1, "s")],
        Tally(),
        0,
        1.0,
        False,
        True,
    )
    journal = tmp_path / ".dist_esm" / "journal" / "00000000000000000001.00000.jsonl"
    journal.parent.mkdir(parents=True)
    journal.write_bytes(encode(gone))
    code = (
        "import sys, dist_esm; heavy = {'torch', 'h5py', 'pyarrow', 'safetensors'};"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules);"
        f"dist_esm.load({str(tmp_path)!r}); assert not heavy - {{'torch'}} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_importing_the_package_takes_no_time():
    """Half a second would be noticed; it is some thirty milliseconds, of which a busy machine makes more."""
    code = (
        "import time; began = time.process_time(); import dist_esm, dist_esm.__main__;"
        "print(time.process_time() - began)"
    )
    assert float(run_python("-c", code).stdout) < 0.5


def test_public_names_are_there_and_completed():
    assert set(dist_esm.__all__) <= set(dir(dist_esm))
    assert all(getattr(dist_esm, name) is not None for name in dist_esm.__all__)
    with pytest.raises(AttributeError, match=r"^module 'dist_esm' has no attribute 'nonsense'$"):
        dist_esm.nonsense  # noqa: B018 - it is looked up


def test_what_is_looked_for_before_a_run_is_what_pip_installs():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert list(REQUIRED.values())[: len(project["dependencies"])] == project["dependencies"]


def test_packages_that_are_absent_are_one_line():
    """Without site-packages nothing that is needed can be found."""
    done = run_python("-S", "-m", "dist_esm", "input=x", PYTHONPATH=str(ROOT))
    (line,) = done.stderr.splitlines()
    assert done.returncode == 1
    assert line.startswith(f"dist_esm: error: not installed for {sys.executable}: torch, fair-esm, ")
    assert f"run {sys.executable} -m pip install 'torch>=2.11' 'fair-esm>=2.0,<3'" in line


def test_a_torch_that_is_too_old_is_one_line(tmp_path):
    (tmp_path / "torch-2.4.1.dist-info").mkdir()
    (tmp_path / "torch-2.4.1.dist-info" / "METADATA").write_text("Name: torch\nVersion: 2.4.1\n")
    done = run_python("-m", "dist_esm", "input=x", PYTHONPATH=f"{tmp_path}:{ROOT}")
    assert done.returncode == 1
    (line,) = done.stderr.splitlines()
    assert re.search(
        r"torch 2\.4\.1 is too old for .*, 2\.11 is needed: run .* --upgrade 'torch>=2\.11'$", line
    )


def test_a_python_that_is_too_old_is_one_line():
    """What is imported first can be read by old ones, too; how they end is tried with an arranged number."""
    ast.parse((ROOT / "dist_esm" / "__init__.py").read_text(encoding="utf-8"), feature_version=(3, 0))
    code = "import sys; sys.version_info = (3, 8, 18, 'final', 0); import dist_esm"
    done = run_python("-c", code)
    assert done.returncode == 1
    expected = f"dist_esm: error: Python 3.8 is too old ({sys.executable}): use Python 3.11 or newer\n"
    assert done.stderr == expected


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The wheel in an environment of its own, which finds the other packages in this one."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder / "venv"], check=True)
    pip = [sys.executable, "-m", "pip"]
    quiet = ["--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "wheel", *quiet, "--wheel-dir", folder, ROOT], check=True, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    python = folder / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", *quiet, wheel], check=True, cwd=folder)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (packages / "others.pth").write_text("\n".join(site.getsitepackages()))
    return folder


def test_a_wheel_runs_from_anywhere(installed, tmp_path):
    (tmp_path / "a.fasta").write_text(">a\nMKTAYIAKQR\n")
    script = installed / "venv" / "bin" / "dist-esm"
    words = ["input=a.fasta", "output_dir=out", MODEL, "model.weights=random", "device=cpu"]
    done = subprocess.run(
        [script, *words],
        capture_output=True,
        text=True,
        env=environment(PYTHONPATH=""),
        check=False,
        cwd=tmp_path,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    code = "import dist_esm; print(dist_esm.__file__, dist_esm.load('out').ids)"
    python = installed / "venv" / "bin" / "python"
    said = subprocess.check_output(
        [python, "-c", code], text=True, env=environment(PYTHONPATH=""), cwd=tmp_path
    )
    assert said == f"{next((installed / 'venv').glob('lib/*/site-packages'))}/dist_esm/__init__.py ['a']\n"


def test_mypy_sees_the_types_in_a_users_script(installed, tmp_path):
    (tmp_path / "script.py").write_text(
        "import dist_esm\n"
        "from dist_esm import Embedder, load\n"
        "reveal_type(load('embeddings').ids)\n"
        "reveal_type(dist_esm.count_sequences('a.fasta'))\n"
        "reveal_type(dist_esm.load('embeddings').vectors)\n"
        "load(5)\n"
        "dist_esm.nonsense\n"
    )
    (tmp_path / "mypy.ini").write_text(
        "[mypy]\nfollow_imports = silent\n[mypy-torch.*]\nfollow_imports = skip\n"
    )
    python = installed / "venv" / "bin" / "python"
    done = subprocess.run(
        [sys.executable, "-m", "mypy", "--python-executable", python, "script.py"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment(PYTHONPATH=""),
        check=False,
        timeout=120,
    )
    for line in (
        'script.py:3: note: Revealed type is "list[str]"',
        'script.py:4: note: Revealed type is "int"',
        'script.py:5: note: Revealed type is "dist_esm.outputs.vectors.Vectors"',
        'script.py:6: error: Argument 1 to "load" has incompatible type "int"',
        'script.py:7: error: Module has no attribute "nonsense"',
    ):
        assert line in done.stdout.replace("builtins.", ""), done.stdout
