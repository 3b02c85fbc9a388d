"""Inputs that can be read once: standard input and pipes are copied to a file before anything else is done.

A run reads its inputs several times (it counts, embeds, and compares digests), and on several ranks; rank 0
alone has the pipe. The copy is below output_dir, stays until the run has ended, and is an input of one
unit.
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import stat
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from dist_esm.config import Config
from dist_esm.distributed import World
from dist_esm.launcher import num_restarts
from dist_esm.outputs.trust import refuse_strange_files
from dist_esm.types import FastaFile

log = logging.getLogger("dist_esm")

STANDARD_INPUT = ("-", "/dev/stdin", "/dev/fd/0", "/proc/self/fd/0")
_DESCRIPTOR = re.compile(r"/(?:dev|proc/self)/fd/(\d+)")


def spool_pipes(config: Config, world: World) -> dict[str, Path]:
    """Copy pipes among the inputs to files; rank 0 does it for all.

    Returns
    -------
    dict of str to Path
        For each item of `input` that is a pipe, the file that it was copied to; the same on every rank.

    Raises
    ------
    RefusedError
        On every rank, if one cannot be read.
    """
    spooled = world.all_or_none(_spool, config, world.is_main)
    (told, *_) = world.exchange(json.dumps({item: str(path) for item, path in spooled.items()}))
    return {item: Path(path) for item, path in json.loads(told).items()}


def refuse_pipes(config: Config) -> None:
    """Refuse inputs that can be read once, for a job that copies nothing.

    Raises
    ------
    ValueError
        If there is one.
    """
    for item in config.input_list():
        if _pipe_name(item) is not None:
            raise ValueError(
                f"input={item} is a pipe, which can be read once, and job={config.job.name} copies nothing: "
                "name a file"
            )


def remove_copies(files: Sequence[FastaFile]) -> None:
    """Remove the copies of pipes, when they are needed no more."""
    for file in files:
        if file.copy is not None:
            shutil.rmtree(file.copy.parent, ignore_errors=True)


def remove_leftovers(output_dir: Path, files: Sequence[FastaFile]) -> None:
    """Remove copies of pipes that killed runs left, not those of `files`; under the lock on `output_dir`."""
    own = {file.copy.parent for file in files if file.copy is not None}
    for folder in _folder(output_dir).glob("*"):
        if folder not in own:
            shutil.rmtree(folder, ignore_errors=True)


def _folder(output_dir: Path) -> Path:
    return output_dir.absolute() / ".dist_esm" / "pipes"


def _spool(config: Config, is_main: bool) -> dict[str, Path]:
    """Copy the pipes among the inputs, on rank 0.

    Raises
    ------
    ValueError
        If one is named twice, is a terminal, or cannot be read.
    """
    spooled: dict[str, Path] = {}
    if not is_main:
        return spooled
    for item in config.input_list():
        name = _pipe_name(item)
        if name is None:
            continue
        if item in spooled or name in {path.name for path in spooled.values()}:
            raise ValueError(f"input={item} is a pipe and is named twice: it can be read once")
        refuse_strange_files(config.output_dir)
        if num_restarts() > 0:
            raise ValueError(
                f"input={item} was read before torchrun restarted the ranks: write it to a file first"
            )
        copy = _folder(config.output_dir) / uuid.uuid4().hex / name
        try:
            copy.parent.mkdir(parents=True, exist_ok=True)
            log.info("copying %s to %s", "standard input" if item in STANDARD_INPUT else item, copy)
            with _open(item) as source, open(copy, "wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
        except OSError as error:
            raise ValueError(f"input={item} cannot be copied to {copy} ({error.strerror})") from None
        if not copy.stat().st_size:
            raise ValueError(f"input={item} is empty: did the command that should fill the pipe fail?")
        spooled[item] = copy
    return spooled


def _open(item: str) -> BinaryIO:
    """Open a pipe for reading. A descriptor is read as it is: the file behind it may have been removed."""
    if item in STANDARD_INPUT:
        return os.fdopen(os.dup(0), "rb")
    if descriptor := _DESCRIPTOR.fullmatch(item):
        return os.fdopen(os.dup(int(descriptor[1])), "rb")
    return open(os.path.expanduser(item), "rb")


def _pipe_name(item: str) -> str | None:
    """Return the name of the copy of a pipe; None if the item is none.

    Raises
    ------
    ValueError
        If it is standard input and that is a terminal or closed.
    """
    if item in STANDARD_INPUT:
        if sys.stdin is None or sys.stdin.closed:
            raise ValueError(
                f"input={item}: standard input is closed: pipe FASTA into the command, or name a file"
            )
        if os.isatty(0):
            raise ValueError(
                f"input={item}: standard input is a terminal: pipe FASTA into the command, or name a file"
            )
        mode = os.fstat(0).st_mode
        if stat.S_ISBLK(mode) or stat.S_ISCHR(mode):
            raise ValueError(
                f"input={item}: standard input is a device: pipe FASTA into the command, or name a file"
            )
        return "stdin"
    try:
        mode = os.stat(os.path.expanduser(item)).st_mode
    except (OSError, ValueError):
        return None
    if descriptor := _DESCRIPTOR.fullmatch(item):
        return (
            f"fd{descriptor[1]}"
            if not (stat.S_ISCHR(mode) or stat.S_ISBLK(mode) or stat.S_ISDIR(mode))
            else None
        )
    return os.path.basename(os.path.abspath(os.path.expanduser(item))) if stat.S_ISFIFO(mode) else None
