"""What is to be done for one output: it is put together here, and may be done by another process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from dist_esm.atomic import Staged
from dist_esm.attempt import as_value


@dataclass(frozen=True)
class Work:
    """The writing of one output under temporary names."""

    do: Callable[[], Staged]
    is_movable: bool = False
    """All that it takes is in the arguments of a partial function, so that another process can do it."""


def stage_all(works: Sequence[Work | Exception]) -> list[Staged | Exception]:
    """Do each; an exception stands for what could not be put together or done."""
    return [work if isinstance(work, Exception) else as_value(work.do) for work in works]
