"""What a rank runs on and what its numbers depend on: inputs, device, dtype, kernels, weights, and the model on its device."""

from __future__ import annotations

import logging
import os
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from dist_esm.atomic import atomically
from dist_esm.config import Config, Format, to_dict
from dist_esm.distributed import World
from dist_esm.model.engine import Engine, default_toks_per_batch, make_engine, num_cores
from dist_esm.model.kernels.choose import Kernels, choose_device, choose_dtype, choose_kernels
from dist_esm.model.weights import RANDOM, architecture, fetch, weights_id
from dist_esm.planning.inputs import Inputs, refuse_nested, search_inputs
from dist_esm.planning.pipes import spool_pipes

log = logging.getLogger("dist_esm")


def find_inputs(config: Config, world: World) -> Inputs:
    """Find the input files on every rank; pipes are copied by rank 0, which also says what a search passed over.

    Raises
    ------
    RefusedError
        On every rank, if an input cannot be taken, or outputs would get into each other's way.
    """
    spooled = spool_pipes(config, world)
    inputs = world.all_or_none(search_inputs, config.input_list(), spooled, config.output_dir)
    if config.format is Format.fair_esm:
        world.all_or_none(refuse_nested, inputs.files)
    if world.is_main and (summary := inputs.summary()):
        log.warning("%s", summary)
    return inputs


@dataclass(frozen=True)
class Setup:
    """What this rank runs on, and what its numbers depend on."""

    device: torch.device
    dtype: torch.dtype
    kernels: Kernels
    provenance: dict[str, Any]
    """Goes into every output."""
    settings: dict[str, Any]
    """All that one output directory must not mix."""


def choose_setup(config: Config, world: World) -> Setup:
    """Choose the device and find the weights: all ranks can, or all refuse."""
    world.all_or_none(make_output_dir, config.output_dir)
    device = world.all_or_none(
        choose_device, config.device, world.local_rank, world.local_world_size, world.host
    )
    dtype = choose_dtype(config.dtype, device)
    head_dim = architecture(config.model).head_dim
    kernels = world.all_or_none(choose_kernels, config.attention, config.linear, device, dtype, head_dim)
    world.all_or_none(lambda: fetch(config.model) if world.local_rank == 0 else None)
    world.start_process_group(device)
    provenance = {
        "model": config.model.name,
        "weights": world.all_or_none(weights_id, config.model),
        "layers": config.resolved_layers(),
        "dtype": str(dtype).removeprefix("torch."),
        "save_dtype": config.save_dtype.name,
        "truncation_seq_length": config.truncation_seq_length,
        "long": config.long.name,
        "dist_esm": version("dist_esm"),
    }
    values = to_dict(config)
    settings = {
        key: values[key]
        for key in (
            "format",
            "include",
            "window_overlap",
            "residues",
            "special_tokens",
            "chains",
            "header_encoding",
            "max_proteins_per_output",
        )
    }
    # On a GPU the rows of a pack choose the matrix kernels, so they are part of what the bits depend on.
    shape = (
        {"toks_per_batch": config.toks_per_batch or default_toks_per_batch("cuda", config.model.embed_dim)}
        if device.type == "cuda"
        else {}
    )
    settings = {
        **provenance,
        **settings,
        **shape,
        "device": device.type,
        "attention": kernels.attention,
        "linear": kernels.linear.name,
    }
    del settings["dist_esm"]
    return Setup(device, dtype, kernels, provenance, settings)


def make_output_dir(output_dir: Path) -> None:
    """Create the output directory and try to write to it.

    Raises
    ------
    ValueError
        If it cannot be written to.
    """
    scratch = output_dir / ".dist_esm"
    try:
        scratch.mkdir(parents=True, exist_ok=True)
        with atomically(scratch / f"writable.{os.getpid()}") as beside:
            beside.write_text("")
        (scratch / f"writable.{os.getpid()}").unlink()
    except OSError as error:
        raise ValueError(
            f"output_dir={output_dir} cannot be written to ({error.strerror}): name a directory that can"
        ) from None


def load_engine(config: Config, setup: Setup, world: World) -> Engine:
    """The model on this rank's device, its kernels compiled."""
    began = time.monotonic()
    engine = make_engine(
        config, setup.device, setup.dtype, setup.kernels, max(1, num_cores() // world.local_world_size)
    )
    loaded = time.monotonic()
    engine.warm_up()
    engine.startup = {"load_seconds": loaded - began, "kernels_seconds": time.monotonic() - loaded}
    log.info(
        "%s on %s in %s, loaded in %.1f s, kernels ready in %.1f s; %s, packs of %d tokens",
        config.model.name,
        describe(setup.device),
        setup.provenance["dtype"],
        *engine.startup.values(),
        setup.kernels,
        engine.toks_per_batch,
    )
    if world.is_main and config.model.weights == RANDOM:
        log.warning("WEIGHTS ARE RANDOM (seed %d): the embeddings will mean nothing", config.model.seed)
    return engine


def describe(device: torch.device) -> str:
    """A device in words."""
    return f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "cpu"
