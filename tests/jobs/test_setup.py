"""What a run's numbers depend on is recorded, and a resume compares it."""

from __future__ import annotations

import json

import torch

from dist_esm.model import NUMERICS
from dist_esm.version import code_version
from helpers.command import MODEL, read_report, run_ranks
from helpers.data import PROTEINS


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
