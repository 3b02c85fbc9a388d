"""Where the weights of a configuration are: a path, a model in the hub's cache, or fair-esm's own file,
fetched once."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import torch

from dist_esm.atomic import atomically
from dist_esm.attempt import as_value
from dist_esm.config import ModelConfig
from dist_esm.model.checkpoints import hub
from dist_esm.model.checkpoints.checkpoint import WHOLE
from dist_esm.model.kernels.kernel_cache import cache_dir, refuse_if_not_ours

log = logging.getLogger("dist_esm")

URL = "https://dl.fbaipublicfiles.com/fair-esm/models/{name}.pt"
PROBE_SECONDS = 10.0
RANDOM = "random"
AUTO = "auto"
OFFICIAL = {
    "esm2_t6_8M_UR50D": (30_099_493, "46f002a9870c9bdecd0ea887acb1f9a38a6b561e8f8bf8a6990b679b9d31b928"),
    "esm2_t12_35M_UR50D": (134_095_705, "7f21e80e61d16a71735163ef555d3009afb0c98da74c48e29df08606973cc55e"),
    "esm2_t30_150M_UR50D": (592_774_773, "881c7176cf198ef8dec26a3c375d40eb58d0c33df95c22562ca6cc6d3f812c62"),
    "esm2_t33_650M_UR50D": (
        2_604_537_549,
        "ea9d0522b335a8778dea6535a65301f10208dece28cd5865482b0b1fc446168c",
    ),
    "esm2_t36_3B_UR50D": (5_678_116_398, "7de8b4082ba15891959ab368b77ce3886697af1efb16d3c9e9e7b0c5d3f07500"),
}
"""Bytes and sha256 of the files that fair-esm serves; that of 15B is not known here."""


def locate(config: ModelConfig) -> Path | None:
    """Return where the checkpoint is or will be; None for random weights.

    That is the path given, the model of that id in the hub's cache, or fair-esm's own place in torch hub's
    cache.
    """
    if config.weights == RANDOM:
        return None
    if config.weights is not None:
        return resolve(config.weights)
    return Path(torch.hub.get_dir()) / "checkpoints" / f"{config.name}.pt"


def locate_adapter(config: ModelConfig) -> Path | None:
    """Return where the adapter is or will be; None without one."""
    return None if config.adapter is None else resolve(config.adapter)


def resolve(text: str) -> Path:
    """Return the path that a value means: the path itself, or the place of that id in the hub's cache."""
    path = Path(text).expanduser()
    if path.exists() or not hub.is_id(text):
        return path
    return hub.snapshot(text) or path


def fetch(config: ModelConfig) -> None:
    """Make sure that weights and adapter are there, downloading what the configuration lets it.

    Raises
    ------
    ValueError
        If a path that was given does not exist, or if the download fails.
    """
    for download in missing(config):
        download.start()


@dataclass(frozen=True)
class Download:
    """Something that is not on this machine yet, and can be had."""

    what: str
    """What it is and where it comes from, in words."""
    start: Callable[[], None]
    """Downloads it; raises ValueError if that fails."""
    probe: Callable[[], None]
    """Raises ValueError if it cannot be downloaded, as far as that is known without downloading it."""


def missing(config: ModelConfig) -> list[Download]:
    """Return what `fetch` would download. Nothing is downloaded or written.

    Raises
    ------
    ValueError
        If a path that was given does not exist, or the configuration names no weights.
    """
    downloads: list[Download | None] = []
    if config.weights == RANDOM and config.adapter is not None:
        raise ValueError(
            "model.adapter needs the weights that it was trained on, not random ones: set model.weights"
        )
    if config.name == AUTO and config.weights in (None, RANDOM):
        raise ValueError(
            "model=auto takes the size from the weights: set model.weights=PATH, "
            "or name one of the six models"
        )
    if config.adapter is not None:
        remedy = "name a directory that peft wrote"
        downloads.append(missing_given("model.adapter", config.adapter, remedy, is_adapter=True))
    if config.weights is not None and config.weights != RANDOM:
        remedy = "name fair-esm's .pt or a Hugging Face directory, or use null (download) or random"
        downloads.append(missing_given("model.weights", config.weights, remedy))
    elif config.weights is None:
        downloads.append(missing_official(config))
    return [download for download in downloads if download is not None]


