"""Kernels that are kept: compiler, linker and processes are real, a C function stands for the GPU kernel."""

from __future__ import annotations

import json
import logging
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch

from dist_esm.model.kernels import kernel_cache as aot
from helpers.c_kernel import FORM, SOURCE, Compiler, answer
from helpers.command import environment
from helpers.nobody import be_nobody
from helpers.warm import WarmProcess

pytest.importorskip("tvm_ffi", reason="apache-tvm-ffi is not installed")
pytestmark = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dist_esm"


def test_a_kernel_is_compiled_once_and_loaded_from_then_on(cache):
    first, second = Compiler(), Compiler()
    assert answer(aot.load_or_compile("triple", "f1", first)) == 21.0
    assert answer(aot.load_or_compile("triple", "f1", second)) == 21.0
    assert (first.calls, second.calls) == (1, 0)
    assert sorted(path.suffix for path in cache.iterdir()) == [".json", ".lock", ".so"]


def test_another_fingerprint_is_another_kernel():
    first, second = Compiler(), Compiler()
    aot.load_or_compile("triple", aot.short_hash("1.0", "H100"), first)
    aot.load_or_compile("triple", aot.short_hash("1.1", "H100"), second)
    assert (first.calls, second.calls) == (1, 1)


RANK = """
import time
from dist_esm.model.kernels import kernel_cache as aot
from helpers.c_kernel import Compiler, answer

class Slow(Compiler):
    def __call__(self):
        time.sleep(1)
        return super().__call__()

compiler = Slow()
print(answer(aot.load_or_compile("triple", "f1", compiler)), compiler.calls)
"""


def other_process() -> WarmProcess:
    """A process that loads the kernel, and prints its answer and how often it had to compile."""
    return WarmProcess([sys.executable, "-c", RANK], environment())


@pytest.mark.parametrize("damage", ["library", "form", "library gone", "form gone"])
def test_what_was_damaged_is_compiled_anew(cache, damage):
    assert other_process().communicate(timeout=120)[0].split() == ["21.0", "1"]
    library, form = cache / "triple-f1.so", cache / "triple-f1.json"
    path = library if damage.startswith("library") else form
    if damage.endswith("gone"):
        path.unlink()
    else:
        path.write_bytes(b"not what it was")
    again = Compiler()
    assert answer(aot.load_or_compile("triple", "f1", again)) == 21.0
    assert again.calls == 1
    assert json.loads(form.read_text()) == list(FORM)
    assert answer(aot.load_or_compile("triple", "f1", again)) == 21.0
    assert again.calls == 1


@pytest.mark.parametrize(
    "obstacle",
    [
        "Not a directory",
        "no-such-compiler",
        "undefined reference to `missing'",
        "has no home directory: set XDG",
    ],
)
def test_a_kernel_that_cannot_be_kept_serves_this_process_and_a_warning_says_so(
    tmp_path, monkeypatch, caplog, obstacle
):
    source = SOURCE
    if obstacle.startswith("has no home"):
        be_nobody(monkeypatch)
    elif obstacle == "Not a directory":
        (tmp_path / "cache").write_text("a file where the folder should be")
    elif obstacle == "no-such-compiler":
        monkeypatch.setenv("CC", obstacle)
    else:
        source += "void missing(void); void other(void) { missing(); }"
    with caplog.at_level(logging.WARNING, "dist_esm"):
        assert answer(aot.load_or_compile("triple", "f1", Compiler(source))) == 21.0
    (record,) = caplog.records
    assert "cannot be kept, every launch compiles it anew" in record.getMessage()
    assert obstacle in record.getMessage()
    assert not list((tmp_path / "cache").glob("dist_esm/.*")), "nothing half made is left"


def test_of_ranks_that_want_the_same_kernel_at_once_one_compiles_it():
    ranks = [other_process() for _ in range(3)]
    answers = [rank.communicate(timeout=120)[0].split() for rank in ranks]
    assert sorted(answers) == [["21.0", "0"], ["21.0", "0"], ["21.0", "1"]]


