"""quack-kernels, imported early and without what it does not need here.

Its import is most of the time from launch to the first pack, and most of it is torch's compiler: it marks functions for it where they are
defined, none of which runs here. So while it is imported, such marks leave functions as they are.
"""

from __future__ import annotations

import gc
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import torch

from dist_esm.attempt import attempt

COMPILER = "torch._dynamo"
PACKAGE = "quack"
_is_over = threading.Event()
"""Not set while the package is imported: a second thread that imports it at the same time finds modules that are not complete yet."""
_is_over.set()


def preload() -> None:
    """Import quack-kernels, if it is there, in a thread of its own, beside the start of CUDA and the reading of weights.

    What fails there is tried again where it is needed, and raises there.
    """
    if is_installed(PACKAGE):
        _is_over.clear()
        threading.Thread(target=_import_package, name="preload", daemon=True).start()


def _import_package() -> None:
    gc.disable()  # a third of the time is spent on looking for garbage that is not there
    try:
        with without_compiler():
            attempt(partial(import_module, f"{PACKAGE}.epilogue.frontend"))
    finally:
        gc.enable()
        _is_over.set()


def wait_for_preload() -> None:
    """Return when no import that `preload` began is under way."""
    _is_over.wait()


@contextmanager
def without_compiler() -> Iterator[None]:
    """While the block runs, torch's compiler is not imported for marking functions, and marks nothing."""
    if COMPILER in sys.modules:
        yield
        return
    stand_in = StandIn(COMPILER)
    with mock.patch.object(torch, "compile", unmarked), mock.patch.object(torch.compiler, "disable", unmarked):
        sys.modules[COMPILER] = stand_in
        try:
            yield
        finally:
            stand_in.leave()


def unmarked(function: Callable[..., Any] | None = None, **options: Any) -> Callable[..., Any]:
    """A decorator, with or without arguments, that leaves a function as it is."""
    return (lambda later: later) if function is None else function


class StandIn(ModuleType):
    """In the place of torch's compiler as long as nothing is asked of it but to mark functions and to keep settings."""

    def __init__(self, name: str) -> None:
        super().__init__(name)
        self.config = SimpleNamespace(recompile_limit=8, cache_size_limit=8)
        self.assume_constant_result = unmarked
        self.disable = unmarked

    def leave(self) -> None:
        """Make room for the real one."""
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]

    def __getattr__(self, name: str) -> Any:
        if name == "__file__":  # which `inspect` asks of every module
            raise AttributeError(name)
        self.leave()
        return getattr(import_module(self.__name__), name)


def is_installed(package: str) -> bool:
    """Whether a package, or a part of one, can be imported."""
    try:
        return find_spec(package) is not None
    except ModuleNotFoundError:
        return False
