"""Files of weights of every kind, without the packages that write them; what is none of ours is named in one
line."""

from __future__ import annotations

import json
import logging
import re
import struct
from pathlib import Path

import pytest
import safetensors.torch
import torch

from dist_esm.config import ModelConfig, model_config
from dist_esm.fair_esm import ALPHABET
from dist_esm.model.checkpoints import hub, locate
from dist_esm.model.checkpoints.checkpoint import read_checkpoint
from dist_esm.model.checkpoints.files import check_and_fingerprint, read_safetensors
from dist_esm.model.esm2 import Architecture
from dist_esm.model.kernels.choose import PLAIN
from dist_esm.model.weights import check_weights, complete, load_model, open_weights
from helpers.checkpoints import A8M, random_state, write_checkpoint
from helpers.nobody import be_nobody

ARCH = Architecture(2, 96, 6)
STATE = random_state(ARCH)


def auto(weights: object) -> ModelConfig:
    config = model_config("auto")
    config.weights = str(weights)
    locate.fetch(config)
    complete(config)
    return config


def loaded(weights: object) -> dict[str, torch.Tensor]:
    return load_model(auto(weights), torch.device("cpu"), torch.float32, PLAIN).state_dict()


def write_safetensors(path: Path, tensors: dict[str, torch.Tensor], shift: int = 0) -> Path:
    """The bytes that the format is defined by; `shift` spoils the alignment of the tensors."""
    header, data = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes() if tensor.ndim else b""
        dtype = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.int8: "I8"}[
            tensor.dtype
        ]
        header[name] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": [len(data), len(data) + len(raw)],
        }
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + shift)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    return loaded(write_checkpoint(tmp_path_factory.mktemp("weights") / "fair.pt", ARCH, STATE))


def same(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> bool:
    assert ours.keys() == theirs.keys()
    return all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())


