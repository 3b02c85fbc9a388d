"""Identical sequences, told by their digests as long as the embedding of the first one is kept."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Iterator

from dist_esm.config import Config, Include

DEDUPE_BYTES = 256 << 20
"""Bytes of embeddings that are kept for identical sequences."""
KEPT_BYTES = 1024
"""Bytes that keeping one embedding costs beside its numbers."""


class Duplicates:
    """Knows which protein had some residues first, of those whose embeddings are kept.

    Parameters
    ----------
    config
        Decides how large an embedding is.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._first_of: OrderedDict[bytes, tuple[int, int]] = OrderedDict()
        """Digest of residues to the protein that had them first, and the bytes that its embedding takes."""
        self._kept_bytes = 0

    def first(self, index: int, residues: bytes, num_segments: int) -> int | None:
        """Return the first protein with the same residues, perhaps this one; None if its embedding is too
        large to keep."""
        include, num_layers = self._config.include, len(self._config.repr_layers)
        num_rows = sum(len(residues) if kind is Include.per_tok else 1 for kind in include)
        num_bytes = KEPT_BYTES + 4 * self._config.model.embed_dim * num_layers * num_rows
        if num_bytes > DEDUPE_BYTES // 16:
            return None
        salt = num_segments.to_bytes(8, "little")
        digest = hashlib.blake2b(residues, digest_size=16, salt=salt).digest()
        if digest in self._first_of:
            self._first_of.move_to_end(digest)
            return self._first_of[digest][0]
        self._first_of[digest] = (index, num_bytes)
        self._kept_bytes += num_bytes
        return index

    def evicted(self) -> Iterator[int]:
        """Yield proteins whose embeddings make room for newer ones, the least recently asked for first."""
        while self._kept_bytes > DEDUPE_BYTES:
            _, (index, num_bytes) = self._first_of.popitem(last=False)
            self._kept_bytes -= num_bytes
            yield index
