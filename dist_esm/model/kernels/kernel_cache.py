"""Kernels of a slow compiler, kept on disk: the first launch compiles them, every later one loads them in milliseconds and never imports the compiler.

A kernel is kept as a shared library, linked by the machine's C compiler (which Triton needs too) from the object that CuTe exports, and beside
it the form of its call. apache-tvm-ffi, which is small, loads and calls it.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from torch import Tensor

from dist_esm.atomic import atomically
from dist_esm.attempt import as_value

log = logging.getLogger("dist_esm")

SYMBOL = "product"
"""Name of the function in each library."""

Form: TypeAlias = "int | str | tuple[Form, ...] | None"
"""Arguments of a call: numbers as they are, tensors by their names."""


@dataclass(frozen=True)
class Kernel:
    """A compiled function and the form of its call."""

    function: Callable[..., Any]
    form: Form

    def __call__(self, tensors: Mapping[str, Tensor]) -> None:
        """Launch it on the current stream."""
        self.function(*fill(self.form, tensors))


@dataclass(frozen=True)
class Compiled:
    """What a compiler has made, in this process alone so far."""

    kernel: Kernel
    export: Callable[[Path], None]
    """Writes an object file, its function as `SYMBOL`."""
    libraries: Sequence[str]
    """Paths of the shared libraries that the object calls."""


def load(name: str, fingerprint: str, compiler: Callable[[], Compiled]) -> Kernel:
    """A kernel from the cache; if it is not there, or cannot be loaded, compiled and kept.

    Ranks that want the same one at the same time wait for the first to compile it. Where it cannot be kept, a warning says so, and it
    serves this process alone.

    Parameters
    ----------
    name
        What it computes, on what.
    fingerprint
        All else that the library depends on; see `fingerprint`.
    compiler
        Makes it, if it must be made.
    """
    path = cache_dir() / f"{name}-{fingerprint}.so"
    kernel = as_value(open_library, path)
    if isinstance(kernel, Kernel):
        return kernel
    with one_at_a_time(path.with_suffix(".lock")):
        kernel = as_value(open_library, path)
        if isinstance(kernel, Kernel):
            return kernel
        log.info("compiling %s, once for this machine", name)
        compiled = compiler()
        kept = as_value(keep, compiled, path)
    if isinstance(kept, Exception):
        log.warning("the compiled kernel %s cannot be kept, every launch compiles it anew: %s", path, kept)
        return compiled.kernel
    return kept


def open_library(path: Path) -> Kernel:
    """A kernel that was kept.

    Raises
    ------
    Exception
        If it is not there, is damaged, or does not fit the libraries that are installed.
    """
    form = to_form(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
    if not path.is_file():
        raise FileNotFoundError(path)
    import tvm_ffi

    return Kernel(tvm_ffi.load_module(path)[SYMBOL], form)


def keep(compiled: Compiled, path: Path) -> Kernel:
    """Put a kernel into the cache, and load it from there."""
    with atomically(path.with_suffix(".json")) as form, atomically(path) as library:
        form.write_text(json.dumps(compiled.kernel.form), encoding="utf-8")
        exported = library.with_suffix(".o")
        try:
            compiled.export(exported)
            link(exported, library, compiled.libraries)
        finally:
            exported.unlink(missing_ok=True)
    return open_library(path)


def link(exported: Path, library: Path, libraries: Sequence[str]) -> None:
    """Make a shared library of an object file.

    Raises
    ------
    OSError
        If there is no C compiler (``CC``, else ``cc``), or it refuses.
    """
    folders = ":".join(dict.fromkeys(os.path.dirname(one) for one in libraries))
    command = [
        os.environ.get("CC", "cc"),
        "-shared",
        "-o",
        str(library),
        str(exported),
        *libraries,
        f"-Wl,-rpath,{folders},-z,defs",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise OSError(f"{command[0]} cannot link it: {done.stderr.strip()[-500:]}")


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Hold a lock between processes; where the file system has none, processes do the same work side by side, which harms nothing."""
    file = as_value(open_for_lock, path)
    try:
        yield
    finally:
        if not isinstance(file, Exception):
            os.close(file)


def open_for_lock(path: Path) -> int:
    """A descriptor that holds a lock on a file until it is closed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
    except OSError:
        os.close(descriptor)
        raise
    return descriptor


def cache_dir() -> Path:
    """Where kernels are kept: ``$XDG_CACHE_HOME/dist_esm``, else ``~/.cache/dist_esm``."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "dist_esm"


def fingerprint(*parts: object) -> str:
    """A short hash of what a kernel depends on."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def form_of(arguments: tuple[Any, ...], tensors: Mapping[str, Tensor]) -> Form:
    """The form of a call from its arguments.

    Raises
    ------
    TypeError
        If one of them is neither a number nor one of the tensors.
    """
    names = {id(tensor): name for name, tensor in tensors.items()}

    def one(argument: Any) -> Form:
        if isinstance(argument, tuple):
            return tuple(one(part) for part in argument)
        if argument is None or id(argument) in names:
            return names.get(id(argument))
        value = getattr(argument, "value", argument)  # of the compiler's own integers
        if type(value) is not int:
            raise TypeError(f"{type(argument)} cannot be part of a call that is kept")
        return value

    return one(arguments)


def to_form(parsed: Any) -> Form:
    """A form as it was before it was JSON."""
    return tuple(to_form(part) for part in parsed) if isinstance(parsed, list) else parsed


def fill(form: Form, tensors: Mapping[str, Tensor]) -> Any:
    """The arguments of a call from its form."""
    if isinstance(form, tuple):
        return tuple([fill(part, tensors) for part in form])
    return tensors[form] if isinstance(form, str) else form
