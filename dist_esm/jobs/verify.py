"""Outputs read back and held to the inputs: every record in its place, with the bytes that were written.

The inputs are parsed again under the settings that the outputs were made under, and each output is opened as
its users open it. Checked are the output's checksum, the text it was made of, ids and lengths in file order,
the shape of every representation, and that all numbers are finite. Nothing is computed, so no device and no
weights are needed. The journal says what there is, whether the run that wrote it came to its end or not.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dist_esm.atomic import atomically
from dist_esm.attempt import as_value
from dist_esm.checksum import read_again
from dist_esm.config import Config, Include
from dist_esm.distributed import World
from dist_esm.fasta.blocks import Digests, Tee, whole_file
from dist_esm.fasta.parser import read_proteins
from dist_esm.fasta.segments import apply_length_policy, num_embedded
from dist_esm.names import printable
from dist_esm.outputs import journal, launches
from dist_esm.outputs.finished import FinishedFile, finished_files
from dist_esm.outputs.format_version import read_json
from dist_esm.outputs.load import EmbeddingSet, load
from dist_esm.outputs.output_dir import inside
from dist_esm.outputs.trust import refuse_strange_files
from dist_esm.planning.assign import assign_to_bins
from dist_esm.planning.inputs import search_inputs
from dist_esm.planning.pipes import remove_copies, spool_pipes
from dist_esm.types import Count, FastaFile, Unit

log = logging.getLogger("dist_esm")


@dataclass(frozen=True)
class Finding:
    """Something that is missing or wrong."""

    path: str
    """The input."""
    problem: str


@dataclass(frozen=True)
class Work:
    """The state of an output directory."""

    finished: dict[str, FinishedFile]
    """By output."""
    outputs: dict[str, str]
    """Path of an input, as a launch found it, to its output."""
    reasons: dict[str, str]
    """Path of an input to why the last run has no output of it."""
    settings: Config
    """The configuration that the outputs were made under."""

    def output_of(self, file: FastaFile) -> str:
        """Return the output of an input. One that was moved is told by its place below the common root of the
        inputs."""
        return self.outputs.get(str(file.path), str(file.output))


def verify(config: Config, world: World) -> int:
    """Check the outputs of `input` in `output_dir`; every rank checks its share of the files.

    Returns
    -------
    int
        Rank 0: 0 if all is well, 2 if something is missing or wrong. Other ranks: 0.

    Raises
    ------
    RefusedError
        On every rank, if there is nothing to check.
    """
    spooled = spool_pipes(config, world)
    files = world.all_or_none(search_inputs, config.input_list(), spooled).files
    work = world.all_or_none(read_work, config)
    world.start_process_group(torch.device("cpu"))
    bins = assign_to_bins(
        [file.num_bytes for file in files], [str(file.path) for file in files], world.world_size
    )
    findings: list[Finding] = []
    num_proteins = 0
    for place in bins[world.rank]:
        file = files[place]
        finished = work.finished.get(work.output_of(file))
        if finished is None:
            reason = work.reasons.get(str(file.path), "not in the journal: no run has finished it")
            findings.append(Finding(str(file.path), reason))
            continue
        problems = as_value(list, check_file(file, finished, work.settings))
        if isinstance(problems, Exception):
            problems = [f"{type(problems).__name__}: {problems}"]
        findings += [Finding(str(file.path), problem) for problem in problems]
        num_proteins += finished.num_sequences
    shares = world.all_gather((findings, num_proteins), Finding)
    remove_copies(files)
    if not world.is_main:
        return 0
    everything = sorted(
        (finding for share, _ in shares for finding in share), key=lambda finding: finding.path
    )
    checked = {work.output_of(file) for file in files}
    others = [file.source for output, file in work.finished.items() if output not in checked]
    return conclude(config.output_dir, len(files), sum(number for _, number in shares), everything, others)


def conclude(
    output_dir: Path, num_files: int, num_proteins: int, findings: list[Finding], others: list[str]
) -> int:
    """Write verify.json, print what was found, and return the exit code.

    Parameters
    ----------
    output_dir
        The directory.
    num_files, num_proteins
        What was checked.
    findings
        What is missing or wrong.
    others
        Sources of finished files that `input` does not name: of other runs, and no error.
    """
    status = "wrong" if findings else "ok"
    content = {
        "status": status,
        "files": num_files,
        "proteins": num_proteins,
        "findings": [vars(finding) for finding in findings],
        "other_runs": others,
    }
    with atomically(output_dir / "verify.json") as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for finding in findings:
        print(printable(f"{finding.path}: {finding.problem}"))
    if others:
        shown = ", ".join(others[:3]) + (f" and {len(others) - 3} more" if len(others) > 3 else "")
        words = f"not checked: {len(others)} files of other runs, which input does not name: {shown}"
        print(printable(words))
    print(
        f"{status}: {num_files} files, {num_proteins} proteins checked, {len(findings)} findings", flush=True
    )
    return 2 if findings else 0


def read_work(config: Config) -> Work:
    """Read what is known of an output directory: journal, launches, settings, and reasons in a report.

    Raises
    ------
    ValueError
        If no run was ever begun there, or what it left cannot be understood.
    """
    output_dir = config.output_dir
    refuse_strange_files(output_dir)
    path = inside(output_dir) / "config.json"
    if not path.is_file():
        raise ValueError(
            f"output_dir={output_dir} has no .dist_esm/config.json: there is no finished run to verify"
        )
    try:
        settings = typed({**read_json(path), "input": "", "output_dir": ""})
    except (TypeError, OmegaConfBaseException) as error:
        problem = " ".join(str(error).split())
        raise ValueError(
            f"{path} is no configuration of this version ({type(error).__name__}: {problem}): "
            "run again, which does again only what is missing"
        ) from None
    outputs = {
        item.path: item.output
        for launch in launches.launch_files(output_dir)
        for item in launches.read_inputs(launch)
    }
    return Work(
        finished_files(journal.read(output_dir)),
        outputs,
        reasons_in(output_dir / "report.json"),
        replace(settings, input=config.input, output_dir=output_dir),
    )


def typed(values: dict[str, Any]) -> Config:
    """Return a configuration that was written as plain values, with its types."""
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    assert isinstance(config, Config)
    return config


def reasons_in(report: Path) -> dict[str, str]:
    """Read from a report why inputs have no output. It may be of an earlier run, or not there: only the
    journal says what is done."""
    if not report.is_file():
        return {}
    try:
        content = read_json(report)
        failed, not_attempted = content.get("failed", []), content.get("not_attempted", [])
        reasons = {
            failure["path"]: f"failed: {failure['error_type']}: {failure['error_message']}"
            for failure in failed
        }
        return reasons | dict.fromkeys(not_attempted, "not attempted: the run was stopped before it")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        log.warning("%s cannot be read, so it names no reasons: %s", report, error)
        return {}


def check_file(file: FastaFile, finished: FinishedFile, settings: Config) -> Iterator[str]:
    """Look for what is missing or wrong about the outputs of one file.

    Parameters
    ----------
    file
        The input.
    finished
        What the journal says of it.
    settings
        What it was embedded under.

    Yields
    ------
    str
        A problem in words.

    Raises
    ------
    Exception
        Whatever reading the input or an output raises: that is a finding, too.
    """
    for written in finished.written:
        there = read_again(settings.output_dir, written)
        if there is None:
            yield f"{written.path} is missing"
            return
        if there != written:
            yield (
                f"{written.path} has {there.num_bytes} bytes with another checksum than the "
                f"{written.num_bytes} that were written"
            )
            return
    texts = sorted(
        (span, digest)
        for entry in finished.entries
        for span, digest in zip(entry.slices, entry.digests, strict=True)
    )
    seen = Digests([span for span, _ in texts])
    ids, lengths = expected_records(file, settings, seen.update)
    if seen.hexdigests() != [digest for _, digest in texts]:
        yield "its text is not what was embedded: it was changed since; run again, which embeds it anew"
    outputs = [written.path for written in finished.written]
    sets = [load(settings.output_dir / output) for output in outputs]
    written_ids = [protein for part in sets for protein in part.ids]
    written_lengths = [length for part in sets for length in part.lengths]
    if written_ids != ids:
        yield difference(written_ids, ids)
        return
    if written_lengths != lengths:
        pairs = zip(written_lengths, lengths, strict=True)
        place = next(place for place, (length, expected) in enumerate(pairs) if length != expected)
        yield (
            f"protein {place + 1} ({ids[place]}) has {written_lengths[place]} embedded residues, "
            f"{lengths[place]} are expected"
        )
        return
    for part, output in zip(sets, outputs, strict=True):
        yield from check_numbers(part, output, settings)


def expected_records(file: FastaFile, settings: Config, tee: Tee) -> tuple[list[str], list[int]]:
    """Return ids and embedded residues of the records of a file that get an embedding, in order; its text
    goes to `tee`."""
    unit = Unit(0, 0, whole_file(file.location), Count(), Count(), is_whole=True)
    ids, lengths = [], []
    for protein in read_proteins(unit, settings, tee):
        shaped, _, spans = apply_length_policy(protein, settings)
        if spans:
            ids.append(shaped.id)
            lengths.append(num_embedded(spans))
    return ids, lengths


def difference(written: list[str], expected: list[str]) -> str:
    """Say in words where ids first differ."""
    for place, (protein, right) in enumerate(zip(written, expected, strict=False)):
        if protein != right:
            return f"protein {place + 1} is {protein}, {right} is expected"
    return f"{len(written)} proteins, {len(expected)} are expected"


def check_numbers(part: EmbeddingSet, output: str, settings: Config) -> Iterator[str]:
    """Look at the shape of every representation in one output, and for values that are not finite."""
    width = settings.model.embed_dim
    for kind, layer in settings.output_representations():
        if kind is not Include.per_tok:
            values = as_value(part.to_numpy, kind.name, layer)
            if isinstance(values, Exception):
                yield f"{output}: {kind.name} of layer {layer} cannot be read: {values}"
            elif values.shape != (len(part), width):
                yield (
                    f"{output}: {kind.name} of layer {layer} has shape {values.shape}, "
                    f"({len(part)}, {width}) is expected"
                )
            elif not np.isfinite(values).all():
                yield f"{output}: {kind.name} of layer {layer} has values that are not finite"
            continue
        for place in range(len(part)):
            rows = part.residues(place, layer)
            if rows.shape != (part.lengths[place], width) or not np.isfinite(rows).all():
                yield (
                    f"{output}: the residues of protein {place + 1} ({part.ids[place]}) in layer {layer} "
                    "have another shape or are not finite"
                )
