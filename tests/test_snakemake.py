"""The Snakemake rule that is shipped, run by Snakemake."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.command import MODEL, environment, read_report

SNAKEFILE = Path(__file__).resolve().parent.parent / "workflows" / "Snakefile"
SNAKEMAKE = shutil.which("snakemake", path=f"{sys.prefix}/workflows/bin:{os.environ['PATH']}")


def test_the_rule_embeds_goes_on_and_has_nothing_to_do_when_it_is_done(tmp_path):
    if SNAKEMAKE is None:
        pytest.skip("no Snakemake: .ci/run installs it in .venv/workflows")
    inputs = tmp_path / "my proteins"
    inputs.mkdir()
    (inputs / "a.fasta").write_text(">a\nMKTAYIAKQR\n")
    (inputs / "b.fasta").write_text("no header\n")
    command = tmp_path / "bin" / "dist-esm"  # of this checkout, wherever another one is installed
    command.parent.mkdir()
    command.write_text(
        f'#!/bin/sh\nPYTHONPATH={SNAKEFILE.parents[1]} exec {sys.executable} -m dist_esm "$@"\n'
    )
    command.chmod(0o755)
    words = [MODEL, "model.weights=random", "device=cpu", "include=[mean,bos]"]
    settings = {"proteins": "my proteins", "output_dir": "out", "keys": words}
    (tmp_path / "Snakefile").write_text(
        "module embeddings:\n"
        f"    snakefile: {str(SNAKEFILE)!r}\n"
        f"    config: {settings!r}\n"
        "use rule embed from embeddings\n"
    )

    def run() -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [SNAKEMAKE, "--cores", "1"],
            cwd=tmp_path,
            env=environment(PATH=f"{command.parent}:{os.environ['PATH']}"),
            capture_output=True,
            text=True,
            check=False,
            timeout=120,
        )

    failed = run()
    assert failed.returncode == 1, failed.stderr
    assert "partial: 1 of 2 files embedded" in failed.stdout + failed.stderr
    (inputs / "b.fasta").write_text(">b\nGAVLIPFMW\n")
    done = run()
    assert done.returncode == 0, done.stderr
    report = read_report(tmp_path / "out")
    assert (report["status"], [entry["resumed"] for entry in report["files"]]) == ("complete", [True, False])
    assert "Nothing to be done" in run().stderr
