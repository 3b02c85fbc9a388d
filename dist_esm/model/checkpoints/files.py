"""Files of tensors: torch's archives and safetensors, mapped into memory; other files are named.

Bytes are checked, and fingerprints taken, by several threads at once: that takes about as long as reading the
file.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import re
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, TypeVar

import torch
from torch import Tensor

from dist_esm.names import readable_name

T = TypeVar("T")

CHUNK_BYTES = 1 << 24
NUM_THREADS = 8
AGAIN = "remove it and fetch it again"
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' words for dtypes. Tensors of others are passed over, and missed if the model needs them."""
MAX_HEADER_BYTES = 100_000_000
"""Longest header that the library safetensors reads."""
FIRST_BYTES = (
    (b"version https://git-lfs", "a pointer of git-lfs and no weights", "run `git lfs pull` where it lies"),
    (b"<", "a web page and no checkpoint", AGAIN),
    (b">", "a FASTA file and no weights", "proteins are named by input=, weights by model.weights="),
    (b"\x89HDF", "an HDF5 file, as TensorFlow writes", "name model.safetensors or pytorch_model.bin"),
    (b"GGUF", "a GGUF file", "name fair-esm's .pt or a Hugging Face directory"),
    (b"\x1f\x8b", "compressed with gzip", "unpack it"),
)


def refuse_by_first_bytes(path: Path) -> bytes:
    """Return the first bytes of a file that may hold tensors.

    Raises
    ------
    ValueError
        If the file is empty, or its first bytes are those of another kind of file.
    """
    with path.open("rb") as file:
        first = file.read(64)
    if not first:
        raise ValueError(f"{path} is empty (0 bytes): {AGAIN}")
    if is_safetensors(first):  # the length that it begins with may look like any of the signatures
        return first
    for signature, name, remedy in FIRST_BYTES:
        if first.lstrip().startswith(signature):
            shown = first.split(b"\n")[0][:20].decode("ascii", "replace")
            raise ValueError(f"{path} is {name} (it begins with {shown!r}): {remedy}")
    return first


def is_safetensors(first: bytes) -> bool:
    """Tell from its first bytes whether a file is in safetensors' format: the header's length, then JSON."""
    return len(first) > 8 and first[8:9] == b"{" and int.from_bytes(first[:8], "little") <= MAX_HEADER_BYTES


def read_safetensors(path: Path) -> dict[str, Tensor]:
    """Map a safetensors file into memory.

    Returns
    -------
    dict of name to tensor; each tensor is a view of the file

    Raises
    ------
    ValueError
        If the file is cut off, or its header does not fit its bytes.
    """
    num_bytes = path.stat().st_size
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
        text = file.read(start - 8)
    if start > num_bytes:
        raise ValueError(f"{path} is truncated: {num_bytes} bytes, its header alone has {start}; {AGAIN}")
    try:
        header = json.loads(text)
        entries = {
            name: (entry["dtype"], tuple(entry["shape"]), *entry["data_offsets"])
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{path} is damaged: its header is no safetensors header; {AGAIN}") from None
    stop = start + max((last for *_, last in entries.values()), default=0)
    if stop > num_bytes:
        raise ValueError(f"{path} is truncated: {num_bytes} bytes of {stop}; {AGAIN}")
    with readable_name(path) as name:
        storage = torch.UntypedStorage.from_file(str(name), False, num_bytes)
    assert isinstance(storage, torch.UntypedStorage)
    tensors = {}
    for name, (dtype_name, shape, first, last) in entries.items():
        dtype = DTYPES.get(dtype_name)
        if dtype is None:
            continue
        if last - first != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{path} is damaged: {name} has {last - first} bytes for shape {shape}; {AGAIN}")
        offset, rest = divmod(start + first, dtype.itemsize)
        if rest:  # not aligned, as old writers left it
            copied = view_of(storage, torch.uint8, start + first, (last - first,)).clone()
            tensors[name] = copied.view(dtype).view(shape)
        else:
            tensors[name] = view_of(storage, dtype, offset, shape)
    return tensors


def view_of(storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, shape: tuple[int, ...]) -> Tensor:
    """Return a tensor on a part of a storage, from an offset in numbers of its dtype."""
    strides = [math.prod(shape[axis + 1 :]) for axis in range(len(shape))]
    return torch.empty(0, dtype=dtype).set_(storage, offset, shape, strides)


def read_torch(path: Path) -> Any:
    """Read what `torch.save` wrote; tensors are mapped into memory, and no code in the file is run.

    Raises
    ------
    ValueError
        If the file is cut off, damaged, or holds other objects than tensors and plain values.
    """
    with path.open("rb") as file:
        starts_as_zip = file.read(2) == b"PK"
    is_zip = is_archive(path)
    if starts_as_zip and not is_zip:
        raise ValueError(
            f"{path} is truncated: {path.stat().st_size} bytes without the end of the archive; {AGAIN}"
        )
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), readable_name(path) as name:
            if path.suffix == ".safetensors":  # torch would go by the name
                with path.open("rb") as file:
                    return torch.load(file, map_location="cpu", weights_only=True)
            return torch.load(name, map_location="cpu", weights_only=True, mmap=is_zip)
    except (UnpicklingError, RuntimeError, EOFError, ValueError, KeyError, TypeError, zlib.error) as error:
        foreign = re.search(r"(?:GLOBAL|global:?) `?([\w.]+\.[\w.]+)", str(error))
        if foreign is not None:
            raise ValueError(
                f"{path} cannot be read: it holds objects of {foreign[1]}, and loading these could run code; "
                "save the tensors alone: torch.save(model.state_dict(), PATH)"
            ) from None
        # torch's own advice, to load what is not trusted, is left out.
        reason = str(error).splitlines()[0] if is_zip and not isinstance(error, UnpicklingError) else ""
        raise ValueError(
            f"{path} cannot be read as a checkpoint{': ' + reason if reason else ''}; name fair-esm's .pt, a "
            ".safetensors or a Hugging Face directory, and fetch it again if it should be one"
        ) from None


