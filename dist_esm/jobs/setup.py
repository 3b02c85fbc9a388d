"""Device, dtype, kernels and weights: all that a rank runs on and that its numbers depend on."""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, ParamSpec, TypeVar

import torch

from dist_esm.attempt import as_value
from dist_esm.config import Config, Dtype, ModelConfig, check_layers, model_config, plain_values
from dist_esm.distributed import RefusedError, World
from dist_esm.fasta.formats import SUFFIXES as PACKED
from dist_esm.jobs.progress.lines import duration
from dist_esm.launcher import num_cores
from dist_esm.model import NUMERICS
from dist_esm.model.checkpoints.locate import AUTO, RANDOM, fetch, missing
from dist_esm.model.engine import Engine, build_engine, default_toks_per_batch
from dist_esm.model.kernels.choose import (
    Kernels,
    choose_device,
    choose_dtype,
    choose_kernels,
    precision_of,
    quantized_products,
    what_would_be_faster,
)
from dist_esm.model.memory import device_memory, rows_that_fit, size_in_words
from dist_esm.model.speed import CPU_FLOPS, SMALL_MODEL, SMALL_WIDTH, SOURCE, flops_of
from dist_esm.model.weights import WeightsId, architecture, check_weights, complete
from dist_esm.outputs.formats.registry import FORMATS
from dist_esm.outputs.output_dir import make_output_dir, read_settings
from dist_esm.planning.inputs import Inputs, fail_long_paths, refuse_nested, search_inputs
from dist_esm.planning.pipes import spool_pipes
from dist_esm.progress import Phase
from dist_esm.version import code_version

log = logging.getLogger("dist_esm")
SMALLER_PACKS = "packs of %d tokens, not %d: %s"
PACKED_RATIO = 2
"""Bytes of text for each byte of a compressed file, about."""
NOT_HERE = "not on this machine, a run downloads them first"
P = ParamSpec("P")
T = TypeVar("T")
KEYS_OF_CONTENT = (
    "format",
    "compression",
    "include",
    "window_overlap",
    "residues",
    "special_tokens",
    "chains",
    "id",
    "header_encoding",
    "max_proteins_per_output",
)
"""Keys that decide the content of an output, beside those that its numbers depend on."""


def find_inputs(config: Config, world: World, is_dry: bool = False) -> Inputs:
    """Find the input files on every rank.

    Rank 0 copies the pipes among them, and says what a search passed over, unless nothing is to be written.

    Raises
    ------
    RefusedError
        On every rank, if an input cannot be taken, or two outputs would get into each other's way.
    """
    spooled = {} if is_dry else spool_pipes(config, world)
    inputs = world.all_or_none(search_inputs, config.input_list(), spooled, config.output_dir)
    inputs = replace(inputs, files=fail_long_paths(inputs.files, config.output_dir))
    if FORMATS[config.format.name].is_folder:
        world.all_or_none(refuse_nested, inputs.files)
    if world.is_main and not is_dry and (summary := inputs.summary()):
        log.warning("%s", summary)
    return inputs


@dataclass(frozen=True)
class Setup:
    """Device, dtype and kernels of this rank, and all that its numbers depend on."""

    device: torch.device
    dtype: torch.dtype
    """Of parameters and products; of those that `kernels.quantized` leaves out."""
    kernels: Kernels
    provenance: dict[str, Any]
    """Goes into every output."""
    settings: dict[str, Any]
    """All that one output directory must not mix."""
    readying: threading.Thread | None = None
    """Readies the kernels while there is something else to do; what goes wrong there goes wrong in the first
    pack again, which says so."""

    def wait_for_kernels(self) -> None:
        """Wait until the kernels are ready."""
        if self.readying is not None:
            self.readying.join()

    @property
    def precision(self) -> torch.dtype:
        """The dtype that decides how exact the numbers are."""
        return precision_of(self.dtype, self.kernels)


MakeEngine = Callable[[Config, Setup, World], Engine]
"""Makes the model that a rank embeds with; `load_engine` is the one that loads ESM-2."""


def choose_setup(config: Config, world: World, inputs: Inputs | None = None) -> Setup:
    """Choose the device and find the weights: all ranks can, or all refuse.

    Parameters
    ----------
    config
        Checked configuration.
    world
        The ranks.
    inputs
        What is to be embedded: a CPU that will take long for it says so before weights are fetched.

    Raises
    ------
    RefusedError
        On every rank, if the output directory, the device, the kernels or the weights cannot be had on one.
    """
    world.all_or_none(first_on_host, world, make_output_dir, config.output_dir)
    device = find_device(config, world, inputs)
    return setup_on(device, find_weights(config, world), config, world)


