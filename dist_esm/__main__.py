"""Hydra in, typed config out, exit code back.

Hydra composes the configuration; its application wrapper is not used, because every rank would print its errors and its help, and
leave a folder and a log behind. Each rank composes for itself; what is wrong is said once, by rank 0.
"""

from __future__ import annotations

import argparse
import difflib
import gc
import io
import os
import sys
import threading
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dist_esm.config import Config, Job, check, to_dict
from dist_esm.stop import on_signals

HELP = """\
usage: torchrun --nproc_per_node=N -m dist_esm input=PATH [key=value ...]
       python -m dist_esm input=PATH [key=value ...]

Embed proteins with ESM-2 on every GPU torchrun starts a rank for, or on one device without torchrun.

jobs:
  job=embed      the default: embed the input into output_dir, or go on from what earlier launches finished
  job=selfcheck  compare the numbers of these settings, weights and GPUs with fair-esm's own fp32 model, on a sample of the input
  job=verify     check a finished output_dir against the input

options:
  -h, --help     this text
  --version      the version
  --cfg          print the configuration that would run, and stop
  --config-dir DIR --config-name NAME
                 start from NAME.yaml in DIR instead of the defaults

keys and defaults:
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit code."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--version", action="store_true")
    parser.add_argument("--cfg", action="store_true")
    parser.add_argument("--config-dir")
    parser.add_argument("--config-name", default="config")
    parser.add_argument("overrides", nargs="*")
    config: Config | None = None
    problem: str | None = None
    text: str | None = None
    try:
        options, unknown = parser.parse_known_args(argv)
        if unknown:
            raise ValueError(f"{unknown[0]} is no option: write keys as key=value, and see --help")
        if options.help:
            text = HELP + "".join(f"  {line}\n" for line in (conf_dir() / "config.yaml").read_text().splitlines() if not line.startswith("#"))
        elif options.version:
            text = f"dist_esm {version('dist_esm')}\n"
        else:
            config = compose_config(options.overrides, options.config_dir, options.config_name)
            if options.cfg:
                text = OmegaConf.to_yaml(OmegaConf.create(to_dict(config)))
            check(config)
    except (argparse.ArgumentError, ValueError) as error:
        problem = " ".join(str(error).split())
    if problem is None and text is not None:
        if is_main_rank():
            print(text, end="")
        return 0
    try:
        with on_signals(give_up):
            return start(config, problem)
    except KeyboardInterrupt as interrupt:
        if is_main_rank():
            print(f"dist_esm: {interrupt}: what is done is kept, run the same command again to go on from there", file=sys.stderr, flush=True)
        return 1


def is_main_rank() -> bool:
    """Whether this process speaks for the run, as torchrun's environment has it, before any connection."""
    return os.environ.get("RANK", "0") == "0"


def give_up(reason: str) -> None:
    """Leave whatever is under way."""
    raise KeyboardInterrupt(reason)


def start(config: Config | None, problem: str | None) -> int:
    """Join the other ranks and run, or refuse with all problems of all ranks, said once."""
    gc.disable()  # imports make a million objects and no garbage
    from dist_esm.distributed import RefusedError, World, setup_logging
    from dist_esm.jobs.embed import run
    from dist_esm.jobs.selfcheck.job import selfcheck
    from dist_esm.jobs.verify import verify

    gc.enable()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # a path may be any bytes
    with World.connect() as world:
        setup_logging(world.rank)
        try:
            world.agree(problem)
            assert config is not None
            return {Job.embed: run, Job.selfcheck: selfcheck, Job.verify: verify}[config.job](config, world)
        except RefusedError as refused:
            if world.is_main:
                for line in refused.problems:
                    print(f"dist_esm: error: {line}", file=sys.stderr, flush=True)
            return 1


def conf_dir() -> Path:
    """The folder of configuration files: inside an installed package, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    return next(path for path in (here / "conf", here.parent / "conf") if path.is_dir())


def compose_config(overrides: Sequence[str], config_dir: str | None = None, config_name: str = "config") -> Config:
    """Compose the configuration and turn it into typed objects.

    Raises
    ------
    ValueError
        One line that names the key or value that is wrong.
    """
    for override in overrides:
        if "=" not in override:
            raise ValueError(f"{override!r} is not key=value: for example input=proteins/")
    store = ConfigStore.instance()
    store.store(name="schema", node=Config)
    searchpath = [f"hydra.searchpath=['file://{conf_dir()}']"] if config_dir else []
    if config_dir and not Path(config_dir).is_dir():
        raise ValueError(f"--config-dir {config_dir} is not a directory: name the one that holds {config_name}.yaml")
    try:
        with initialize_config_dir(str(Path(config_dir or conf_dir()).resolve()), version_base="1.3"):
            composed = compose(config_name, overrides=[*overrides, *searchpath])
        missing = OmegaConf.missing_keys(composed)
        if missing:
            raise ValueError(f"{sorted(missing)[0]} is required: for example input=proteins/")
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error, overrides)) from None
    assert isinstance(config, Config)
    return config


def explain(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's message in one line that names key, value and remedy."""
    noise = ("full_key:", "object_type=", "reference_type=", "To append", "Set the environment", "Config search path", "provider=", "See https")
    messages, cause = [], error
    while cause is not None and str(cause) not in messages:
        messages.append(str(cause))
        cause = cause.__cause__  # type: ignore[assignment]
    lines = [line.strip() for message in messages for line in message.splitlines()]
    text = " ".join(dict.fromkeys(line for line in lines if line and not line.startswith(noise)))
    keys = [*leaf_keys(OmegaConf.to_container(OmegaConf.structured(Config)))]
    for override in overrides:
        key = override.partition("=")[0].lstrip("+~")
        if key not in keys and not key.startswith("hydra"):
            near = difflib.get_close_matches(key, keys, n=1)
            return f"{key!r} is no key" + (f": did you mean {near[0]}?" if near else ": see --help for the keys")
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {text}: quote values that have special characters, for example 'input=\"a (1).fasta\"'"
    return text


def leaf_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys of a nested dict, groups included."""
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from leaf_keys(value, f"{prefix}{key}.")


def leave(code: int) -> NoReturn:
    """End the process, without a segment that was abandoned: on a CPU it may take a minute more, and Python would wait for its thread."""
    if any(not thread.daemon for thread in threading.enumerate() if thread is not threading.main_thread()):
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    leave(main())