def test_where_no_lock_can_be_had_the_kernel_is_kept_all_the_same(cache):
    (cache / "triple-f1.lock").mkdir(parents=True)
    first, second = Compiler(), Compiler()
    assert answer(aot.load_or_compile("triple", "f1", first)) == 21.0
    assert answer(aot.load_or_compile("triple", "f1", second)) == 21.0
    assert (first.calls, second.calls) == (1, 0)


class Int32:
    """As a compiler's own integer."""

    def __init__(self, value):
        self.value = value


def test_the_form_of_a_call_is_its_numbers_and_the_names_of_its_tensors():
    a, out = torch.zeros(2), torch.zeros(2)
    tensors = {"a": a, "out": out}
    form = aot.form_of((a, out, out, (None, Int32(132), 8), None), tensors)
    assert form == ("a", "out", "out", (None, 132, 8), None)
    assert aot.to_form(json.loads(json.dumps(form))) == form
    others = {"a": torch.ones(1), "out": torch.ones(1)}
    filled = aot.arguments_of(form, others)
    assert filled[0] is others["a"]
    assert filled[1] is filled[2] is others["out"]
    assert filled[3:] == ((None, 132, 8), None)
    with pytest.raises(TypeError, match="float"):
        aot.form_of((a, 0.5), tensors)
    with pytest.raises(TypeError, match="Tensor"):
        aot.form_of((torch.zeros(2),), tensors)


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o777])
def test_a_folder_that_others_can_write_to_is_not_used(cache, caplog, mode):
    aot.load_or_compile("triple", "f1", Compiler())
    assert cache.stat().st_mode & 0o777 == 0o700
    cache.chmod(mode)
    again = Compiler()
    with caplog.at_level(logging.WARNING, "dist_esm"):
        assert answer(aot.load_or_compile("triple", "f1", again)) == 21.0
    assert again.calls == 1
    assert f"{cache} can be written by others" in caplog.text
    cache.chmod(0o700)
    assert answer(aot.load_or_compile("triple", "f1", again)) == 21.0
    assert again.calls == 1


@pytest.mark.parametrize("suffix", [".so", ".json"])
@pytest.mark.parametrize("how", ["mode", "owner"])
def test_a_file_that_others_may_have_put_there_is_compiled_anew(cache, caplog, monkeypatch, suffix, how):
    old = os.umask(0)
    try:
        aot.load_or_compile("triple", "f1", Compiler())
    finally:
        os.umask(old)
    path = cache / f"triple-f1{suffix}"
    assert path.stat().st_mode & 0o777 == 0o600
    if how == "mode":
        path.chmod(0o666)
        words = "can be written by others"
    elif os.geteuid() == 0:
        os.chown(path, 12345, -1)
        words = "belongs to another user"
    else:
        pytest.skip("only root can give a file away")
    again = Compiler()
    with caplog.at_level(logging.WARNING, "dist_esm"):
        assert answer(aot.load_or_compile("triple", "f1", again)) == 21.0
    assert again.calls == 1
    assert f"{path} {words}" in caplog.text
    assert answer(aot.load_or_compile("triple", "f1", again)) == 21.0
    assert again.calls == 1


def test_a_folder_of_another_user_is_not_used(cache, caplog, monkeypatch):
    aot.load_or_compile("triple", "f1", Compiler())
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    again = Compiler()
    with caplog.at_level(logging.WARNING, "dist_esm"):
        assert answer(aot.load_or_compile("triple", "f1", again)) == 21.0
    assert again.calls == 1
    assert f"{cache} belongs to another user" in caplog.text


def test_a_kernel_needs_no_home(monkeypatch):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/somewhere")
    assert aot.cache_dir() == Path("/somewhere/.cache/dist_esm")
    assert not os.path.exists("/somewhere")