def find_device(config: Config, world: World, inputs: Inputs | None = None) -> torch.device:
    """Choose the device of this rank; a CPU that will take long for the inputs says so.

    Raises
    ------
    RefusedError
        On every rank, if one has none.
    """
    device = world.all_or_none(
        choose_device, config.device, world.local_rank, world.local_world_size, world.host
    )
    if world.is_main and inputs is not None and config.model.name != AUTO:  # whose size is not known yet
        warn_of_slow_cpu(config, device, inputs)
    return device


def setup_on(device: torch.device, weights: WeightsId, config: Config, world: World) -> Setup:
    """Choose dtype and kernels for the device, and start the process group.

    Raises
    ------
    RefusedError
        On every rank, if kernels that are named cannot run on one, or ranks would compute different numbers.
    """
    dtype = choose_dtype(config.dtype, device)
    head_dim = architecture(config.model).head_dim
    products = quantized_products(config.dtype, config.fp8)
    kernels = world.all_or_none(
        choose_kernels, config.attention, config.linear, device, dtype, head_dim, products
    )
    if world.is_main and (advice := what_would_be_faster(config.linear, device, dtype, head_dim)):
        log.info("%s", advice)
    settle_toks_per_batch(config, device, dtype, world)
    readying = None
    if device.type == "cuda":
        ready = kernels.get_ready, device, config.model.embed_dim
        readying = threading.Thread(target=as_value, args=ready, name="ready")
        readying.start()
    numbers = numbers_of(config, precision_of(dtype, kernels), weights.fingerprint)
    provenance = {**numbers, "weights_in_words": weights.words, "dist_esm": code_version()}
    settings = settings_of(config, device, kernels, numbers)
    agree_on_settings(settings, world)
    world.start_process_group(device)
    return Setup(device, dtype, kernels, provenance, settings, readying)


def settle_toks_per_batch(config: Config, device: torch.device, dtype: torch.dtype, world: World) -> None:
    """Make packs smaller than the default, on all ranks, if that does not fit in the free memory of one.

    Raises
    ------
    RefusedError
        On every rank, if one cannot read what the output directory was begun with.
    """
    if config.toks_per_batch is not None:
        return
    rows, reason = world.all_or_none(rows_that_suit, config, device, dtype)
    answers = world.exchange_by_name(json.dumps([rows, reason]))
    fewest, reason, name = min((*json.loads(text), name) for name, text in answers)
    default = default_toks_per_batch(device.type, config.model.embed_dim)
    if fewest < default:
        config.toks_per_batch = fewest
        if world.is_main:
            log.warning(SMALLER_PACKS, fewest, default, f"{reason} ({name})")


def rows_that_suit(config: Config, device: torch.device, dtype: torch.dtype) -> tuple[int, str]:
    """Return the tokens of a pack that this rank would take, and why they are fewer than the default.

    On a GPU the bits may depend on it, so a directory goes on with what it was begun with, however much
    memory is free now: a pack that does not fit is halved when the engine warms up.
    """
    default = default_toks_per_batch(device.type, config.model.embed_dim)
    if device.type != "cuda":
        return default, ""
    begun = (read_settings(config.output_dir) or {}).get("toks_per_batch") if config.resume else None
    if isinstance(begun, int) and 0 < begun <= default:
        return begun, "output_dir was begun so"
    return rows_in_free_memory(config.model, device, dtype)


