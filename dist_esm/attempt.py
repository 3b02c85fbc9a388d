"""The two broad handlers of the package: around one unit of work, and around the whole life of a thread."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def as_value(function: Callable[P, T], *args: P.args, **options: P.kwargs) -> T | Exception:
    """Call a function, and return its value or the exception that ended it.

    An exception comes back without its frames, so that it keeps no tensor alive.
    """
    try:
        return function(*args, **options)
    except Exception as error:
        error.__context__ = None
        return error.with_traceback(None)


def ending_of(function: Callable[P, object], *args: P.args, **options: P.kwargs) -> BaseException | None:
    """Call a function that is the whole work of a thread, and return what ended it early.

    That includes what is no `Exception`, such as `SystemExit`: a thread that is gone without a word is waited
    for by others. The traceback stays, since such an end is a fault of ours that somebody has to find.
    """
    try:
        function(*args, **options)
    except BaseException as error:
        return error
    return None
