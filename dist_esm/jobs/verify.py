"""A finished output directory read back: every record of every input accounted for, in order, with the bytes that were written.

The inputs are parsed again under the settings that the report holds, and each output is opened as its users open it. What is looked
at: that there is an output and that it is the one that was written (checksum), ids and lengths in file order, the shape of every
representation, and that all numbers are finite. Nothing is computed, so no device and no weights are needed.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dist_esm.atomic import atomically, fingerprint
from dist_esm.attempt import as_value
from dist_esm.config import Config, Include, from_dict
from dist_esm.distributed import World
from dist_esm.fasta.blocks import Digests, Tee, whole_file
from dist_esm.fasta.parser import read_proteins
from dist_esm.fasta.segments import apply_length_policy, num_embedded
from dist_esm.outputs.journal import Entry
from dist_esm.outputs.journal import read as read_journal
from dist_esm.outputs.load import EmbeddingSet, load
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


def verify(config: Config, world: World) -> int:
    """Check `output_dir` against `input`; every rank checks its share of the files.

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
    report, settings = world.all_or_none(read_report, config)
    world.start_process_group(torch.device("cpu"))
    journal = {one.path: entry for entry in read_journal(config.output_dir) for one in entry.written}
    done = {entry["path"]: entry for entry in report["files"]}
    # Inputs that were moved are told by where their outputs are.
    moved = {
        journal[entry["outputs"][0]].output: entry
        for entry in report["files"]
        if entry["outputs"][0] in journal
    }
    reasons = {
        failure["path"]: f"failed: {failure['error_type']}: {failure['error_message']}"
        for failure in report["failed"]
    }
    reasons |= dict.fromkeys(report["not_attempted"], "not attempted: the run was stopped before it")
    findings: list[Finding] = []
    num_proteins = 0
    sizes, paths = [file.num_bytes for file in files], [str(file.path) for file in files]
    mine = assign_to_bins(sizes, paths, world.world_size)[world.rank]
    for number in mine:
        path = str(files[number].path)
        entry = done.get(path) or moved.get(str(files[number].output))
        if path in reasons or entry is None:
            findings.append(
                Finding(path, reasons.get(path, "not in report.json: it was not part of the run"))
            )
            continue
        found = as_value(list, check_file(files[number], entry["outputs"], journal, settings))
        problems = [f"{type(found).__name__}: {found}"] if isinstance(found, Exception) else found
        findings += [Finding(path, problem) for problem in problems]
        num_proteins += entry["sequences"]
    told = world.all_gather((findings, len(mine), num_proteins))
    remove_copies(files)
    if not world.is_main:
        return 0
    everything = sorted(
        (finding for share, _, _ in told for finding in share), key=lambda finding: finding.path
    )
    total = {"files": sum(share for _, share, _ in told), "proteins": sum(share for _, _, share in told)}
    with atomically(config.output_dir / "verify.json") as beside:
        content = {
            "status": "wrong" if everything else "ok",
            **total,
            "findings": [vars(finding) for finding in everything],
        }
        beside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    for finding in everything:
        print(f"{finding.path}: {finding.problem}")
    print(
        f"{'wrong' if everything else 'ok'}: {total['files']} files, {total['proteins']} proteins checked, {len(everything)} findings",
        flush=True,
    )
    return 2 if everything else 0