PREFIXES = [
    "",
    "model.",
    "esm.",
    "module.",
    "encoder.",
    "module.model.esm.",
    "model.encoder.",
    "_orig_mod.net.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("entry", [None, "state_dict", "model_state_dict", "model"])
def test_a_state_dict_is_found_under_any_prefix(tmp_path, reference, prefix, entry):
    state = {f"{prefix}{name}": tensor for name, tensor in STATE.items()}
    state["head.weight"] = torch.zeros(2, 96)
    lightning = {"epoch": 3, "pytorch-lightning_version": "2.4.0", entry: state}
    torch.save(state if entry is None else lightning, tmp_path / "tuned.ckpt")
    assert same(loaded(tmp_path / "tuned.ckpt"), reference)
    words = check_weights(auto(tmp_path / "tuned.ckpt")).words
    assert (f"under the prefix '{prefix}'" in words) == bool(prefix)
    assert "its body alone (head left out)" in words


@pytest.mark.parametrize("shift", [0, 1])
def test_safetensors_are_read_where_they_lie(tmp_path, reference, shift):
    path = write_safetensors(tmp_path / "tuned.safetensors", STATE, shift)
    assert same(loaded(path), reference)
    assert all(torch.equal(tensor, STATE[name]) for name, tensor in read_safetensors(path).items())


def test_a_file_is_known_by_its_bytes_whatever_its_suffix(tmp_path, reference):
    """torch itself goes by the suffix .safetensors."""
    torch.save(STATE, tmp_path / "a.safetensors")
    write_safetensors(tmp_path / "b.pt", STATE)
    for name in ("a.safetensors", "b.pt"):
        assert same(loaded(tmp_path / name), reference)


def test_a_header_of_any_length_is_no_web_page(tmp_path, reference):
    """The length comes first: 60 bytes over a multiple of 256 begin with the byte of `<`."""
    path = write_safetensors(tmp_path / "a.safetensors", STATE)
    shift = (0x3C - path.read_bytes()[0]) % 256
    path = write_safetensors(tmp_path / "b.safetensors", STATE, shift)
    assert path.read_bytes()[:1] == b"<"
    assert same(loaded(path), reference)


def test_a_model_of_other_tokens_is_refused(tmp_path, reference):
    write_safetensors(tmp_path / "model.safetensors", STATE)
    (tmp_path / "vocab.txt").write_text("\n".join(ALPHABET.all_toks))
    assert same(loaded(tmp_path), reference)
    (tmp_path / "vocab.txt").write_text("\n".join(["<pad>", "<cls>", *ALPHABET.all_toks[2:]]))
    with pytest.raises(ValueError, match="has other tokens than ESM-2: <cls> is not its token 0"):
        read_checkpoint(tmp_path)


def test_two_models_in_one_file_are_told_apart_by_nobody(tmp_path):
    state = {f"{who}.{name}": tensor for who in ("student", "teacher") for name, tensor in STATE.items()}
    torch.save(state, tmp_path / "two.pt")
    with pytest.raises(ValueError, match=r"holds 2 models, under the prefixes 'student\.' and 'teacher\.'"):
        read_checkpoint(tmp_path / "two.pt")


def test_frequencies_that_a_file_leaves_out_are_fair_esms(tmp_path, reference):
    state = {name: tensor for name, tensor in STATE.items() if not name.endswith("inv_freq")}
    torch.save(state, tmp_path / "without.pt")
    with pytest.raises(ValueError, match="does not tell its number of attention heads"):
        read_checkpoint(tmp_path / "without.pt")
    (tmp_path / "config.json").write_text('{"model_type": "esm", "num_attention_heads": 6}')
    assert same(loaded(tmp_path / "without.pt"), reference)


def test_tokens_that_were_added_behind_fair_esms_are_left_out(tmp_path, reference):
    more = torch.cat((STATE["embed_tokens.weight"], torch.ones(5, 96)))
    torch.save({**STATE, "embed_tokens.weight": more}, tmp_path / "more.pt")
    assert same(loaded(tmp_path / "more.pt"), reference)


NAMES = {name: torch.zeros(4, 4) for name in ("a.weight", "b.weight")}
STRANGERS = {
    "ESM-1b": ({**STATE, "embed_positions.weight": torch.zeros(1026, 96)}, "holds an ESM-1b or ESM-1v"),
    "MSA": ({**STATE, "msa_position_embedding": torch.zeros(1)}, "holds an MSA Transformer"),
    "ESM-1": ({**STATE, "layers.0.self_attn.bias_k": torch.zeros(1, 1, 96)}, "holds an ESM-1 ("),
    "ESM C": (
        {"transformer.blocks.0.attn.layernorm_qkv.1.weight": torch.zeros(4, 4)},
        "holds an ESM C or ESM3",
    ),
    "anything": (NAMES, "holds no ESM-2 (its tensors are a.weight, b.weight ...)"),
    "more in a layer": (
        {**STATE, "layers.1.gate.weight": torch.zeros(1)},
        "has layers.1.gate.weight, which no ESM-2 has",
    ),
    "quantized": (
        {**STATE, "layers.0.fc1.weight": torch.zeros(384, 96, dtype=torch.int8)},
        "fc1.weight is int8, quantized",
    ),
    "complex": (
        {**STATE, "layers.0.fc1.bias": torch.zeros(384, dtype=torch.complex64)},
        "fc1.bias is complex64",
    ),
    "another feed-forward": (
        {**STATE, "layers.0.fc1.weight": torch.zeros(200, 96)},
        "fc1.weight has shape (200, 96)",
    ),
    "nothing": ({"epoch": 1}, "it holds no tensors by name: its entries are epoch"),
}


@pytest.mark.parametrize(("content", "words"), STRANGERS.values(), ids=STRANGERS)
def test_what_is_no_esm2_is_named_in_one_line(tmp_path, content, words):
    torch.save(content, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        read_checkpoint(tmp_path / "other.pt")
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


FILES = {
    "empty": (b"", "is empty (0 bytes): remove it and fetch it again"),
    "web page": (
        b"<html><body>404 Not Found</body></html>",
        "is a web page and no checkpoint (it begins with '<html>",
    ),
    "FASTA": (
        b">P1 first\nMKTAYIAKQR\n",
        "is a FASTA file and no weights (it begins with '>P1 first'): proteins are named by input=",
    ),
    "git-lfs": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0",
        "is a pointer of git-lfs and no weights",
    ),
    "text": (b"not a checkpoint", "cannot be read as a checkpoint; name fair-esm's .pt"),
    "TensorFlow": (b"\x89HDF\r\n\x1a\n" + bytes(100), "is an HDF5 file, as TensorFlow writes"),
    "a cut header": (
        struct.pack("<Q", 5000) + b'{"a": ',
        "is truncated: 14 bytes, its header alone has 5008",
    ),
    "a header of nonsense": (
        struct.pack("<Q", 8) + b'{"a": 1}',
        "is damaged: its header is no safetensors header",
    ),
}


@pytest.mark.parametrize(("content", "words"), FILES.values(), ids=FILES)
def test_what_is_no_checkpoint_is_named_by_its_first_bytes(tmp_path, content, words):
    path = tmp_path / "esm2_t6_8M_UR50D.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(words)) as caught:
        read_checkpoint(path)
    assert "\n" not in str(caught.value)
    assert "weights_only" not in str(caught.value)


def test_directories_that_are_no_model_are_named(tmp_path):
    with pytest.raises(ValueError, match="is a directory without weights"):
        read_checkpoint(tmp_path)
    (tmp_path / "vocab.txt").write_text("<cls>")
    with pytest.raises(ValueError, match=r"is a tokenizer and no model, it has no model\.safetensors"):
        read_checkpoint(tmp_path)
    (tmp_path / "tf_model.h5").write_bytes(b"")
    with pytest.raises(ValueError, match="has weights for TensorFlow or Flax alone"):
        read_checkpoint(tmp_path)
    for name in ("a.pt", "b.pt"):
        write_checkpoint(tmp_path / name, ARCH, STATE)
    with pytest.raises(ValueError, match=r"has 2 files of weights: name one of a\.pt, b\.pt"):
        read_checkpoint(tmp_path)
    (tmp_path / "b.pt").unlink()
    assert read_checkpoint(tmp_path).arch == ARCH


def test_a_cut_safetensors_file_is_named(tmp_path):
    path = write_safetensors(tmp_path / "cut.safetensors", STATE)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match=r"cut\.safetensors is truncated: \d+ bytes of \d+"):
        read_checkpoint(path)


