"""The one broad handler: a unit of work either gives its value or the exception that ended it, as a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def attempt(work: Callable[[], T]) -> T | Exception:
    """Run a piece of work; whatever it raises comes back without its frames, so that it keeps no tensor alive."""
    try:
        return work()
    except Exception as error:
        error.__context__ = None
        return error.with_traceback(None)
