"""The door to Hydra: composing the configuration, and explaining what is wrong with it."""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dist_esm.config import Config, conf_dir, plain_values

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


def compose_config(
    overrides: Sequence[str], config_dir: str | None = None, config_name: str = "config"
) -> Config:
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
        raise ValueError(
            f"--config-dir {config_dir} is not a directory: name the one that holds {config_name}.yaml"
        )
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


def config_text(config: Config) -> str:
    """Return the configuration as a YAML file that `--config-name` reads; `${` in a name stays a name."""
    text = json.dumps(plain_values(config)).replace("${", "\\\\${")
    return OmegaConf.to_yaml(OmegaConf.create(json.loads(text)))


def explain(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's message in one line that names key, value and remedy."""
    noise = (
        "full_key:",
        "object_type=",
        "reference_type=",
        "To append",
        "Set the environment",
        "Config search path",
        "provider=",
        "See https",
    )
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
            return f"{key!r} is no key" + (
                f": did you mean {near[0]}?" if near else ": see --help for the keys"
            )
    if isinstance(error, OverrideParseException):
        return f"{error.override}: {text}: quote values that have special characters, for example 'input=\"a (1).fasta\"'"
    return text


def leaf_keys(node: Any, prefix: str = "") -> Iterator[str]:
    """Dotted names of all keys of a nested dict, groups included."""
    for key, value in node.items():
        yield prefix + key
        if isinstance(value, dict):
            yield from leaf_keys(value, f"{prefix}{key}.")
