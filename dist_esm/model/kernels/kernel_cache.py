"""Kernels of a slow compiler, kept on disk.

The first launch compiles a kernel. Every later one loads it in milliseconds and never imports the compiler.

A library is code that is run, so it is loaded only from a cache that is this user's own: folder and files
belong to this user, and nobody else can write to them.

A kernel is kept as a shared library, with the form of its call in a file beside it. The machine's C compiler
(which Triton needs too) links the library from the object that CuTe exports. apache-tvm-ffi, which is small,
loads and calls it.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import subprocess
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from filelock import FileLock
from torch import Tensor

from dist_esm.atomic import atomically
from dist_esm.attempt import as_value

log = logging.getLogger("dist_esm")

SYMBOL = "product"
"""Name of the function in each library."""
LOCK_SECONDS = 600
"""Longest wait for another process that compiles the same kernel; after it the work is done twice."""

NOT_KEPT = "the compiled kernel %s cannot be kept, every launch compiles it anew: %s"

Form: TypeAlias = "int | str | tuple[Form, ...] | None"
"""Arguments of a call: numbers as they are, tensors by their names."""


@dataclass(frozen=True)
class Kernel:
    """A compiled function and the form of its call."""

    function: Callable[..., Any]
    form: Form

    def __call__(self, tensors: Mapping[str, Tensor]) -> None:
        """Launch it on the current stream."""
        self.function(*arguments_of(self.form, tensors))


@dataclass(frozen=True)
class Compiled:
    """A kernel as the compiler made it, which only this process has so far."""

    kernel: Kernel
    export: Callable[[Path], None]
    """Writes an object file that holds the function under the name `SYMBOL`."""
    libraries: Sequence[str]
    """Paths of the shared libraries that the object calls."""


def load_or_compile(name: str, fingerprint: str, compiler: Callable[[], Compiled]) -> Kernel:
    """Load a kernel from the cache; if it is not there, or cannot be loaded, compile and keep it.

    Ranks that want the same kernel at the same time wait for the first to compile it. If it cannot be kept, a
    warning says so, and the kernel serves this process alone.

    Parameters
    ----------
    name
        What the kernel computes, and on which dtypes.
    fingerprint
        Hash of all else that the library depends on, from `short_hash`.
    compiler
        Compiles the kernel; called only if it must be compiled.
    """
    folder = as_value(own_folder)
    if isinstance(folder, Exception):
        log.warning(NOT_KEPT, name, folder)
        return compiler().kernel
    path = folder / f"{name}-{fingerprint}.so"
    kernel = as_value(open_library, path)
    if isinstance(kernel, Kernel):
        return kernel
    if isinstance(kernel, NotOursError):
        log.warning("%s; it is compiled again", kernel)
    with ExitStack() as held:
        # Without a lock (a read-only home, a file system that has none) processes do the same work side by
        # side. Each puts whole files in place by a rename, so the cache stays correct.
        as_value(hold_lock, held, path.with_suffix(".lock"))
        kernel = as_value(open_library, path)
        if isinstance(kernel, Kernel):
            return kernel
        log.info("compiling %s, once for this machine", name)
        compiled = compiler()
        kept = as_value(keep, compiled, path)
    if isinstance(kept, Exception):
        log.warning(NOT_KEPT, path, kept)
        return compiled.kernel
    return kept


class NotOursError(OSError):
    """A file or folder that others may have put there, or may change."""


def make_own_folder(folder: Path) -> None:
    """Make the folder of the cache, for this user alone, unless it is there.

    Raises
    ------
    NotOursError
        If it is another user's, or others can write to it.
    OSError
        If it cannot be made.
    """
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    refuse_if_not_ours(folder)


def own_folder() -> Path:
    """Return the folder of the cache, made for this user alone.

    Raises
    ------
    OSError, ValueError
        As `make_own_folder` and `cache_dir`.
    """
    folder = cache_dir()
    make_own_folder(folder)
    return folder


def refuse_if_not_ours(path: Path) -> None:
    """Make sure that a file or folder belongs to this user, and that nobody else can write to it.

    Raises
    ------
    NotOursError
        If it does not, with what to do.
    OSError
        If it is not there.
    """
    status = path.stat()
    remedy = "set XDG_CACHE_HOME to a folder of your own"
    if status.st_uid != os.geteuid():
        raise NotOursError(f"{path} belongs to another user, so nothing is loaded from it: {remedy}")
    if status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise NotOursError(
            f"{path} can be written by others, so nothing is loaded from it: remove it, or {remedy}"
        )


def hold_lock(held: ExitStack, path: Path) -> None:
    """Take a lock between processes, which `held` releases.

    Raises
    ------
    OSError
        If the lock file cannot be created or written, or another process holds it for `LOCK_SECONDS`.
    NotImplementedError
        If the file system has no locks.
    """
    held.enter_context(FileLock(path, timeout=LOCK_SECONDS))


def import_runtime() -> Any:
    """Import the package that loads and calls kernels, which takes half a second."""
    import tvm_ffi

    return tvm_ffi


def open_library(path: Path) -> Kernel:
    """Load a kernel that was kept.

    Raises
    ------
    Exception
        If it is not there, is not ours, is damaged, or does not fit the libraries that are installed.
    """
    for file in (path, path.with_suffix(".json")):
        refuse_if_not_ours(file)
    form = to_form(json.loads(path.with_suffix(".json").read_text(encoding="utf-8")))
    return Kernel(import_runtime().load_module(path)[SYMBOL], form)


def keep(compiled: Compiled, path: Path) -> Kernel:
    """Write a kernel into the cache, and return it as loaded from there."""
    with atomically(path.with_suffix(".json")) as form, atomically(path) as library:
        form.write_text(json.dumps(compiled.kernel.form), encoding="utf-8")
        exported = library.with_suffix(".o")
        try:
            compiled.export(exported)
            link(exported, library, compiled.libraries)
        finally:
            exported.unlink(missing_ok=True)
        for file in (form, library):
            file.chmod(0o600)  # whatever the umask: what others could write is not loaded
    return open_library(path)


def link(exported: Path, library: Path, libraries: Sequence[str]) -> None:
    """Link an object file to a shared library.

    Raises
    ------
    OSError
        If there is no C compiler (``CC``, else ``cc``), or it fails.
    """
    folders = ":".join(dict.fromkeys(os.path.dirname(library) for library in libraries))
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


def cache_dir() -> Path:
    """Return the folder of the cache: ``$XDG_CACHE_HOME/dist_esm``, else ``~/.cache/dist_esm``.

    Raises
    ------
    ValueError
        As `user_cache`.
    """
    return user_cache() / "dist_esm"


def user_cache() -> Path:
    """Return the folder of this user's caches: ``$XDG_CACHE_HOME``, else ``~/.cache``.

    Raises
    ------
    ValueError
        If there is no home either: a container may run as a user that nobody knows.
    """
    named = os.environ.get("XDG_CACHE_HOME")
    if named:
        return Path(named)
    try:
        return Path.home() / ".cache"
    except RuntimeError:
        remedy = "set XDG_CACHE_HOME to a folder of your own"
        raise ValueError(f"user {os.geteuid()} has no home directory: {remedy}") from None


def short_hash(*parts: object) -> str:
    """Return a short hash of all that a kernel depends on."""
    return hashlib.sha256(repr(parts).encode()).hexdigest()[:16]


def form_of(arguments: tuple[Any, ...], tensors: Mapping[str, Tensor]) -> Form:
    """Return the form of a call, given its arguments.

    Raises
    ------
    TypeError
        If an argument is neither a number nor in `tensors`.
    """
    names = {id(tensor): name for name, tensor in tensors.items()}

    def form_of_argument(argument: Any) -> Form:
        if isinstance(argument, tuple):
            return tuple(form_of_argument(part) for part in argument)
        if argument is None or id(argument) in names:
            return names.get(id(argument))
        value = getattr(argument, "value", argument)  # the compiler's own integers hold theirs in `value`
        if type(value) is not int:
            raise TypeError(f"{type(argument)} cannot be part of a call that is kept")
        return value

    return form_of_argument(arguments)


def to_form(parsed: Any) -> Form:
    """Return a form from parsed JSON, which has lists for its tuples."""
    return tuple(to_form(part) for part in parsed) if isinstance(parsed, list) else parsed


def arguments_of(form: Form, tensors: Mapping[str, Tensor]) -> Any:
    """Return the arguments of a call, given its form."""
    if isinstance(form, tuple):
        return tuple([arguments_of(part, tensors) for part in form])
    return tensors[form] if isinstance(form, str) else form
