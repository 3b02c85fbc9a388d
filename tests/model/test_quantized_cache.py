"""Rounded models that are kept on disk: the same bits as rounded anew, and never a damaged one."""

from __future__ import annotations

import functools
import logging
import os
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dist_esm import Embedder
from dist_esm.config import Attention, Dtype, Fp8, LinearKind, ModelConfig
from dist_esm.model import quantize, quantized_cache, weights
from dist_esm.model.checkpoints.checkpoint import read_checkpoint
from dist_esm.model.engine import Engine
from dist_esm.model.esm2 import ESM2, Architecture
from dist_esm.model.kernels.choose import choose_kernels, quantized_products
from dist_esm.model.kernels.quantized import QuantizedLinear
from dist_esm.types import Pack
from helpers.checkpoints import A650M_SHAPED, random_state, write_checkpoint
from helpers.command import environment
from helpers.data import real_proteins
from helpers.layers import segment_of
from helpers.nobody import be_nobody
from helpers.warm import WarmProcess

CPU = torch.device("cpu")
NARROW = Architecture(2, 64, 4)
BF16 = torch.bfloat16
OWN = "its own"
"""Stands for the fingerprint that the weights have."""


@pytest.fixture(autouse=True)
def few_proteins(tmp_path, monkeypatch, request) -> None:
    """Round by 3 proteins of the 48, which takes less long; a GPU takes all."""
    if not request.node.get_closest_marker("gpu"):
        few = tmp_path / "few.fasta"
        few.write_bytes(b"".join(quantize.PROTEINS.read_bytes().splitlines(keepends=True)[:6]))
        monkeypatch.setattr(quantize, "PROTEINS", few)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "dist_esm"


@pytest.fixture
def config(tmp_path) -> ModelConfig:
    """That of a checkpoint that is hard to round."""
    return config_of(tmp_path / "narrow.pt", NARROW)


def config_of(path: Path, arch: Architecture, seed: int = 1) -> ModelConfig:
    write_checkpoint(path, arch, random_state(arch, seed=seed, hard=True))
    return ModelConfig(path.stem, arch.num_layers, arch.embed_dim, arch.attention_heads, str(path))


def load(
    config: ModelConfig,
    fingerprint: str | None = OWN,
    fp8: Fp8 = Fp8.all,
    device: torch.device = CPU,
    linear: LinearKind = LinearKind.torch,
) -> ESM2:
    products = quantized_products(Dtype.fp8, fp8)
    head_dim = config.embed_dim // config.attention_heads
    kernels = choose_kernels(Attention.auto, linear, device, BF16, head_dim, products)
    if fingerprint == OWN:
        fingerprint = fingerprint_of(config.weights)
    return weights.load_model(config, device, BF16, kernels, fingerprint)


@functools.cache
def fingerprint_of(path: str) -> str:
    """That of a checkpoint when it was first asked for: later it may be gone."""
    return weights.fingerprint_of(read_checkpoint(Path(path)))


def kept_files(cache: Path) -> list[Path]:
    return sorted(cache.glob("*.pt"))


def assert_same(model: ESM2, other: ESM2) -> None:
    """All tensors have the same bits, and all else that the forward goes by is the same."""
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        assert (tensor.dtype, tensor.stride()) == (theirs[name].dtype, theirs[name].stride()), name
        assert torch.equal(tensor.view(torch.uint8), theirs[name].view(torch.uint8)), name
    assert not any(one.requires_grad for one in (*model.parameters(), *other.parameters()))
    assert model.training is other.training is False
    for (name, one), (other_name, another) in zip(model.named_modules(), other.named_modules(), strict=True):
        assert (name, type(one)) == (other_name, type(another))
        for about in ("input_scale", "rounds_to", "eps"):
            assert getattr(one, about, None) == getattr(another, about, None), name


def rows(model: ESM2, toks_per_batch: int | None = None) -> list[np.ndarray]:
    """Every row of some proteins, after the last layer."""
    layer = model.arch.num_layers
    pack = Pack(tuple(segment_of(protein, i) for i, protein in enumerate(real_proteins()[:4])))
    with Engine(model, [layer], wants_rows=True, toks_per_batch=toks_per_batch) as engine:
        return [np.array(one.rows[layer]) for one in engine.run(pack)]


def assert_same_rows(model: ESM2, other: ESM2, toks_per_batch: int | None = None) -> None:
    pairs = zip(rows(model, toks_per_batch), rows(other, toks_per_batch), strict=True)
    for ours, theirs in pairs:
        assert np.isfinite(ours).all()
        assert ours.tobytes() == theirs.tobytes()


