"""Input files and their outputs, from paths, directories and globs.

A search takes files with a suffix of FASTA. What it sees and does not take is counted and listed, and a
link that leads nowhere is an input that fails: an input that is missing must not look as if it had never
been there.
"""

from __future__ import annotations

import glob
import os
import re
import stat
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dist_esm.fasta.formats import SUFFIXES as PACKED
from dist_esm.fasta.formats import readable_suffixes
from dist_esm.names import NAME_BYTES
from dist_esm.types import FastaFile

SUFFIXES = (".fasta", ".fa", ".faa", ".fas")
OTHER_SUFFIXES = (
    *(".pep", ".aa", ".mpfa", ".fna", ".ffn", ".fsa", ".frn", ".seq", ".prot", ".protein", ".proteins"),
    *(".pir", ".nbrf", ".a2m", ".a3m", ".afa", ".aln", ".mfa", ".mfasta", ".fst", ".fastas", ".txt"),
)
"""Suffixes that a search does not take; the output of such a file, named outright, is named without it."""
HIDDEN = (".", "~")
"""Beginnings of hidden and temporary names."""
MOST_LISTED = 1000
"""Files passed over that the report names."""
_OUTPUTS = (".dist_esm", "report.json", "report.html", "failed_files.txt", "verify.json", "selfcheck.json")
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/\d+")
_MAGIC = re.compile(r"[*?\[\]]")


@dataclass(frozen=True)
class PassedOver:
    """A file that a search or a pattern met and did not take, and why."""

    path: Path
    reason: str


@dataclass(frozen=True)
class Inputs:
    """The files to embed, and those that a search passed over."""

    files: list[FastaFile]
    passed_over: list[PassedOver]

    def summary(self) -> str | None:
        """Return what was passed over in a line, None if nothing was."""
        if not self.passed_over:
            return None
        reasons = Counter(item.reason for item in self.passed_over)
        shown = ", ".join(f"{count} {reason}" for reason, count in reasons.most_common(8))
        more = f", {len(reasons) - 8} reasons more" if len(reasons) > 8 else ""
        files = f"{len(self.passed_over)} file" + "s" * (len(self.passed_over) > 1)
        return f"passed over {files} ({shown}{more}): name a file outright to embed it"

    def report(self) -> dict[str, Any]:
        """Return what was passed over as report.json has it."""
        reasons = Counter(item.reason for item in self.passed_over)
        return {
            "files": len(self.passed_over),
            "by_reason": dict(reasons.most_common()),
            "listed": [
                {"path": str(item.path), "reason": item.reason} for item in self.passed_over[:MOST_LISTED]
            ],
        }


def find_files(inputs: Sequence[str]) -> list[FastaFile]:
    """Resolve paths, directories and globs to FASTA files with their outputs, in a stable order.

    A file named outright is taken, whatever its suffix, hidden or not, link or not. Directories are
    searched recursively: files with a suffix of FASTA, also compressed, are taken, hidden and temporary
    names are not, links are followed, and a file or directory that can be reached in two ways is taken
    once, under its real name if that is one of them.

    Parameters
    ----------
    inputs
        Paths of files or directories, or patterns as `glob.glob` takes them.

    Returns
    -------
    list of FastaFile
        Sorted by path. A link that leads nowhere is among them, with the reason why it cannot be read.

    Raises
    ------
    ValueError
        If a path does not exist or holds no FASTA file, is a device, or if two inputs would share an output.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     Path(folder, "viruses").mkdir()
    ...     _ = Path(folder, "viruses", "a.fasta").write_text(">a\\nMKV\\n")
    ...     [file.output.as_posix() for file in find_files([folder])]
    ['viruses/a_ESM']
    """
    return search_inputs(inputs).files