def is_archive(path: Path) -> bool:
    """Tell if a file is a zip archive, as `torch.save` writes.

    Raises
    ------
    ValueError
        If it is one with a damaged table of contents.
    """
    try:
        return zipfile.is_zipfile(path)
    except (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error) as error:
        raise ValueError(f"{path} is damaged at its end: {error}; {AGAIN}") from None


def read_table(path: Path) -> list[zipfile.ZipInfo]:
    """Read the table of contents of an archive.

    Returns
    -------
    list of ZipInfo
        By names, without the folder that torch names after the file.

    Raises
    ------
    ValueError
        If it is damaged.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            return sorted(archive.infolist(), key=lambda entry: entry.filename.partition("/")[2])
    except (zipfile.BadZipFile, NotImplementedError, ValueError, OSError, struct.error) as error:
        raise ValueError(f"{path} is damaged at its end: {error}; {AGAIN}") from None


def check_and_fingerprint(path: Path) -> str:
    """Return a fingerprint of the bytes of a file, after a check against the checksums that it holds.

    torch's archives hold a checksum of each tensor: all bytes are compared with these, and the fingerprint is
    taken from them. Of other files it is taken from the bytes.

    Raises
    ------
    ValueError
        If some bytes do not have the checksum that the archive states.
    """
    if is_archive(path):
        entries = read_table(path)
        if any(entry.CRC for entry in entries) and all(
            entry.compress_type == zipfile.ZIP_STORED for entry in entries
        ):
            check_archive(path, entries)
            lines = (
                f"{entry.filename.partition('/')[2]} {entry.file_size} {entry.CRC:08x}\n" for entry in entries
            )
            return hashlib.sha256("".join(lines).encode()).hexdigest()[:32]
    starts = range(0, path.stat().st_size, CHUNK_BYTES)
    with path.open("rb") as file:
        digests = in_threads(
            lambda start: hashlib.sha256(os.pread(file.fileno(), CHUNK_BYTES, start)).digest(), starts
        )
    return hashlib.sha256(b"".join(digests)).hexdigest()[:32]


def check_archive(path: Path, entries: Sequence[zipfile.ZipInfo]) -> None:
    """Compare the bytes of an archive's entries with their checksums.

    Raises
    ------
    ValueError
        If some do not fit.
    """
    with path.open("rb") as file:
        descriptor = file.fileno()

        def is_right(entry: zipfile.ZipInfo) -> bool:
            local = os.pread(descriptor, 30, max(0, entry.header_offset))
            lengths = int.from_bytes(local[26:28], "little") + int.from_bytes(local[28:30], "little")
            start = entry.header_offset + 30 + lengths
            checksum = 0
            for chunk in read_chunks(descriptor, start, start + entry.file_size):
                checksum = zlib.crc32(chunk, checksum)
            return local[:4] == b"PK\x03\x04" and checksum == entry.CRC

        results = in_threads(is_right, entries)
    wrong = [entry.filename for entry, fits in zip(entries, results, strict=True) if not fits]
    if wrong:
        more = f" and {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise ValueError(f"{path} is damaged: the checksum of {wrong[0]}{more} is wrong; {AGAIN}")


def read_chunks(descriptor: int, start: int, stop: int) -> Iterator[bytes]:
    """Yield the bytes of a file from `start` up to `stop`."""
    while start < stop:
        chunk = os.pread(descriptor, min(CHUNK_BYTES, stop - start), start)
        if not chunk:
            return
        yield chunk
        start += len(chunk)


def in_threads(work: Callable[[Any], T], items: Sequence[Any]) -> list[T]:
    """Do the same work on each item, some side by side; return the results in order."""
    with ThreadPoolExecutor(min(NUM_THREADS, os.cpu_count() or 1), "check") as threads:
        return list(threads.map(work, items))
