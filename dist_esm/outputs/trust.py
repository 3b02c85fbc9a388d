"""What is below an output directory is looked at before it is believed: others may have prepared it.

Nothing outside the directory is written, emptied or removed because of a link in it, or of a path in one of
its files.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable
from pathlib import Path, PurePosixPath

from dist_esm.names import output_path
from dist_esm.outputs.formats.registry import FORMATS

SHARDS = ("shards", "pieces")
"""Folder of shards below ``.dist_esm``; version 1 had the second."""
LOOSE = ".files"
"""Suffix of a shard that is a folder with a file for each protein; others end in ``.pt``."""
REPORTS = ("report.json", "failed_files.txt", "verify.json", "selfcheck.json")
"""Files at the top of the directory."""
REMEDY = "remove it if you know it, or name another output_dir"


def refuse_strange_files(output_dir: Path) -> None:
    """Make sure that all below ``.dist_esm`` are files and folders, as only they are ever written there.

    Raises
    ------
    ValueError
        If there is a link, a pipe or a device among them, or a lock that holds something.
    """
    inside = output_dir / ".dist_esm"
    folders = [inside] if os.path.lexists(inside) else []
    if folders and not stat.S_ISDIR(os.lstat(inside).st_mode):
        raise ValueError(f"{inside} is a link, or no folder: {REMEDY}")
    while folders:
        for entry in os.scandir(folders.pop()):
            if entry.is_dir(follow_symlinks=False):
                folders.append(Path(entry.path))
            elif not entry.is_file(follow_symlinks=False):
                raise ValueError(f"{entry.path} is a link, or no file: {REMEDY}")
    lock = inside / "lock"
    if lock.is_file() and lock.stat().st_size:  # taking the lock empties the file, whose other name it may be
        raise ValueError(f"{lock} is no lock of a run, it holds something: {REMEDY}")
    for name in REPORTS:
        if (output_dir / name).is_dir():
            raise ValueError(f"{output_dir / name} is a folder, where a report is to be written: {REMEDY}")


def refuse_linked_folders(output_dir: Path, outputs: Iterable[str | Path]) -> None:
    """Make sure that no folder of an output is a link that leads out of the output directory.

    Parameters
    ----------
    output_dir
        The directory; it may be a link itself.
    outputs
        Paths relative to it.

    Raises
    ------
    ValueError
        With the link and where it leads.
    """
    real = Path(os.path.realpath(output_dir))
    folders = {folder for output in outputs for folder in PurePosixPath(output).parents}
    for folder in sorted(folders):
        path = output_dir / folder
        if path.is_symlink() and not Path(os.path.realpath(path)).is_relative_to(real):
            raise ValueError(
                f"{path} is a link to {os.path.realpath(path)}, outside output_dir, where no run writes: "
                "replace it by a folder, or name another output_dir"
            )


def leads_out(path: str) -> bool:
    """Tell if a path that should lie below a directory does not, or is not written plainly."""
    return "\0" in path or not {"", ".", ".."}.isdisjoint(path.split("/"))


def is_shard(path: str) -> bool:
    """Tell if a path relative to `output_dir` is that of a shard."""
    return path.endswith((".pt", LOOSE)) and path.startswith(
        tuple(f".dist_esm/{folder}/" for folder in SHARDS)
    )


def is_file_of(output: str, path: str) -> bool:
    """Tell if a path is that of an output, given the output's without suffix; both relative to
    `output_dir`."""
    suffixes = "|".join(re.escape(known.suffix) for known in FORMATS.values() if known.suffix)
    ending = re.search(rf"(?:\.part\d{{5,}})?(?:{suffixes})?$", path)
    return ending is not None and str(output_path(Path(output), ending[0])) == path