def read_report(config: Config) -> tuple[dict[str, Any], Config]:
    """The report of a finished run, and the settings that it was made under.

    Raises
    ------
    ValueError
        If there is none, or it cannot be understood.
    """
    path = config.output_dir / "report.json"
    if not path.is_file():
        raise ValueError(
            f"output_dir={config.output_dir} has no report.json: there is no finished run to verify"
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        settings = from_dict(
            {**content["config"], "input": config.input, "output_dir": str(config.output_dir)}
        )
    except (ValueError, KeyError, TypeError) as error:
        problem = " ".join(str(error).split())
        raise ValueError(
            f"{path} is no report of this version ({type(error).__name__}: {problem}): run again, which does again only what is missing"
        ) from None
    return content, settings


def check_file(
    file: FastaFile, outputs: Sequence[str], journal: Mapping[str, Entry], settings: Config
) -> Iterator[str]:
    """What is missing or wrong about the outputs of one file.

    Parameters
    ----------
    file
        The input.
    outputs
        Its outputs, relative to `output_dir`.
    journal
        The last entry that speaks of each output.
    settings
        What it was embedded under.

    Raises
    ------
    Exception
        Whatever reading the input or an output raises: that is a finding, too.
    """
    entries = list({id(journal[output]): journal[output] for output in outputs if output in journal}.values())
    written = {one.path: one for entry in entries for one in entry.written}
    for output in outputs:
        found = fingerprint(settings.output_dir, Path(output))
        if found is None:
            yield f"{output} is missing"
            return
        if output not in written:
            yield f"{output} is not in the journal: it cannot be told whether it is what was written"
        elif found != written[output]:
            yield f"{output} has {found.num_bytes} bytes with another checksum than the {written[output].num_bytes} that were written"
            return
    texts = sorted(
        (slice_, digest)
        for entry in entries
        for slice_, digest in zip(entry.slices, entry.digests, strict=True)
    )
    seen = Digests([slice_ for slice_, _ in texts])
    ids, lengths = expected_records(file, settings, seen.update)
    if seen.hexdigests() != [digest for _, digest in texts]:
        yield "its text is not what was embedded: it was changed since; run again, which embeds it anew"
    sets = [load(settings.output_dir / output) for output in outputs]
    found_ids = [one for part in sets for one in part.ids]
    found_lengths = [one for part in sets for one in part.lengths]
    if found_ids != ids:
        yield difference(found_ids, ids)
        return
    if found_lengths != lengths:
        place = next(
            i for i, (one, other) in enumerate(zip(found_lengths, lengths, strict=True)) if one != other
        )
        yield f"protein {place + 1} ({ids[place]}) has {found_lengths[place]} embedded residues, {lengths[place]} are expected"
        return
    for part, output in zip(sets, outputs, strict=True):
        yield from check_numbers(part, output, settings)


def expected_records(file: FastaFile, settings: Config, tee: Tee) -> tuple[list[str], list[int]]:
    """Ids and embedded residues of the records of a file that get an embedding, in order; its text goes to `tee`."""
    unit = Unit(0, 0, whole_file(file.location), Count(), Count(), is_whole=True)
    ids, lengths = [], []
    for protein in read_proteins(unit, settings, tee):
        shaped, _, spans = apply_length_policy(protein, settings)
        if spans:
            ids.append(shaped.id)
            lengths.append(num_embedded(spans))
    return ids, lengths


def difference(found: list[str], expected: list[str]) -> str:
    """The first place where ids differ, in words."""
    for place, (one, other) in enumerate(zip(found, expected, strict=False)):
        if one != other:
            return f"protein {place + 1} is {one}, {other} is expected"
    return f"{len(found)} proteins, {len(expected)} are expected"


def check_numbers(part: EmbeddingSet, output: str, settings: Config) -> Iterator[str]:
    """Shapes and finite values of every representation in one output."""
    width = settings.model.embed_dim
    for kind, layer in settings.output_representations():
        if kind is not Include.per_tok:
            values = as_value(part.vectors_of, kind.name, layer)
            if isinstance(values, Exception):
                yield f"{output}: {kind.name} of layer {layer} cannot be read: {values}"
            elif values.shape != (len(part), width):
                yield f"{output}: {kind.name} of layer {layer} has shape {values.shape}, ({len(part)}, {width}) is expected"
            elif not np.isfinite(values).all():
                yield f"{output}: {kind.name} of layer {layer} has values that are not finite"
            continue
        for place in range(len(part)):
            rows = part.residues(place, layer)
            if rows.shape != (part.lengths[place], width) or not np.isfinite(rows).all():
                yield f"{output}: the residues of protein {place + 1} ({part.ids[place]}) in layer {layer} have another shape or are not finite"
