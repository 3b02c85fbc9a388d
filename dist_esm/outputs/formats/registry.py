"""The formats of outputs, one line each.

A new format is a module in this folder, which says in a `CODEC` how it is written and opened, and a line in
`FORMATS`. Nothing is imported for a format before it is used. This module imports nothing of the package, so
that the configuration can take the names from here.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dist_esm.outputs.formats.base import Codec


@dataclass(frozen=True)
class OutputFormat:
    """A format, as far as it is known before its module is imported."""

    name: str
    """Name of the format and of its module."""
    suffix: str
    """Suffix of its files; "" if an output is a folder of files."""
    package: str | None = None
    """Package that writes it or reads it back, if that is not installed with dist_esm itself."""
    can_compress: bool = False
    """Its numbers may be compressed; its codec has `write_compressed`."""
    max_text: int | None = None
    """Bytes of ids and headers in JSON that one output holds; None: any number."""

    @property
    def is_folder(self) -> bool:
        """True if an output is a folder of files."""
        return not self.suffix

    @property
    def codec(self) -> Codec:
        """How it is written and opened."""
        codec: Codec = import_module(f"{__package__}.{self.name}").CODEC
        return codec


FORMATS = {
    output_format.name: output_format
    for output_format in (
        OutputFormat("pt", ".pt"),
        OutputFormat("fair_esm", ""),
        OutputFormat("h5", ".h5", "h5py"),
        OutputFormat("parquet", ".parquet", "pyarrow", can_compress=True),
        # Its readers take headers of 100 MB at most, and there is more in one than ids and headers.
        OutputFormat("safetensors", ".safetensors", max_text=99_000_000),
        OutputFormat("npy", ""),
    )
}
FORMAT_NAMES = tuple(FORMATS)
"""The values of `format=`."""


def package_of(name: str) -> str | None:
    """Return the package that a format needs beyond those that are always there."""
    return FORMATS[name].package


def format_at(path: Path) -> OutputFormat | None:
    """Return the format of what is at a path: by the suffix of a file, by the marks of a folder; None if it
    is no output."""
    if path.is_dir():
        folders = (output_format for output_format in FORMATS.values() if output_format.is_folder)
        return next(
            (folder for folder in folders if all((path / mark).is_file() for mark in folder.codec.marks)),
            None,
        )
    suffixes = {
        output_format.suffix: output_format for output_format in FORMATS.values() if output_format.suffix
    }
    return suffixes.get(path.suffix) if path.is_file() else None