def missing_given(key: str, text: str, remedy: str, is_adapter: bool = False) -> Download | None:
    """Return the download of the model of an id that is not in the hub's cache; None for what is there.

    Raises
    ------
    ValueError
        If it is a path that does not exist.
    """
    path = resolve(text)
    if not hub.is_id(text) or Path(text).expanduser().exists():
        if not path.exists():
            raise ValueError(f"{key}={text} is not a file or directory: {remedy}")
        return None
    names = ("adapter_config.json",) if is_adapter else WHOLE
    if any((path / name).is_file() for name in names):
        return None
    return Download(
        f"{text} from the Hugging Face hub",
        lambda: hub.download(text, is_adapter),
        lambda: hub.refuse_download(text),
    )


def missing_official(config: ModelConfig) -> Download | None:
    """Return the download of fair-esm's own file into torch hub's cache; None if it is there."""
    path = locate(config)
    assert path is not None
    if path.is_file():
        return None
    url = URL.format(name=config.name)

    def start() -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), progress=False)

    def probe() -> None:
        urlopen(Request(url, method="HEAD"), timeout=PROBE_SECONDS).close()

    def or_refuse(step: Callable[[], None]) -> None:
        try:
            step()
        except (URLError, OSError) as error:
            reason = getattr(error, "reason", error)
            remedy = "put the file there, or name it with model.weights=PATH"
            raise ValueError(
                f"{path} is missing and {url} cannot be downloaded ({reason}): {remedy}"
            ) from None

    num_bytes, _ = OFFICIAL.get(config.name, (0, ""))
    size = f", {num_bytes / 1e9:.2f} GB" if num_bytes else ""
    return Download(f"{url}{size}, to {path}", partial(or_refuse, start), partial(or_refuse, probe))


def is_official(path: Path, name: str, fingerprint: str, is_kept: bool = True) -> bool:
    """Tell whether a file is fair-esm's own of that name, by its sha256.

    That is computed once for a machine: the fingerprint, whose checksums were compared with the bytes,
    recalls it. What is not to be kept is computed again by the next launch.
    """
    num_bytes, sha256 = OFFICIAL.get(name, (0, ""))
    if path.stat().st_size != num_bytes:
        return False
    content = as_value(recall, fingerprint)
    if not isinstance(content, dict):
        log.info("taking the sha256 of %s%s", path, ", once for this machine" if is_kept else "")
        with path.open("rb") as file:
            content = {"sha256": hashlib.file_digest(file, "sha256").hexdigest()}
        if is_kept:  # a cache that cannot be written costs the same seconds next time
            as_value(keep, fingerprint, content)
    return content.get("sha256") == sha256


def kept_path(fingerprint: str) -> Path:
    """Return where it is kept what a file of this fingerprint is."""
    return cache_dir() / "checkpoints" / f"{fingerprint}.json"


def recall(fingerprint: str) -> Any:
    """Read what `keep` wrote.

    Raises
    ------
    OSError
        If it is not there, or others can write to it.
    ValueError
        If it is no JSON, or this user has no place for it.
    """
    path = kept_path(fingerprint)
    refuse_if_not_ours(path)
    return json.loads(path.read_text(encoding="utf-8"))


def keep(fingerprint: str, content: dict[str, str]) -> None:
    """Write a small JSON file, for this user alone."""
    with atomically(kept_path(fingerprint)) as beside:
        beside.write_text(json.dumps(content), encoding="utf-8")
        beside.chmod(0o600)
