"""The room for outputs on their file system, against what they will take."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from dist_esm.config import Config, Include, SaveDtype
from dist_esm.jobs.plan.work import Output
from dist_esm.model.memory import size_in_words
from dist_esm.outputs.formats.registry import FORMATS
from dist_esm.outputs.output_dir import nearest_folder

TIGHT = 0.9
"""A warning is given when outputs will take more than this share of what is free."""


@dataclass(frozen=True)
class Room:
    """What a file system has left for this user; None if it does not say."""

    num_bytes: int | None
    inodes: int | None
    block: int
    """Bytes that a file's size is rounded up to."""


def room_in(output_dir: Path, reclaimed: int = 0) -> Room:
    """Return the room on the file system of a directory, which need not be there yet.

    Parameters
    ----------
    output_dir
        The directory.
    reclaimed
        Bytes that are removed before anything is written.
    """
    status = os.statvfs(nearest_folder(output_dir))
    return Room(
        status.f_bavail * status.f_frsize + reclaimed if status.f_blocks else None,
        status.f_favail if status.f_files else None,
        status.f_frsize,
    )


def refuse_too_little(output: Output, room: Room, config: Config) -> None:
    """Refuse a run whose outputs cannot fit for certain.

    Raises
    ------
    ValueError
        With what is needed, what there is, and how to need less.
    """
    if room.num_bytes is not None and output.least_bytes > room.num_bytes:
        less = [
            *(["save_dtype=float16, which halves them"] if config.save_dtype is SaveDtype.float32 else []),
            *(["include=[mean]"] if Include.per_tok in config.include else []),
        ]
        raise ValueError(
            f"output_dir={config.output_dir} has {size_in_words(room.num_bytes)} free, and the numbers alone "
            f"take {size_in_words(output.least_bytes)}: name an output_dir with more room"
            + "".join(f", or use {remedy}" for remedy in less)
        )
    if room.inodes is not None and output.least_files > room.inodes:
        folders = ", ".join(name for name, known in FORMATS.items() if known.is_folder)
        others = " or ".join(f"format={name}" for name, known in FORMATS.items() if not known.is_folder)
        raise ValueError(
            f"output_dir={config.output_dir} has room for {room.inodes:,} more files, and "
            f"format={config.format.name} writes {output.least_files:,} and more: use {others}, which "
            f"write one file for each input (not {folders}), or name an output_dir with more inodes"
        )


def remark_on_room(output: Output, room: Room) -> str | None:
    """Return a warning if there may be too little room; None if there is enough, or nobody knows."""
    on_disk = output.num_bytes + output.files * room.block // 2
    if room.num_bytes is not None and on_disk > TIGHT * room.num_bytes:
        return (
            f"the outputs take about {size_in_words(on_disk)}, and {size_in_words(room.num_bytes)} are free: "
            "the disk may be full before the end"
        )
    if room.inodes is not None and output.files > TIGHT * room.inodes:
        return f"the outputs are about {output.files:,} files, and there is room for {room.inodes:,}"
    return None