@pytest.mark.parametrize("place", ["first", "middle", "last"])
def test_flipped_bytes_in_a_tensor_are_found(tmp_path, place):
    path = write_checkpoint(tmp_path / "good.pt", ARCH, STATE)
    good = check_and_fingerprint(path)
    content = bytearray(path.read_bytes())
    raw = STATE[
        {
            "first": "embed_tokens.weight",
            "middle": "layers.0.fc2.weight",
            "last": "emb_layer_norm_after.bias",
        }[place]
    ]
    start = content.index(raw.numpy().tobytes())
    for index in range(start, start + 64):
        content[index] ^= 0xFF
    (tmp_path / "flip.pt").write_bytes(content)
    with pytest.raises(
        ValueError, match=r"flip\.pt is damaged: the checksum of good/data/\d+ is wrong; remove it and fetch"
    ):
        check_weights(auto(tmp_path / "flip.pt"))
    assert check_and_fingerprint(path) == good


def test_an_archive_that_is_damaged_near_its_end_is_refused(checkpoint_8m, tmp_path):
    good = checkpoint_8m.read_bytes()
    path = tmp_path / "w.pt"
    for back in (1, 5, 8, 10, 14, 18, 22, 30, 35, 40, 60, 66, 70, 76, 82, 90, 120, 150, 1000, 4000):
        content = bytearray(good)
        for place in range(len(content) - back, min(len(content), len(content) - back + 8)):
            content[place] ^= 0xFF
        path.write_bytes(content)
        try:
            read_checkpoint(path)
            fingerprint = check_and_fingerprint(path)
        except ValueError as error:
            assert "fetch it again" in str(error)  # noqa: PT017 - either is right
        else:
            assert fingerprint == check_and_fingerprint(checkpoint_8m)


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_a_file_of_any_name_is_read(tmp_path, suffix):
    write = torch.save if suffix == ".pt" else safetensors.torch.save_file
    write({name: tensor.clone() for name, tensor in STATE.items()}, tmp_path / f"w{suffix}")
    path = (tmp_path / f"w{suffix}").rename(tmp_path / f"w\udce9\n|\x1b{suffix}")
    found = read_checkpoint(path)
    assert torch.equal(found.tensors["layers.0.fc2.weight"], STATE["layers.0.fc2.weight"])
    assert torch.equal(found.tensors["emb_layer_norm_after.bias"], STATE["emb_layer_norm_after.bias"])


def test_other_bytes_have_another_fingerprint_whatever_the_form(tmp_path):
    other = {
        **STATE,
        "layers.0.fc1.bias": STATE["layers.0.fc1.bias"].clone().index_fill_(0, torch.tensor([3]), 7.0),
    }
    prints: list[str] = []
    torch.serialization.set_crc32_options(False)  # an archive without checksums is read for its fingerprint
    try:
        prints += [
            check_and_fingerprint(write_checkpoint(tmp_path / "no_sums.pt", ARCH, state))
            for state in (STATE, other)
        ]
    finally:
        torch.serialization.set_crc32_options(True)
    for state in (STATE, other):
        prints.append(check_and_fingerprint(write_safetensors(tmp_path / "a.safetensors", state)))
        prints.append(check_and_fingerprint(write_checkpoint(tmp_path / "sums.pt", ARCH, state)))
    assert len(set(prints)) == 6


def test_the_fingerprint_of_a_large_file_counts_every_chunk(tmp_path, monkeypatch):
    monkeypatch.setattr("dist_esm.model.checkpoints.files.CHUNK_BYTES", 4096)
    path = write_safetensors(tmp_path / "a.safetensors", STATE)
    prints = {check_and_fingerprint(path)}
    content = path.read_bytes()
    for place in range(0, len(content), 50_000):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        prints.add(check_and_fingerprint(path))
    assert len(prints) == 1 + len(range(0, len(content), 50_000))


