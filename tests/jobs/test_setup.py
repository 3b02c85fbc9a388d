"""What a run's numbers depend on is recorded, and a resume compares it."""

from __future__ import annotations

import json

import torch

from dist_esm.config import Config, model_config
from dist_esm.distributed import World
from dist_esm.jobs import setup
from dist_esm.jobs.setup import settle_toks_per_batch
from dist_esm.model import NUMERICS
from dist_esm.model.memory import Memory
from dist_esm.version import code_version
from helpers.command import MODEL, read_report, run_ranks
from helpers.data import PROTEINS

GB = 10**9


def test_a_resume_does_not_mix_numerics_and_outputs_name_the_code(tmp_path):
    line = [
        f"input={PROTEINS / 'viruses' / 'tiny.fas'}",
        f"output_dir={tmp_path}",
        MODEL,
        "model.weights=random",
    ]
    result = run_ranks(None, *line)
    assert result.returncode == 0, result.stderr
    report, output = read_report(tmp_path), torch.load(tmp_path / "tiny_ESM.pt", weights_only=True)
    for provenance in (report["model"], output["provenance"]):
        assert (provenance["numerics"], provenance["dist_esm"]) == (NUMERICS, code_version())
    assert report["versions"]["dist_esm"] == code_version()
    path = tmp_path / ".dist_esm" / "settings.json"
    content = json.loads(path.read_text())
    assert content["settings"]["numerics"] == NUMERICS
    assert run_ranks(None, *line).returncode == 0
    content["settings"]["numerics"] = NUMERICS - 1
    path.write_text(json.dumps(content))
    refused = run_ranks(None, *line)
    assert refused.returncode == 1
    assert f"numerics={NUMERICS - 1} before, {NUMERICS} now" in refused.stderr
    assert len(refused.stderr.splitlines()) == 1


def settled(config: Config, free: int, monkeypatch) -> int | None:
    monkeypatch.setattr(setup, "device_memory", lambda device: Memory(80 * GB, free))
    settle_toks_per_batch(config, torch.device("cuda", 0), torch.float16, World.alone())
    return config.toks_per_batch


def test_a_directory_goes_on_with_what_it_was_begun_with(tmp_path, monkeypatch, caplog):
    """What a card has free is arranged: a GPU that others use is not at hand."""

    def config(**options) -> Config:
        return Config(input="x", output_dir=tmp_path, model=model_config("esm2_t36_3B_UR50D"), **options)

    assert settled(config(), 80 * GB, monkeypatch) is None
    assert caplog.records == []
    assert settled(config(), 9 * GB, monkeypatch) == 12_672
    fits = "packs of 12672 tokens, not 25344: larger ones do not fit in the 9 GB that are free (rank 0"
    assert fits in caplog.text
    (tmp_path / ".dist_esm").mkdir()
    recorded = tmp_path / ".dist_esm" / "settings.json"
    recorded.write_text(json.dumps({"format_version": 2, "settings": {"toks_per_batch": 12_672}}))
    assert settled(config(), 80 * GB, monkeypatch) == 12_672
    assert "packs of 12672 tokens, not 25344: output_dir was begun so (rank 0" in caplog.text
    assert settled(config(resume=False), 80 * GB, monkeypatch) is None
    assert settled(config(toks_per_batch=4096), 9 * GB, monkeypatch) == 4096
    caplog.clear()
    recorded.write_text(json.dumps({"format_version": 2, "settings": {"toks_per_batch": 25_344}}))
    assert settled(config(), 9 * GB, monkeypatch) is None, "the same command goes on, and tries"
    assert caplog.records == []
    assert settled(config(resume=False), 9 * GB, monkeypatch) == 12_672
