"""Input files and their outputs, from paths, directories and globs."""

from __future__ import annotations

import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from dist_esm.types import FastaFile

SUFFIXES = (".fasta", ".fa", ".faa", ".fas")
PASSED_OVER = (".", "~")
"""Beginnings of hidden and temporary names."""


def find_files(inputs: Sequence[str]) -> list[FastaFile]:
    """Resolve paths, directories and globs to FASTA files with their outputs, in a stable order.

    A file named outright is taken, hidden or not, link or not. Directories are searched recursively: hidden
    and temporary names are skipped, links are followed, and a file or directory that a search or a glob can
    reach in two ways is taken once, under its real name if that is one of them.

    Parameters
    ----------
    inputs
        Paths of files or directories, or patterns as `glob.glob` takes them.

    Returns
    -------
    list of FastaFile
        Sorted by path.

    Raises
    ------
    ValueError
        If a path does not exist or holds no FASTA file, or if two inputs would share an output.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     Path(folder, "viruses").mkdir()
    ...     _ = Path(folder, "viruses", "a.fasta").write_text(">a\\nMKV\\n")
    ...     [file.output.as_posix() for file in find_files([folder])]
    ['viruses/a_ESM']
    """
    candidates: dict[Path, None] = {}
    outright: set[Path] = set()
    roots: list[Path] = []
    for item in inputs:
        path = Path(os.path.abspath(os.path.expanduser(item)))
        if path.is_dir():
            matches, root = sorted(_search(path)), path
            if not matches:
                raise ValueError(
                    f"input={item} holds no FASTA file ({_suffixes()}): name a directory that does"
                )
        elif path.exists():
            if not _has_suffix(path):
                raise ValueError(f"input={item} does not end in {_suffixes()}: rename it if it is FASTA")
            matches, root = [path], path.parent
            outright.add(path)
        elif glob.has_magic(item):
            hits = [
                Path(os.path.abspath(hit))
                for hit in sorted(glob.glob(os.path.expanduser(item), recursive=True))
            ]
            matches = [hit for hit in hits if hit.is_file() and _is_fasta(hit)]
            matches += [
                match
                for hit in hits
                if hit.is_dir() and not hit.name.startswith(PASSED_OVER)
                for match in sorted(_search(hit))
            ]
            if not matches:
                raise ValueError(
                    f"input={item} matches no FASTA file ({_suffixes()}): "
                    "check the pattern, and quote it for the shell"
                )
            root = Path(os.path.commonpath([match.parent for match in matches]))
        else:
            raise ValueError(
                f"input={item} does not exist: name a FASTA file, a directory, a glob or a list of these"
            )
        candidates.update(dict.fromkeys(matches))
        roots.append(root)
    root = Path(os.path.commonpath(roots))
    real = {path: os.path.realpath(path) for path in candidates}
    names: dict[str, Path] = {}
    # Named outright first, then real names, then links: of two ways to one file the first counts.
    for path in sorted(
        candidates, key=lambda path: (path not in outright, real[path] != str(path), str(path))
    ):
        names.setdefault(str(path) if path in outright else real[path], path)
    files = []
    for path in sorted(names.values(), key=str):
        stat = path.stat()
        relative = path.relative_to(root)
        source = str(relative).encode("utf-8", "backslashreplace").decode()  # a name may be any bytes
        files.append(
            FastaFile(path, relative.with_name(_stem(path) + "_ESM"), stat.st_size, stat.st_mtime_ns, source)
        )
    _refuse_collisions(files)
    return files


def refuse_nested(files: Sequence[FastaFile]) -> None:
    """Refuse outputs inside other outputs, for a format whose outputs are folders.

    Raises
    ------
    ValueError
        If one would.
    """
    by_output = {file.output: file.path for file in files}
    for file in files:
        outer = next((by_output[folder] for folder in file.output.parents if folder in by_output), None)
        if outer is not None:
            raise ValueError(
                f"{file.path} would be written inside the output folder of {outer}: "
                "rename one, or embed them into two output_dirs"
            )


def _suffixes() -> str:
    return " ".join(SUFFIXES) + ", each also with .gz"


def _stem(path: Path) -> str:
    """Return the name without its FASTA suffix."""
    name = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    return name[: name.rindex(".")]


def _has_suffix(path: Path) -> bool:
    return path.name.lower().removesuffix(".gz").endswith(SUFFIXES)


def _is_fasta(path: Path) -> bool:
    return _has_suffix(path) and not path.name.startswith(PASSED_OVER)


def _search(directory: Path) -> Iterator[Path]:
    """Yield FASTA files below a directory; real names win over links, and no directory is entered twice."""
    entered: set[str] = set()
    files: dict[str, Path] = {}

    def visit(folder: Path) -> None:
        real = os.path.realpath(folder)
        if real in entered:
            return
        entered.add(real)
        entries = sorted(os.scandir(folder), key=lambda entry: (entry.is_symlink(), entry.name))
        for entry in entries:
            path = Path(entry.path)
            if entry.name.startswith(PASSED_OVER):
                continue
            # A path takes a link to itself for no file, an entry raises.
            target = path if entry.is_symlink() else entry
            if target.is_dir():
                (links if entry.is_symlink() else folders).append(path)
            elif target.is_file() and _is_fasta(path):
                (file_links if entry.is_symlink() else file_names).append(path)

    folders: list[Path] = [directory]
    links: list[Path] = []
    file_names: list[Path] = []
    file_links: list[Path] = []
    while folders or links:
        visit(folders.pop() if folders else links.pop(0))
    for path in sorted(file_names) + sorted(file_links):
        files.setdefault(os.path.realpath(path), path)
    yield from files.values()


def _refuse_collisions(files: Sequence[FastaFile]) -> None:
    taken: dict[Path, Path] = {}
    for file in files:
        other = taken.setdefault(file.output, file.path)
        if other != file.path:
            raise ValueError(
                f"{other} and {file.path} would both be written to {file.output}: "
                "rename one, or embed them into two output_dirs"
            )