def rows_in_free_memory(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> tuple[int, str]:
    """Return the tokens of a pack that fits beside a model, and why they are fewer than the default."""
    default = default_toks_per_batch(device.type, model.embed_dim)
    if device.type != "cuda":
        return default, ""
    free = device_memory(device).free
    return (
        rows_that_fit(architecture(model), dtype, free, default),
        f"larger ones do not fit in the {size_in_words(free or 0)} that are free",
    )


def warn_of_slow_cpu(config: Config, device: torch.device, inputs: Inputs) -> None:
    """Say how long a CPU will take with a large model, and which model it would be quick with.

    Nothing is counted yet, so residues are taken to be as many as bytes of the inputs.
    """
    arch = architecture(config.model)
    if device.type == "cuda" or arch.embed_dim <= SMALL_WIDTH:
        return
    tokens = sum(
        file.num_bytes * (PACKED_RATIO if file.path.suffix in PACKED else 1) for file in inputs.files
    )
    small = architecture(model_config(SMALL_MODEL))
    speeds = [num_cores() * CPU_FLOPS / flops_of(which, which.num_layers, 1, 0) for which in (arch, small)]
    log.warning(
        "%s on a CPU of %d cores takes about %s for this input, at about %s tokens a second (from %s): "
        "model=%s would take about %s, and a GPU less",
        config.model.name,
        num_cores(),
        duration(tokens / speeds[0]),
        f"{speeds[0]:.2g}",
        SOURCE,
        SMALL_MODEL,
        duration(tokens / speeds[1]),
    )


def agree_on_settings(settings: dict[str, Any], world: World) -> None:
    """Go on only if all ranks would compute the same numbers: hosts may differ in weights and devices.

    Raises
    ------
    RefusedError
        On every rank, with what differs.
    """
    answers = world.exchange_by_name(json.dumps(settings))
    (main, of_main), *others = ((name, json.loads(text)) for name, text in answers)
    for name, of_other in others:
        odd = [
            f"{key} is {of_main.get(key)} for {main} and {of_other.get(key)} for {name}"
            for key in {**of_main, **of_other}
            if of_main.get(key) != of_other.get(key)
        ]
        if odd:
            remedy = "give all hosts the same weights and devices, or settings that suit all of them"
            raise RefusedError([f"the ranks would not compute the same numbers: {'; '.join(odd)}: {remedy}"])


def find_weights(config: Config, world: World, is_dry: bool = False) -> WeightsId:
    """Find the weights and check that they are the model's; `model=auto` becomes the model that they are.

    The first rank of each host fetches them and checks their bytes. If nothing is to be written, it only
    looks: then weights that would be downloaded have no fingerprint.

    Raises
    ------
    RefusedError
        On every rank, if the weights cannot be had on one, or are not those of the model.
    """
    if is_dry:
        what = world.all_or_none(first_on_host, world, probe_downloads, config.model)
        on_hosts = [text for text in world.exchange(what or "") if text]
        if on_hosts:
            return WeightsId("", f"{NOT_HERE}: {on_hosts[0]}")
    else:
        world.all_or_none(first_on_host, world, fetch, config.model)
    world.all_or_none(complete, config.model)
    world.all_or_none(check_layers, config)
    checked = world.all_or_none(first_on_host, world, check_weights, config.model, is_kept=not is_dry)
    answers = [json.loads(text) for text in world.exchange(json.dumps((world.host, checked)))]
    return WeightsId(*next(answer for host, answer in answers if answer and host == world.host))


def probe_downloads(config: ModelConfig) -> str:
    """Say what a run would download first; "" if all is there.

    Raises
    ------
    ValueError
        If it cannot be had, or has to be there before anything is known of the model.
    """
    downloads = missing(config)
    for download in downloads:
        download.probe()
    if downloads and config.name == AUTO:
        raise ValueError(
            f"model=auto takes the size from the weights, and {downloads[0].what} is not here yet: "
            "download it first, or name the model"
        )
    return ", ".join(download.what for download in downloads)


def first_on_host(world: World, step: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T | None:
    """Take a step that is for a whole host on the first of its ranks alone."""
    return step(*args, **kwargs) if world.local_rank == 0 else None


def numbers_of(config: Config, dtype: torch.dtype, weights: str) -> dict[str, Any]:
    """Return what every output says of its numbers."""
    return {
        "model": config.model.name,
        "weights": weights,
        "layers": config.resolved_layers(),
        "dtype": str(dtype).removeprefix("torch."),
        **({"fp8": config.fp8.name} if config.dtype is Dtype.fp8 else {}),
        "save_dtype": config.save_dtype.name,
        "truncation_seq_length": config.truncation_seq_length,
        "long": config.long.name,
        "numerics": NUMERICS,
    }


def settings_of(
    config: Config, device: torch.device, kernels: Kernels, numbers: dict[str, Any]
) -> dict[str, Any]:
    """Return all that decides the content of an output; a resume refuses to mix two of these."""
    values = plain_values(config)
    settings = {**numbers, **{key: values[key] for key in KEYS_OF_CONTENT}}
    if device.type == "cuda":  # the rows of a pack choose the matrix kernels, and these the bits
        settings["toks_per_batch"] = config.toks_per_batch or default_toks_per_batch(
            "cuda", config.model.embed_dim
        )
    return {
        **settings,
        "device": device.type,
        "attention": kernels.attention,
        "linear": kernels.linear.name,
    }


def load_engine(config: Config, setup: Setup, world: World) -> Engine:
    """Load the model onto this rank's device and ready its kernels."""
    began = time.monotonic()
    world.progress.enter(Phase.loading)
    if setup.kernels.quantized:  # weights are rounded with them
        setup.wait_for_kernels()
    num_threads = max(1, num_cores() // world.local_world_size)
    engine = build_engine(
        config, setup.device, setup.dtype, setup.kernels, num_threads, setup.provenance["weights"]
    )
    loaded = time.monotonic()
    if world.is_main:
        log.info("weights: %s", setup.provenance["weights_in_words"])
    world.progress.enter(Phase.compiling)
    wanted = engine.toks_per_batch
    setup.wait_for_kernels()
    engine.warm_up()
    if engine.toks_per_batch < wanted:
        log.warning(
            "a pack of %d tokens does not fit in the memory of %s: packs of %d instead; "
            "toks_per_batch=%d makes that the setting",
            wanted,
            describe(setup.device),
            engine.toks_per_batch,
            engine.toks_per_batch,
        )
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
    """Name a device in words."""
    return f"{device} {torch.cuda.get_device_name(device)}" if device.type == "cuda" else "cpu"
