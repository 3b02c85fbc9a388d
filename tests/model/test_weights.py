"""Checkpoints: fair-esm's format as it is on disk, and what is said of files that are not that."""

from __future__ import annotations

import pytest
import torch

from dist_esm.config import ModelConfig
from dist_esm.model.checkpoints.checkpoint import KNOWN
from dist_esm.model.checkpoints.locate import fetch, locate
from dist_esm.model.kernels.choose import PLAIN
from dist_esm.model.weights import load_model
from helpers.checkpoints import A8M, A35M, random_state, write_checkpoint

CPU = torch.device("cpu")


def config(weights: object, name: str = "esm2_t6_8M_UR50D") -> ModelConfig:
    return ModelConfig(
        name, A8M.num_layers, A8M.embed_dim, A8M.attention_heads, None if weights is None else str(weights)
    )


def load(weights: object):
    return load_model(config(weights), CPU, torch.float32, PLAIN)


def test_a_half_precision_checkpoint_keeps_its_values(tmp_path):
    """The 3B and 15B checkpoints are stored as fp16, rotary frequencies included."""
    state = {name: tensor.half() for name, tensor in random_state(A8M).items()}
    model = load(write_checkpoint(tmp_path / "half.pt", A8M, state))
    assert model.layers[3].fc1.weight.dtype == torch.float32
    torch.testing.assert_close(
        model.layers[3].fc1.weight, state["layers.3.fc1.weight"].float(), rtol=0, atol=0
    )
    torch.testing.assert_close(
        model.inv_freq, state["layers.0.self_attn.rot_emb.inv_freq"].float(), rtol=0, atol=0
    )


def test_a_truncated_file_is_named(checkpoint_8m, tmp_path):
    cut = tmp_path / "cut.pt"
    cut.write_bytes(checkpoint_8m.read_bytes()[:100_000])
    with pytest.raises(ValueError, match=r"cut\.pt is truncated: 100000 bytes"):
        load(cut)


def test_a_file_that_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "text.pt").write_text("not a checkpoint")
    with pytest.raises(ValueError, match=r"text\.pt cannot be read as a checkpoint"):
        load(tmp_path / "text.pt")
    torch.save({"weights": 1}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"other\.pt is no checkpoint of ESM-2, it holds no tensors by name"):
        load(tmp_path / "other.pt")


def test_another_architecture_is_named_with_the_remedy(tmp_path):
    path = write_checkpoint(tmp_path / "other.pt", A35M, random_state(A35M))
    with pytest.raises(
        ValueError,
        match=r"holds esm2_t12_35M_UR50D \(12 layers, width 480, 20 heads\).*use model=esm2_t12_35M_UR50D",
    ):
        load(path)


def test_missing_keys_are_named(tmp_path):
    state = random_state(A8M)
    del state["layers.2.fc2.bias"], state["emb_layer_norm_after.weight"]
    with pytest.raises(ValueError, match=r"lacks layers\.2\.fc2\.bias, emb_layer_norm_after\.weight"):
        load(write_checkpoint(tmp_path / "holes.pt", A8M, state))


def test_arbitrary_code_in_a_checkpoint_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return (open, (str(tmp_path / "pwned"), "w"))

    torch.save({"model": {}, "evil": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt cannot be read"):
        load(tmp_path / "evil.pt")
    assert not (tmp_path / "pwned").exists()


def test_random_weights_are_seeded():
    one, same, other = (
        load("random"),
        load("random"),
        load_model(ModelConfig("x", 6, 320, 20, "random", seed=1), CPU, torch.float32, PLAIN),
    )
    torch.testing.assert_close(one.layers[0].qkv.weight, same.layers[0].qkv.weight, rtol=0, atol=0)
    assert not torch.equal(one.layers[0].qkv.weight, other.layers[0].qkv.weight)
    assert all(torch.isfinite(parameter).all() for parameter in one.parameters())


def test_the_cache_is_torch_hubs(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    assert locate(config(None)) == tmp_path / "hub" / "checkpoints" / "esm2_t6_8M_UR50D.pt"


def test_offline_with_an_empty_cache_says_where_the_file_goes(monkeypatch, tmp_path):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("dist_esm.model.checkpoints.locate.URL", "http://127.0.0.1:9/{name}.pt")
    with pytest.raises(
        ValueError,
        match=r"hub/checkpoints/esm2_t6_8M_UR50D\.pt is missing and http.*cannot be downloaded"
        r".*put the file there, or name it",
    ):
        fetch(config(None))
    assert list((tmp_path / "hub" / "checkpoints").iterdir()) == []


def test_a_download_lands_in_the_cache_once(monkeypatch, tmp_path, checkpoint_8m):
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("dist_esm.model.checkpoints.locate.URL", checkpoint_8m.parent.as_uri() + "/{name}.pt")
    fetch(config(None))
    path = locate(config(None))
    assert path.read_bytes() == checkpoint_8m.read_bytes()
    monkeypatch.setattr("dist_esm.model.checkpoints.locate.URL", "http://127.0.0.1:9/{name}.pt")
    fetch(config(None))
    assert load(None).arch == A8M


def test_every_model_of_the_configuration_is_a_known_architecture():
    from dist_esm.commandline.cli import compose_config

    for arch, name in KNOWN.items():
        model = compose_config(["input=x", f"model={name}"]).model
        assert (model.name, model.num_layers, model.embed_dim, model.attention_heads) == (
            name,
            arch.num_layers,
            arch.embed_dim,
            arch.attention_heads,
        )
