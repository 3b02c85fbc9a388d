"""The one broad handler: a unit of work gives its value, or the exception that ended it as a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def as_value(function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T | Exception:
    """Call a function, and return what it raises.

    An exception comes back without its frames, so that it keeps no tensor alive.
    """
    try:
        return function(*args, **options)
    except Exception as error:
        error.__context__ = None
        return error.with_traceback(None)