def search_inputs(
    inputs: Sequence[str], spooled: Mapping[str, Path] | None = None, output_dir: Path | None = None
) -> Inputs:
    """Do what `find_files` does, and list what a search passed over.

    Parameters
    ----------
    inputs
        Paths of files or directories, or patterns.
    spooled
        For pipes among them, the files that they were copied to.
    output_dir
        Where outputs are written: those are no inputs that were passed over.

    Raises
    ------
    ValueError
        As `find_files`.
    """
    found = _Found()
    roots: list[Path] = []
    files: list[FastaFile] = []
    for item in inputs:
        if spooled and item in spooled:
            files.append(_spooled_file(item, spooled[item]))
            continue
        path = Path(os.path.abspath(os.path.expanduser(item)))
        if path.is_dir():
            roots.append(path)
            if not found.search(path):
                raise ValueError(
                    f"input={item} holds no FASTA file ({_suffixes()}){found.words()}: "
                    "name a directory that does, or name files outright"
                )
        elif os.path.lexists(path):
            if problem := _not_a_file(path):
                raise ValueError(
                    f"input={item} is a {problem}, which cannot be read twice: name a FASTA file"
                )
            roots.append(path.parent)
            found.take(path, outright=True)
        elif glob.has_magic(item):
            matches = found.match(item)
            if not matches:
                raise ValueError(
                    f"input={item} matches no FASTA file ({_suffixes()}){found.words()}: "
                    "check the pattern, and quote it for the shell"
                )
            roots.append(Path(os.path.commonpath([match.parent for match in matches])))
        elif _DESCRIPTOR.fullmatch(item):
            raise ValueError(
                f"input={item} is not there: torchrun passes its ranks standard input, but no other pipe; "
                "use input=- and pipe into the command, for example with < <(...)"
            )
        else:
            raise ValueError(
                f"input={item} does not exist: name a FASTA file, a directory, a glob or a list of these"
            )
    if roots:
        files += found.files(Path(os.path.commonpath(roots)))
    files.sort(key=lambda file: str(file.path))
    _refuse_collisions(files)
    taken = {file.path for file in files}
    passed_over = [
        PassedOver(path, reason)
        for path, reason in sorted(found.passed_over.items(), key=lambda item: str(item[0]))
        if path not in taken and not (output_dir and _is_output(path, Path(os.path.abspath(output_dir))))
    ]
    return Inputs(files, passed_over)


class _Found:
    """What was found so far: files to take, and files passed over."""

    def __init__(self) -> None:
        self.candidates: dict[Path, None] = {}
        self.outright: set[Path] = set()
        self.passed_over: dict[Path, str] = {}
        self._suffixes = _search_suffixes()

    def take(self, path: Path, outright: bool = False) -> None:
        """Take a file."""
        self.candidates[path] = None
        if outright:
            self.outright.add(path)

    def words(self) -> str:
        """Return what was passed over, for the message that nothing was found."""
        summary = Inputs([], [PassedOver(path, why) for path, why in self.passed_over.items()]).summary()
        return f"; {summary.partition(':')[0]}" if summary else ""

    def search(self, directory: Path) -> list[Path]:
        """Take the FASTA files below a directory, and return them.

        Real names win over links, and no directory is entered twice.
        """
        entered: set[str] = set()
        folders: list[Path] = [directory]
        links: list[Path] = []
        names: list[Path] = []
        file_links: list[Path] = []
        while folders or links:
            folder = folders.pop() if folders else links.pop(0)
            real = os.path.realpath(folder)
            if real in entered:
                continue
            entered.add(real)
            try:
                entries = sorted(os.scandir(folder), key=lambda entry: (entry.is_symlink(), entry.name))
            except OSError as error:
                raise ValueError(
                    f"{folder} cannot be searched for inputs ({error.strerror}): make it readable"
                ) from None
            for entry in entries:
                path = Path(entry.path)
                # A path takes a link to itself for no file, an entry raises.
                target = path if entry.is_symlink() else entry
                if not entry.name.startswith(HIDDEN) and target.is_dir():
                    (links if entry.is_symlink() else folders).append(path)
                elif reason := self.why_not(path):
                    self.passed_over[path] = reason
                else:
                    (file_links if entry.is_symlink() else names).append(path)
        distinct: dict[str, Path] = {}
        for path in sorted(names) + sorted(file_links):
            distinct.setdefault(_real_name(path), path)
        for path in distinct.values():
            self.take(path)
        return list(distinct.values())

    def match(self, pattern: str) -> list[Path]:
        """Take the files that a pattern matches and the FASTA files below directories that it matches.

        A pattern that ends in a suffix, such as ``*.pep``, names files of this suffix outright.
        """
        last = os.path.basename(pattern)
        suffix = last[last.rindex(".") :] if "." in last else ""
        names_suffix = bool(suffix) and not _MAGIC.search(suffix) and suffix.lower() not in PACKED
        matches = []
        for hit in sorted(glob.glob(os.path.expanduser(pattern), recursive=True)):
            path = Path(os.path.abspath(hit))
            if path.is_dir():
                if not path.name.startswith(HIDDEN):
                    matches += self.search(path)
                continue
            reason = self.why_not(path)
            if reason and not (
                names_suffix and not path.name.startswith(HIDDEN) and _not_a_file(path) is None
            ):
                self.passed_over[path] = reason
            else:
                self.take(path)
                matches.append(path)
        return matches

    def why_not(self, path: Path) -> str | None:
        """Return why a search does not take a file; None if it does."""
        if path.name.startswith(HIDDEN):
            return "hidden or temporary"
        name = path.name.lower()
        if (problem := _not_a_file(path)) is not None:
            return problem
        if name.endswith(self._suffixes):
            return None
        if not path.exists():  # a link; without a suffix it may have led to a folder of inputs
            return "link that leads nowhere" if "." in name else None
        stem = next((name[: -len(suffix)] for suffix in PACKED if name.endswith(suffix)), name)
        if name != stem and stem.endswith(SUFFIXES):
            return f"{name[len(stem) :]} that this Python cannot read"
        ending = re.search(r"\.[a-z0-9_+~-]{1,12}$", stem)
        return (ending[0] if ending else "no suffix") + name[len(stem) :]

    def files(self, root: Path) -> list[FastaFile]:
        """Return the files to embed, each once, with their outputs below the common root."""
        real = {path: _real_name(path) for path in self.candidates}
        names: dict[str, Path] = {}
        # Named outright first, then real names, then links: of two ways to one file the first counts.
        for path in sorted(
            self.candidates, key=lambda path: (path not in self.outright, real[path] != str(path), str(path))
        ):
            names.setdefault(str(path) if path in self.outright else real[path], path)
        return [_fasta_file(path, path.relative_to(root)) for path in names.values()]


