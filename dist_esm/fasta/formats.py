"""Formats that are no FASTA, told by their first bytes, with what to do about them."""

from __future__ import annotations

from importlib.util import find_spec

from dist_esm.types import Compression

COMPRESSIONS: dict[bytes, Compression] = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\0": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
"""First bytes of what can be read through, if the Python at hand has it."""
SUFFIXES: dict[str, Compression] = {".gz": "gzip", ".bgz": "gzip", ".bz2": "bz2", ".xz": "xz", ".zst": "zstd"}
_SKIPPABLE = bytes(range(0x50, 0x60))
"""First byte of a frame of zstd that holds no text, as pzstd writes them."""
HEAD = 512
"""Bytes that `name_of_bytes` looks at."""
_MODULES: dict[Compression, tuple[str, ...]] = {
    "gzip": ("zlib",),
    "bz2": ("_bz2",),
    "xz": ("_lzma",),
    "zstd": ("compression.zstd", "backports.zstd"),
}
_UNPACK = {
    "gzip": "gunzip",
    "bz2": "bunzip2",
    "xz": "unxz",
    "zstd": "unzstd",
}
_BYTES: list[tuple[bytes, str]] = [
    (b"PK\x03\x04", "a zip archive: unpack it (unzip) and name the FASTA files in it"),
    (b"PK\x05\x06", "an empty zip archive: there is nothing in it"),
    (b"7z\xbc\xaf\x27\x1c", "a 7z archive: unpack it (7z x) and name the FASTA files in it"),
    (b"Rar!\x1a\x07", "a rar archive: unpack it (unrar x) and name the FASTA files in it"),
    (b"\x1f\x9d", "compressed by compress (.Z): unpack it (uncompress)"),
    (b"\x1f\xa0", "compressed by pack (.z): unpack it (gunzip)"),
    (b"\x04\x22\x4d\x18", "compressed by lz4: unpack it (unlz4)"),
    (b"LZIP", "compressed by lzip: unpack it (lzip -d)"),
    (b"\x89LZO\0", "compressed by lzop: unpack it (lzop -d)"),
    (b"]\0\0", "compressed by lzma: unpack it (unlzma)"),
    (b"\xff\x06\0\0sNaPpY", "compressed by snappy: unpack it"),
    (b"MSCF", "a cab archive: unpack it (cabextract) and name the FASTA files in it"),
    (b"!<arch>\n", "an ar archive: unpack it (ar x) and name the FASTA files in it"),
    (b"\xff\xfe\0\0", "text in UTF-32: convert it (iconv -f utf-32 -t utf-8)"),
    (b"\0\0\xfe\xff", "text in UTF-32: convert it (iconv -f utf-32 -t utf-8)"),
    (b"\xff\xfe", "text in UTF-16: convert it (iconv -f utf-16 -t utf-8)"),
    (b"\xfe\xff", "text in UTF-16: convert it (iconv -f utf-16 -t utf-8)"),
    (b">\0\0\0", "text in UTF-32: convert it (iconv -f utf-32le -t utf-8)"),
    (b"\0\0\0>", "text in UTF-32: convert it (iconv -f utf-32be -t utf-8)"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file: name the FASTA file that it was made of"),
    (b"SQLite format 3\0", "an SQLite database: name the FASTA file that it was made of"),
    (b"PAR1", "a Parquet file: name the FASTA file that it was made of"),
    (b"ARROW1", "an Arrow file: name the FASTA file that it was made of"),
    (b"\x93NUMPY", "a numpy array: name the FASTA file that it was made of"),
    *(
        (bytes([0x80, version]), "a Python pickle: name the FASTA file that it was made of")
        for version in range(2, 6)
    ),
    (b"BAM\x01", "a BAM file of alignments: name the FASTA file of the proteins"),
    (b"CRAM", "a CRAM file of alignments: name the FASTA file of the proteins"),
    (b"\x1aE\xdf\xa3", "a film (Matroska)"),
    (b"\x89PNG", "a picture (PNG)"),
    (b"\xff\xd8\xff", "a picture (JPEG)"),
    (b"\x7fELF", "a program (ELF)"),
    (b"\xd0\xcf\x11\xe0", "a document of an old Microsoft Office: save it as plain text"),
    (b"{\\rtf", "a document in RTF: save it as plain text"),
]
_TEXTS: list[tuple[tuple[str, ...], str]] = [
    (("@",), "this looks like FASTQ: convert its reads to proteins, in FASTA"),
    (("<!doctype", "<html"), "this is a web page, as a failed download leaves it: fetch the file again"),
    (("<?xml",), "this is XML: fetch it as FASTA"),
    (("{", "["), "this looks like JSON: fetch it as FASTA"),
    (("version https://git-lfs",), "this is a Git LFS pointer: fetch the file itself (git lfs pull)"),
    (("/annex/", "../.git/annex"), "this is a git-annex pointer: fetch the file itself (git annex get)"),
    (("locus  ",), "this is a GenBank file: convert it to FASTA"),
    (("id   ",), "this is an EMBL or UniProt flat file: convert it to FASTA"),
    (("clustal", "muscle ("), "this is an alignment in Clustal format: convert it to FASTA"),
    (("# stockholm",), "this is an alignment in Stockholm format: convert it to FASTA"),
    (("#nexus",), "this is a NEXUS file: convert it to FASTA"),
    (("##gff", "##gtf"), "this is a GFF file of annotations: name the FASTA file of the proteins"),
    (("header  ", "atom  ", "data_"), "this is a file of structures: convert its sequences to FASTA"),
    (("%pdf",), "this is a PDF: save the sequences as plain text"),
]


def compression_of(head: bytes) -> Compression | None:
    """Return how a file is compressed, given its first bytes; None: not in a way that can be read through."""
    if head[:1] in _SKIPPABLE and head[1:4] == b"\x2a\x4d\x18":
        return "zstd"
    return next((name for magic, name in COMPRESSIONS.items() if head.startswith(magic)), None)


def is_readable(compression: Compression) -> bool:
    """Tell if the Python at hand can read a compression."""
    return any(_has(module) for module in _MODULES[compression])


def _has(module: str) -> bool:
    try:
        return find_spec(module) is not None
    except ModuleNotFoundError:  # the package that it would be in is not there
        return False


def readable_suffixes() -> tuple[str, ...]:
    """Return the suffixes of compressed files that the Python at hand can read."""
    return tuple(suffix for suffix, compression in SUFFIXES.items() if is_readable(compression))


def name_of_compression(compression: Compression) -> str:
    """Return a compression that cannot be read here, and the remedy, in words."""
    install = "install backports.zstd, or " if compression == "zstd" else ""
    remedy = f"{install}unpack it ({_UNPACK[compression]})"
    return f"compressed by {compression}, which this Python cannot read: {remedy}"


def name_of_bytes(head: bytes) -> str | None:
    """Return what a file is and what to do, given its first bytes; None if it may be text in UTF-8.

    Compression that can be read through is not named: `compression_of` has it.
    """
    for magic, words in _BYTES:
        if head.startswith(magic):
            return words
    if head[257:262] == b"ustar" or _is_old_tar(head):
        return "a tar archive: unpack it (tar xf) and name the FASTA files in it"
    if len(head) >= 4 and head[0:1] and not any(head[1:12:2]) and all(head[0:12:2]):
        return "text in UTF-16: convert it (iconv -f utf-16le -t utf-8)"
    if len(head) >= 4 and not any(head[0:12:2]) and all(head[1:12:2]):
        return "text in UTF-16: convert it (iconv -f utf-16be -t utf-8)"
    return None


def _is_old_tar(head: bytes) -> bool:
    """Tell if this is the header of a tar archive without a signature: a name and numbers in octal."""
    name = head[:100].rstrip(b"\0")
    is_name = 0 < len(name) < 100 and not any(byte < 32 or byte == 127 for byte in name)
    return is_name and len(head) >= 257 and not head[100:156].strip(b"01234567 \0")


def name_of_packed(head: bytes, compression: Compression) -> str | None:
    """Return what is inside a compressed file if that is no text, given its first bytes."""
    inner = compression_of(head)
    if inner is not None:
        twice = "twice" if inner == compression else f"by {inner}, and again by {compression}"
        return f"compressed {twice}: unpack it ({_UNPACK[compression]}) and name what comes out"
    words = name_of_bytes(head)
    return f"{words} (inside {compression})" if words and not words.startswith("a tar") else words


def name_of_text(line: str) -> str | None:
    """Return what a text file is and what to do, given its first line; None if it is not known."""
    low = line.lower()
    return next((words for beginnings, words in _TEXTS if low.startswith(beginnings)), None)
