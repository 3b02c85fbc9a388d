"""Lines of append-only records: JSON, a tab and its CRC-32, so that a torn line is told from a whole one."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_encode = json.JSONEncoder(separators=(",", ":")).encode
"""Made once: making an encoder takes longer than a short line."""


def encode(content: Any) -> bytes:
    """Return one line."""
    text = _encode(content).encode()
    return text + b"\t%08x\n" % zlib.crc32(text)


def whole_lines(path: Path) -> Iterator[bytes]:
    """Yield the JSON of a file's lines; pass over torn and damaged ones."""
    for line in path.read_bytes().split(b"\n"):
        text, _, checksum = line.rpartition(b"\t")
        if text and checksum == b"%08x" % zlib.crc32(text):
            yield text
