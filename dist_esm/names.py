"""Names that come from outside, of files and of proteins: shown on one line, kept short, opened by any
library.

A name may hold any character: a line feed, an escape sequence that recolours a terminal, bytes that are not
UTF-8. Nothing but data files and JSON may carry such a character as it is.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

NAME_BYTES = 255
"""Bytes of the longest name that file systems take."""
_PART = re.compile(r"\.part(\d{5,})(?:\.[a-z0-9]+)?$")
_SHORT = {"\n": r"\n", "\r": r"\r", "\t": r"\t"}


def printable(text: str) -> str:
    r"""Return text as a terminal, a log or a table can carry it: on one line, without control characters.

    What is not printable is written as Python writes it: ``\n``, ``\x1b``, ``\u202e``; a byte of a file's
    name that is not UTF-8 as ``\udce9`` for 0xe9.

    Examples
    --------
    >>> print(printable("a\nb\x1b[31m"))
    a\nb\x1b[31m
    """
    if text.isprintable():
        return text
    return "".join(letter if letter.isprintable() else escaped(letter) for letter in text)


def escaped(letter: str) -> str:
    """Return one character as an escape sequence of Python."""
    code = ord(letter)
    digits = f"x{code:02x}" if code < 0x100 else f"u{code:04x}" if code < 0x10000 else f"U{code:08x}"
    return _SHORT.get(letter) or f"\\{digits}"


def escaped_field(text: str) -> str:
    r"""Return text as a field of ``failed_files.txt``: as `printable`, with ``|`` as ``\x7c`` and a backslash
    doubled, so that fields can be told apart and be undone.

    Examples
    --------
    >>> text = escaped_field("a|b\n.fa")
    >>> print(text)
    a\x7cb\n.fa
    >>> text.encode("ascii", "backslashreplace").decode("unicode_escape")
    'a|b\n.fa'
    """
    return printable(text.replace("\\", "\\\\")).replace("|", r"\x7c")


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line.

    A line feed in our own messages is part of a name, and shown; those of libraries are laid out in lines,
    which are joined.
    """
    text = str(error)
    if not isinstance(error, (ValueError, OSError)):
        text = " ".join(text.split())
    return printable(text.strip()) or repr(error)


def fitted(name: str, ending: str = "", max_bytes: int = NAME_BYTES) -> str:
    """Return the name of a file: `name` with an ending, which is never cut.

    If both are too long for a file system, the name is cut, with ``~h`` and a hash of all of it behind.
    """
    room = max_bytes - len(os.fsencode(ending))
    return (name if len(os.fsencode(name)) <= room else "".join(cut(name, name, room))) + ending


def output_path(stem: Path, ending: str) -> Path:
    """Return the path of a file of an output, given the output's path without suffix, in a name that fits.

    What is cut is the input's name, so that ``_ESM`` and the ending stay.
    """
    mark = "_ESM" if stem.name.endswith("_ESM") else ""
    return stem.with_name(fitted(stem.name.removesuffix("_ESM"), mark + ending))


def part_ending(number: int) -> str:
    """Return what the name of a numbered part has behind that of its file's output; the first is number 1."""
    return f".part{number:05d}"


def number_of_part(path: str) -> int | None:
    """Return the number of the part that a path is of, with its suffix; None if it is of a whole output.

    Examples
    --------
    >>> number_of_part("a_ESM.part00012.pt"), number_of_part("a_ESM.part00012"), number_of_part("a_ESM.pt")
    (12, 12, None)
    """
    found = _PART.search(path)
    return int(found[1]) if found else None


def few(names: Sequence[str]) -> str:
    """Return the first three of some names, for people, and say if there are more."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def cut(name: str, whole: str, max_bytes: int) -> tuple[str, str]:
    """Return the beginning of a name, and ``~h`` and a hash of `whole` to put behind it: at most `max_bytes`
    together."""
    mark = f"~h{hashlib.sha256(whole.encode('utf-8', 'surrogatepass')).hexdigest()[:16]}"
    name = name[:max_bytes]  # a character takes a byte at least, and a header may have millions
    while len(os.fsencode(name)) > max_bytes - len(mark):
        name = name[:-1]
    return name, mark


@contextmanager
def readable_name(path: Path) -> Iterator[Path]:
    """Give a name by which libraries open a file for reading that take only names in UTF-8.

    The file's own, unless that is not UTF-8: then that of a descriptor, for as long as the block runs.
    """
    try:
        str(path).encode()
    except UnicodeEncodeError:
        with path.open("rb") as file:
            yield Path(f"/dev/fd/{file.fileno()}")
    else:
        yield path