def test_fair_esms_own_files_are_known_by_their_sha256(tmp_path, monkeypatch, caplog):
    """The real files are large: one of ours stands in for the 8M, its sum in the place of the real one."""
    import hashlib

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    path = write_checkpoint(tmp_path / "mine.pt", A8M, random_state(A8M))
    assert check_weights(auto(path)).words == (
        f"fair-esm checkpoint of esm2_t6_8M_UR50D, not one of fair-esm's own files, from {path}"
    )
    content = path.read_bytes()
    monkeypatch.setitem(
        locate.OFFICIAL, "esm2_t6_8M_UR50D", (len(content), hashlib.sha256(content).hexdigest())
    )
    with caplog.at_level(logging.INFO, "dist_esm"):
        for _ in range(2):
            assert check_weights(auto(path)).words == "fair-esm's own esm2_t6_8M_UR50D (sha256 verified)"
    assert len(caplog.records) == 1, "the sum is taken once for a machine"
    monkeypatch.setitem(locate.OFFICIAL, "esm2_t6_8M_UR50D", (len(content), "0" * 64))
    assert "not one of fair-esm's own files" in check_weights(auto(path)).words
    be_nobody(monkeypatch)  # who can keep nothing, and does not need to
    assert "not one of fair-esm's own files" in check_weights(auto(path)).words
    with pytest.raises(ValueError, match="has no home directory: set XDG_CACHE_HOME to a folder of your own"):
        locate.fetch(auto("some/esm2_tuned"))


def test_a_size_that_does_not_fit_the_name_is_refused_with_the_remedy(tmp_path):
    path = write_checkpoint(tmp_path / "other.pt", ARCH, STATE)
    config = model_config("esm2_t6_8M_UR50D")
    config.weights = str(path)
    with pytest.raises(
        ValueError, match=r"holds another model \(2 layers, width 96, 6 heads\).*use model=auto"
    ):
        open_weights(config)


def test_auto_takes_size_and_name_from_the_weights(tmp_path):
    config = auto(write_checkpoint(tmp_path / "8m.pt", A8M, random_state(A8M)))
    assert (config.name, config.num_layers, config.embed_dim, config.attention_heads) == (
        "esm2_t6_8M_UR50D",
        6,
        320,
        20,
    )
    for weights in (None, "random"):
        config = model_config("auto")
        config.weights = weights
        with pytest.raises(
            ValueError, match=r"model=auto takes the size from the weights: set model\.weights=PATH"
        ):
            locate.fetch(config)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch):
    """The hub's cache with a model of two revisions, as the package huggingface_hub leaves it."""
    for key in ("HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "home"))
    folder = tmp_path / "home" / "hub" / "models--some--esm2_tuned"
    for commit, scale in (("aaa111", 1.0), ("bbb222", 2.0)):
        blob = write_safetensors(
            folder / "blobs" / commit, {name: tensor * scale for name, tensor in STATE.items()}
        )
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "model.safetensors").symlink_to(Path("../../blobs") / blob.name)
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("aaa111")
    return tmp_path / "home" / "hub"


def test_an_id_is_found_in_the_hubs_cache(hub_cache, reference, monkeypatch):
    assert hub.cache_dir() == hub_cache
    assert same(loaded("some/esm2_tuned"), reference)
    assert check_weights(auto("some/esm2_tuned")).words == (
        f"state dict of {ARCH}, from some/esm2_tuned (revision aaa111)"
    )
    assert not same(loaded("some/esm2_tuned@bbb222"), reference)
    monkeypatch.delenv("HF_HOME")
    monkeypatch.setenv("HF_HUB_CACHE", str(hub_cache))
    assert same(loaded("some/esm2_tuned"), reference)


def test_an_id_that_is_nowhere_says_where_it_was_looked_for(hub_cache, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for missing in ("facebook/esm2_t6_8M_UR50D", "some/esm2_tuned@ccc333"):
        with pytest.raises(ValueError, match=re.escape(missing)) as caught:
            auto(missing)
        assert f"{missing} is neither a file or directory nor in the Hugging Face cache {hub_cache}" in str(
            caught.value
        )
        assert "HF_HUB_OFFLINE forbids to download it" in str(caught.value)
    with pytest.raises(ValueError, match=r"model\.weights=here/missing\.pt is not a file or directory"):
        auto("here/missing.pt")


def test_a_directory_goes_before_an_id(hub_cache, tmp_path, reference, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_safetensors(tmp_path / "some" / "esm2_tuned" / "model.safetensors", random_state(ARCH, seed=5))
    assert not same(loaded("some/esm2_tuned"), reference)
