"""Hydra in, typed config out, exit code back.

Hydra composes the configuration; its application wrapper is not used, because every rank would print its errors and its help, and
leave a folder and a log behind. Each rank composes for itself; what is wrong is said once, by rank 0.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dist_esm.config import Config, check

HELP = """\
usage: torchrun --nproc_per_node=N -m dist_esm input=PATH [key=value ...]
       python -m dist_esm input=PATH [key=value ...]

Embed proteins with ESM-2 on every GPU torchrun starts a rank for, or on one device without torchrun.

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
                text = OmegaConf.to_yaml(OmegaConf.structured(config))
            check(config)
    except (argparse.ArgumentError, ValueError) as error:
        problem = " ".join(str(error).split())
    if problem is None and text is not None:
        from dist_esm.world import is_main_rank

        if is_main_rank():
            print(text, end="")
        return 0
    return start(config, problem)


def start(config: Config | None, problem: str | None) -> int:
    """Join the other ranks and run, or refuse with all problems of all ranks, said once."""
    from dist_esm.run import run
    from dist_esm.world import Refused, World, setup_logging

    with World.connect() as world:
        setup_logging(world.rank)
        try:
            world.agree(problem)
            assert config is not None
            return run(config, world)
        except Refused as refused:
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
    searchpath = [f"hydra.searchpath=[file://{Path(config_dir).resolve()}]"] if config_dir else []
    try:
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            composed = compose(config_name, overrides=[*overrides, *searchpath])
        missing = OmegaConf.missing_keys(composed)
        if missing:
            raise ValueError(f"{sorted(missing)[0]} is required: for example input=proteins/")
        config = OmegaConf.to_object(composed)
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(explain(error)) from None
    assert isinstance(config, Config)
    return config


def explain(error: Exception) -> str:
    """Hydra's message in one line that names key, value and remedy."""
    seen, messages = {id(error)}, [str(error)]
    cause = error.__cause__
    while cause is not None and id(cause) not in seen:
        seen.add(id(cause))
        messages.append(str(cause))
        cause = cause.__cause__
    lines = [line.strip() for message in messages for line in message.splitlines()]
    kept = [line for line in lines if line and not line.startswith(("full_key:", "object_type=", "To append", "Set the environment", "reference_type="))]
    return " ".join(dict.fromkeys(kept))


if __name__ == "__main__":
    sys.exit(main())