@pytest.mark.parametrize("fp8", list(Fp8))
def test_a_kept_model_has_the_bits_of_one_that_is_rounded_and_needs_no_checkpoint(config, cache, fp8):
    rounded = load(config, fingerprint=None, fp8=fp8)
    assert not cache.exists()
    assert_same(load(config, fp8=fp8), rounded)
    (path,) = kept_files(cache)
    assert (path.stat().st_mode & 0o777, cache.stat().st_mode & 0o777) == (0o600, 0o700)
    Path(config.weights).unlink()
    kept = load(config, fp8=fp8)
    path.unlink()
    assert_same(kept, rounded)
    assert_same_rows(kept, rounded)
    assert sum(isinstance(one, QuantizedLinear) for one in kept.modules()) == (8 if fp8 is Fp8.all else 4)


def test_what_the_bits_depend_on_is_in_the_name(monkeypatch, tmp_path):
    def path(fingerprint="f1", arch=NARROW, dtype=BF16, fp8=Fp8.all, linear=LinearKind.torch) -> Path:
        products = quantized_products(Dtype.fp8, fp8)
        kernels = choose_kernels(Attention.auto, linear, CPU, dtype, 16, products)
        return quantized_cache.kept_path(fingerprint, arch, dtype, kernels, CPU)

    paths = [
        path(),
        path(fingerprint="f2"),
        path(arch=Architecture(3, 64, 4)),
        path(dtype=torch.float16),
        path(fp8=Fp8.ffn),
    ]
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    paths.append(path())
    torch.set_num_threads(threads)
    assert path() == paths[0]
    for setting in ("MKL_CBWR", "ONEDNN_MAX_CPU_ISA"):
        with monkeypatch.context() as patch:
            patch.setenv(setting, "COMPATIBLE")
            paths.append(path())
    with monkeypatch.context() as patch:
        patch.setattr(torch, "__version__", "9.9")
        quantized_cache.code_hash.cache_clear()
        paths.append(path())
    with monkeypatch.context() as patch:
        patch.setattr(quantized_cache, "PROTEINS", tmp_path / "other.fasta")
        (tmp_path / "other.fasta").write_text(">a\nMK\n")
        quantized_cache.code_hash.cache_clear()
        paths.append(path())
    quantized_cache.code_hash.cache_clear()
    assert path() == paths[0]
    assert len(set(paths)) == len(paths)


def test_the_file_of_other_code_goes_and_those_of_other_models_stay(config, cache, tmp_path, monkeypatch):
    load(config)
    (old,) = kept_files(cache)
    (cache / f".{old.name}.{'0' * 32}.tmp").write_bytes(b"of a process that was killed")
    load(config_of(tmp_path / "other.pt", NARROW, seed=2))
    load(config, fp8=Fp8.ffn)
    others = {path for path in kept_files(cache) if path != old}
    monkeypatch.setattr(quantized_cache, "code_hash", lambda: "other")
    load(config)
    assert len(others) == 2
    new = old.with_name(f"{old.stem.rpartition('-')[0]}-other.pt")
    assert set(kept_files(cache)) == {*others, new}
    assert sorted(path.stem for path in cache.glob("*.lock")) == sorted(path.stem for path in (*others, new))
    assert not list(cache.glob(".*"))


def cut(content: bytearray) -> None:
    del content[len(content) // 2 :]


def flip_a_bit(content: bytearray) -> None:
    content[len(content) // 2] ^= 1


def end_in_zeros(content: bytearray) -> None:
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)


@pytest.mark.parametrize("damage", [cut, flip_a_bit, end_in_zeros, bytearray.clear])
def test_a_damaged_file_is_not_used_but_made_again(config, cache, caplog, damage):
    rounded = load(config)
    (path,) = kept_files(cache)
    whole = path.read_bytes()
    content = bytearray(whole)
    damage(content)
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING, "dist_esm"):
        assert_same(load(config), rounded)
    (record,) = caplog.records
    assert record.getMessage() == f"the weights are rounded again, not taken from disk: {path} is damaged"
    assert path.read_bytes() == whole


@pytest.mark.parametrize("what", ["of another model", "something else"])
def test_a_whole_file_under_the_wrong_name_is_not_used(config, cache, tmp_path, caplog, what):
    rounded = load(config)
    (path,) = kept_files(cache)
    if what == "of another model":
        load(config_of(tmp_path / "other.pt", NARROW, seed=2))
        (other,) = (other for other in kept_files(cache) if other != path)
        other.replace(path)
    else:
        torch.save({"weights": torch.zeros(3)}, path)
        path.chmod(0o600)
    with caplog.at_level(logging.WARNING, "dist_esm"):
        assert_same(load(config), rounded)
    assert [record.getMessage() for record in caplog.records] == [
        f"the weights are rounded again, not taken from disk: {path} is damaged"
    ]
    assert_same(load(config), rounded)


@pytest.mark.parametrize("obstacle", ["no folder", "full disk", "write fails", "folder of others", "no home"])
def test_where_nothing_can_be_kept_the_model_is_rounded_and_one_line_says_so(
    config, cache, tmp_path, monkeypatch, caplog, obstacle
):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if obstacle == "no folder":
        (tmp_path / "cache").write_text("a file where the folder should be")
    elif obstacle == "no home":
        be_nobody(monkeypatch)
    elif obstacle == "folder of others":
        cache.mkdir(parents=True)
        cache.chmod(0o777)
    elif obstacle == "full disk":
        monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    else:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with caplog.at_level(logging.WARNING, "dist_esm"):
            model = load(config)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    (record,) = caplog.records
    assert "the rounded weights cannot be kept, every start rounds them anew" in record.getMessage()
    assert "\n" not in record.getMessage()
    assert not kept_files(cache)
    assert not list((tmp_path / "cache").glob("dist_esm/.*")), "nothing half made is left"
    assert_same(model, load(config, fingerprint=None))


