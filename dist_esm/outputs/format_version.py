"""The version of what is written below ``.dist_esm``, and one clear line for what this package cannot read.

Version 1, of files and lines that name none, has no `source` and no `is_last` in the journal, and bare
settings. Version 2 and version 1 have no counts of replaced letters, chains, Latin-1 headers and DNA in a
tally. All before version 4 have the sha256 of whole files, however large. All before version 5 do not say how
many records come in front of what an entry of the journal covers.
"""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, TypeGuard

FORMAT_VERSION = 5
REMEDY = "use the version of dist_esm that wrote it, or name another output_dir"


def version_of(content: Any, path: Path) -> int:
    """Return the format version of a line or a file.

    Parameters
    ----------
    content
        What JSON made of it.
    path
        The file, for the message.

    Raises
    ------
    ValueError
        If it is of a later version, or nothing of this package.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds what dist_esm did not write: {REMEDY}")
    version: Any = content.get("format", 1)
    if not is_count(version):
        raise ValueError(f"{path} has the format version {version!r}, which is none: {REMEDY}")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"{path} has format version {version}, and this version of dist_esm reads up to "
            f"{FORMAT_VERSION}: {REMEDY}"
        )
    return version


def check_fields(cls: type[Any], content: Any, path: Path) -> None:
    """Make sure that a line or a file has exactly the fields of a dataclass.

    Raises
    ------
    ValueError
        If it lacks one, or has one more.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{path} has {content!r} in place of {cls.__name__}: {REMEDY}")
    if content.keys() == cls.__dataclass_fields__.keys():
        return
    names = [field.name for field in fields(cls)]
    missing = [name for name in names if name not in content]
    unknown = [name for name in content if name not in names]
    if missing or unknown:
        problem = f"lacks {missing[0]!r}" if missing else f"has {unknown[0]!r}, which is not known"
        raise ValueError(f"{path} cannot be understood, {cls.__name__} {problem}: {REMEDY}")


def is_count(value: Any) -> TypeGuard[int]:
    """Tell if a value that JSON gave is a whole number that is not negative."""
    return type(value) is int and value >= 0


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises
    ------
    ValueError
        If it is no JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError:
        raise ValueError(f"{path} is damaged, it is no JSON: {REMEDY}") from None