def _fasta_file(path: Path, relative: Path) -> FastaFile:
    source = _text(relative)
    output = relative.with_name(_stem(path.name) + "_ESM")
    try:
        status = path.stat()
    except OSError:
        return FastaFile(path, output, 0, 0, source, problem=_broken_link(path))
    return FastaFile(path, output, status.st_size, status.st_mtime_ns, source)


def _spooled_file(item: str, copy: Path) -> FastaFile:
    """Return the input that a pipe is, which was copied to a file."""
    status = copy.stat()
    output = Path(_stem(copy.name) + "_ESM")
    return FastaFile(Path(item), output, status.st_size, status.st_mtime_ns, _text(item), copy=copy)


def _text(path: Path | str) -> str:
    """Return a path as outputs name it, which take text in UTF-8 alone; a name may be any bytes."""
    return str(path).encode("utf-8", "backslashreplace").decode()


def _broken_link(path: Path) -> str:
    """Return why a link cannot be read."""
    if not path.is_symlink():
        return "it cannot be looked at, or was removed since it was found"
    target = os.path.realpath(path)
    is_loop = os.path.lexists(target)  # where the walk along the links stops, there is a link
    return f"it is a link to {target}, which " + ("leads back to itself" if is_loop else "is not there")


def _real_name(path: Path) -> str:
    """Return a path without links; one that leads nowhere stands for itself."""
    return os.path.realpath(path) if path.exists() else os.path.join(os.path.realpath(path.parent), path.name)


def _is_output(path: Path, output_dir: Path) -> bool:
    """Tell if a file that is no input is there because of a run into `output_dir`."""
    if not path.is_relative_to(output_dir):
        return False
    return path.name in _OUTPUTS or any("_ESM" in part for part in path.relative_to(output_dir).parts)


def _not_a_file(path: Path) -> str | None:
    """Return what a path is that is no file; None for files and for links that lead nowhere."""
    try:
        mode = os.stat(path).st_mode
    except OSError:
        return None
    if stat.S_ISFIFO(mode):
        return "pipe"
    if stat.S_ISSOCK(mode):
        return "socket"
    return "device" if stat.S_ISCHR(mode) or stat.S_ISBLK(mode) else None


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


def fail_long_paths(files: Sequence[FastaFile], output_dir: Path) -> list[FastaFile]:
    """Return the files with a reason to fail for each whose outputs would have too long a path.

    Names are cut to what file systems take (`dist_esm.names.fitted`), paths cannot be.
    """
    longest = os.pathconf("/", "PC_PATH_MAX") - 1  # without the byte that ends it
    checked = []
    for file in files:
        needed = len(os.fsencode(output_dir / file.output.parent)) + 1 + NAME_BYTES
        if needed > longest and file.problem is None:
            problem = (
                f"the path of its output may have {needed} bytes, and this system takes {longest}: "
                "name an output_dir with a shorter path, or change into it and write output_dir=."
            )
            file = replace(file, problem=problem)
        checked.append(file)
    return checked


def _search_suffixes() -> tuple[str, ...]:
    """Return the endings of names that a search takes."""
    packed: Iterable[str] = readable_suffixes()
    return (*SUFFIXES, *(suffix + end for suffix in SUFFIXES for end in packed))


def _suffixes() -> str:
    return " ".join(SUFFIXES) + f", each also with {' '.join(readable_suffixes())}"


def _stem(name: str) -> str:
    """Return a name without the suffixes of compression and of sequences, if it has such."""
    stem = name
    for packed in PACKED:
        if stem.lower().endswith(packed) and len(stem) > len(packed):
            stem = stem[: -len(packed)]
            break
    for suffix in (*SUFFIXES, *OTHER_SUFFIXES):
        if stem.lower().endswith(suffix) and len(stem) > len(suffix):
            return stem[: -len(suffix)]
    return stem


def _refuse_collisions(files: Sequence[FastaFile]) -> None:
    taken: dict[Path, Path] = {}
    for file in files:
        other = taken.setdefault(file.output, file.path)
        if other != file.path:
            raise ValueError(
                f"{other} and {file.path} would both be written to {file.output}: "
                "rename one, or embed them into two output_dirs"
            )
