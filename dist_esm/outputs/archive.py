"""The container of `torch.save`, with the storages first.

It is a zip archive whose members are stored as they are. `torch.load` finds them by name, so their order is
free. With the numbers in front of the pickle, where they stand depends on their sizes alone, and not on ids
and headers. The bytes depend on the content alone: torch's own writer adds members from version to version.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dist_esm.outputs.pickling import Storage, pickled

NAME = "archive"
ALIGNMENT = 64
"""Bytes at whose multiples storages begin, as torch has it."""
FEWEST_LARGE = 0xFFFFFFFF
"""Sizes and offsets from here on take the fields of zip64."""
UTF8_NAME_AND_DESCRIPTOR = 0x0808
"""Flags of a member: its name is UTF-8, its checksum stands behind it."""
VERSION, VERSION_LARGE = 20, 45
"""Of the zip format that a reader has to know."""


@dataclass(frozen=True)
class Member:
    """One file in the archive."""

    name: str
    num_bytes: int
    offset: int
    """Of its header in the archive."""

    @property
    def is_large(self) -> bool:
        """Its size takes the fields of zip64."""
        return self.num_bytes >= FEWEST_LARGE

    def header(self) -> bytes:
        """Return what stands in front of its bytes; its length does not depend on them."""
        name = f"{NAME}/{self.name}".encode()
        size = min(self.num_bytes, FEWEST_LARGE)
        extra = struct.pack("<HHQQ", 1, 16, self.num_bytes, self.num_bytes) if self.is_large else b""
        padding = -(self.offset + 30 + len(name) + len(extra) + 4) % ALIGNMENT
        extra += struct.pack("<2sH", b"FB", padding) + b"Z" * padding
        fields = (b"PK\3\4", self._version, UTF8_NAME_AND_DESCRIPTOR, 0, 0, 0, 0, size, size)
        return struct.pack("<4sHHHHHIIIHH", *fields, len(name), len(extra)) + name + extra

    @property
    def _version(self) -> int:
        return VERSION_LARGE if self.is_large else VERSION

    @property
    def start(self) -> int:
        """Offset of its first byte in the archive."""
        return self.offset + len(self.header())

    def descriptor(self, crc: int) -> bytes:
        """Return what stands behind its bytes."""
        sizes = "QQ" if self.is_large else "II"
        return struct.pack(f"<4sI{sizes}", b"PK\7\10", crc, self.num_bytes, self.num_bytes)

    @property
    def stop(self) -> int:
        """Offset of what comes behind it."""
        return self.start + self.num_bytes + len(self.descriptor(0))

    def entry(self, crc: int) -> bytes:
        """Return its line in the directory at the archive's end."""
        name = f"{NAME}/{self.name}".encode()
        large = [self.num_bytes] * 2 if self.is_large else []
        large += [self.offset] if self.offset >= FEWEST_LARGE else []
        extra = struct.pack(f"<HH{len(large)}Q", 1, 8 * len(large), *large) if large else b""
        version = VERSION_LARGE if large else VERSION
        size, offset = min(self.num_bytes, FEWEST_LARGE), min(self.offset, FEWEST_LARGE)
        fields = (b"PK\1\2", version, version, UTF8_NAME_AND_DESCRIPTOR, 0, 0, 0, crc, size, size)
        rest = (len(name), len(extra), 0, 0, 0, 0, offset)
        return struct.pack("<4sHHHHHHIIIHHHHHII", *fields, *rest) + name + extra


def storage_members(storages: Sequence[Storage]) -> list[Member]:
    """Return where storages stand, in order."""
    members: list[Member] = []
    for storage in storages:
        offset = members[-1].stop if members else 0
        members.append(Member(f"data/{storage.key}", storage.num_bytes, offset))
    return members


def rest_of_archive(members: Sequence[Member], crcs: Sequence[int], content: Mapping[str, Any]) -> bytes:
    """Return all that stands behind the storages: the pickle and the directory of the archive.

    Parameters
    ----------
    members, crcs
        The storages, and the CRC-32 of each.
    content
        What `torch.load` returns; its tensors are `StorageView`s.
    """
    everything = list(zip(members, crcs, strict=True))
    begin = offset = members[-1].stop if members else 0
    text = io.BytesIO()
    for name, data in (("data.pkl", pickled(content)), ("byteorder", b"little"), ("version", b"3\n")):
        member, crc = Member(name, len(data), offset), zlib.crc32(data)
        for part in (member.header(), data, member.descriptor(crc)):
            text.write(part)
        everything.append((member, crc))
        offset = member.stop
    directory = b"".join(member.entry(crc) for member, crc in everything)
    text.write(directory)
    end = begin + text.tell()
    num_members = len(everything)
    version = VERSION_LARGE
    text.write(
        struct.pack(
            "<4sQHHIIQQQQ", b"PK\6\6", 44, version, version, 0, 0, num_members, num_members,
            len(directory), offset,
        )
    )  # fmt: skip
    text.write(struct.pack("<4sIQI", b"PK\6\7", 0, end, 1))
    sizes = (min(len(directory), FEWEST_LARGE), min(offset, FEWEST_LARGE))
    text.write(struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, num_members, num_members, *sizes, 0))
    return text.getvalue()
