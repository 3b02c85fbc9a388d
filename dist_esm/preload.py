"""The packages of the Hopper kernels, imported early and without what they do not need here.

Their import is most of the time from launch to the first pack, and most of it is torch's compiler: quack-kernels marks functions for it
where they are defined, none of which runs here. So while they are imported, such marks leave functions as they are.
"""

from __future__ import annotations

import os
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
from dist_esm.attention import FLASH4_CACHE

COMPILER = "torch._dynamo"
PACKAGES = ("quack.epilogue.frontend", "flash_attn.cute.interface")


def preload() -> None:
    """Import the packages in a thread of their own, beside the start of CUDA and the reading of weights.

    What fails there is tried again where it is needed, and raises there.
    """
    os.environ.setdefault(FLASH4_CACHE, "1")
    threading.Thread(target=_import_packages, name="preload", daemon=True).start()


def _import_packages() -> None:
    with without_compiler():
        for name in PACKAGES:
            if is_installed(name.rpartition(".")[0]):
                attempt(partial(import_module, name))


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