def test_a_file_that_others_can_write_to_is_not_used(config, cache, caplog):
    rounded = load(config)
    (path,) = kept_files(cache)
    path.chmod(0o666)
    with caplog.at_level(logging.WARNING, "dist_esm"):
        assert_same(load(config), rounded)
    assert f"{path} can be written by others" in caplog.text
    assert path.stat().st_mode & 0o777 == 0o600


PROCESS = """
import sys
import torch
from dist_esm.config import ModelConfig
from dist_esm.model import weights
torch.set_num_threads(1)
sys.path.insert(0, sys.argv[1])
from test_quantized_cache import load
model = load(ModelConfig("narrow", 2, 64, 4, sys.argv[2]), sys.argv[3])
print(sum(int(tensor.view(torch.uint8).long().sum()) for tensor in model.state_dict().values()))
"""


def test_processes_that_begin_at_once_all_load_the_model_and_leave_one_file(config, cache):
    line = [sys.executable, "-c", PROCESS, str(Path(__file__).parent), config.weights]
    line.append(fingerprint_of(config.weights))
    sums = set()
    for _ in range(2):
        processes = [WarmProcess(line, environment()) for _ in range(3)]
        answers = [process.communicate(timeout=120) for process in processes]
        assert all(process.returncode == 0 for process in processes), answers
        sums |= {answer[0].strip() for answer in answers}
        Path(config.weights).unlink(missing_ok=True)  # the second time all take what is kept
    assert len(sums) == 1
    assert len(kept_files(cache)) == 1
    assert not list(cache.glob(".*"))


def test_without_a_lock_the_model_is_kept_all_the_same(config, cache):
    rounded = load(config)
    (path,) = kept_files(cache)
    path.unlink()
    path.with_suffix(".lock").unlink()
    path.with_suffix(".lock").mkdir()
    assert_same(load(config), rounded)
    assert kept_files(cache) == [path]


@pytest.mark.parametrize("in_place", [True, False])
def test_weights_that_are_replaced_while_they_are_loaded_are_not_kept_as_those_before(
    config, cache, tmp_path, in_place
):
    """What is kept would serve every later start with the weights before."""
    path, other = Path(config.weights), config_of(tmp_path / "other.pt", NARROW, seed=2).weights
    before, fingerprint = path.read_bytes(), fingerprint_of(config.weights)
    if in_place:
        path.write_bytes(Path(other).read_bytes())
    else:
        os.replace(other, path)
    with pytest.raises(ValueError, match=rf"{path} was changed while it was read: start again"):
        load(config, fingerprint)
    assert kept_files(cache) == []
    path.write_bytes(before)
    assert_same(load(config, fingerprint), load(config, fingerprint=None))


def test_random_weights_are_not_kept(cache):
    load(ModelConfig("narrow", 2, 64, 4, "random"), fingerprint="random-0")
    assert not cache.exists()


def test_an_embedder_takes_what_is_kept_and_other_weights_are_another_file(config, cache, tmp_path, caplog):
    proteins = [protein.decode() for protein in real_proteins()[:3]]

    def embed(path: str) -> np.ndarray:
        embedder = Embedder("auto", weights=path, device="cpu", linear="torch", dtype="fp8")
        return embedder.embed(proteins)

    first = embed(config.weights)
    copy = shutil.copy(config.weights, tmp_path / "copy.pt")
    with caplog.at_level(logging.INFO, "dist_esm"):
        assert embed(copy).tobytes() == first.tobytes()
    (path,) = kept_files(cache)
    assert f"rounded weights are taken from {path}" in caplog.text
    other = write_checkpoint(tmp_path / "other.pt", NARROW, random_state(NARROW, seed=2))
    assert not np.array_equal(embed(str(other)), first)
    assert len(kept_files(cache)) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("fp8", list(Fp8))
def test_on_a_gpu_a_kept_model_has_the_bits_of_one_that_is_rounded(tmp_path, cache, fp8):
    if torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("products of 8-bit numbers need a Hopper GPU")
    pytest.importorskip("quack", reason="quack-kernels is not installed")
    config = config_of(tmp_path / "shaped.pt", A650M_SHAPED)
    device = torch.device("cuda", 0)
    rounded = load(config, fp8=fp8, device=device, linear=LinearKind.quack)
    os.unlink(config.weights)
    kept = load(config, fp8=fp8, device=device, linear=LinearKind.quack)
    assert_same(kept, rounded)
    assert_same_rows(kept, rounded, toks_per_batch=25344)
