"""Models of Hugging Face's hub by their ids: in its local cache, or downloaded by huggingface_hub.

The cache's layout is ``models--OWNER--NAME/refs/REVISION``, which holds a commit, and ``snapshots/COMMIT/``
with the files. It is read without the package, since compute nodes of clusters seldom have it, and never have
internet.
"""

from __future__ import annotations

import os
import re
from importlib.util import find_spec
from pathlib import Path

from dist_esm.attempt import as_value
from dist_esm.model.kernels.kernel_cache import user_cache

ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*(@[\w./-]+)?")
SUFFIXES = (".pt", ".pth", ".ckpt", ".bin", ".safetensors", ".json")
"""Of files: a name that ends so is a path that does not exist, and no id."""
PATTERNS = (
    ["config.json", "vocab.txt", "model*.safetensors", "model.safetensors.index.json"],
    ["config.json", "vocab.txt", "pytorch_model*.bin", "pytorch_model.bin.index.json"],
)
ADAPTER_PATTERNS = ["adapter_config.json", "adapter_model.*"]


def is_id(text: str) -> bool:
    """Tell whether a value can be the id of a model on the hub: ``OWNER/NAME`` or ``OWNER/NAME@REVISION``."""
    return ID.fullmatch(text) is not None and not text.endswith(SUFFIXES)


def cache_dir() -> Path:
    """Return the hub's cache, as the package huggingface_hub finds it.

    Raises
    ------
    ValueError
        If nothing names it, and this user has no home.
    """
    named = os.environ.get("HF_HUB_CACHE") or os.environ.get("HUGGINGFACE_HUB_CACHE")
    if named:
        return Path(named).expanduser()
    home = os.environ.get("HF_HOME")
    if home:
        return Path(home).expanduser() / "hub"
    return user_cache() / "huggingface" / "hub"


def is_offline() -> bool:
    """Tell whether the user forbids downloads from the hub."""
    return any(
        os.environ.get(key, "").upper() in ("1", "ON", "YES", "TRUE")
        for key in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE")
    )


def snapshot(model_id: str) -> Path | None:
    """Return the directory of a model in the cache; None if it is not there.

    Without a revision that is the one that ``main`` names, or the only one there is.
    """
    name, _, revision = model_id.partition("@")
    folder = cache_dir() / f"models--{name.replace('/', '--')}"
    ref = folder / "refs" / (revision or "main")
    commit = ref.read_text(encoding="utf-8").strip() if ref.is_file() else revision
    if commit and Path(commit).name == commit:
        chosen = folder / "snapshots" / commit
        return chosen if chosen.is_dir() else None
    if commit or not (folder / "snapshots").is_dir():
        return None
    commits = list((folder / "snapshots").iterdir())
    return commits[0] if len(commits) == 1 else None


def in_words(model_id: str) -> str:
    """Say that a model is not at hand."""
    return f"{model_id} is neither a file or directory nor in the Hugging Face cache {cache_dir()}"


def refuse_download(model_id: str) -> None:
    """Refuse to download a model if the user forbids it or the package huggingface_hub is not installed.

    Raises
    ------
    ValueError
        With the cache and the remedy.
    """
    name = model_id.partition("@")[0]
    if is_offline():
        raise ValueError(
            f"{in_words(model_id)}, and HF_HUB_OFFLINE forbids to download it: "
            f"put it there (hf download {name}), or name a path"
        )
    if find_spec("huggingface_hub") is None:
        raise ValueError(
            f"{in_words(model_id)}: download it (pip install huggingface_hub, then hf download {name}), "
            "or name a path"
        )


def download(model_id: str, is_adapter: bool = False) -> None:
    """Download a model into the cache, if the package huggingface_hub is installed and the user lets it.

    Raises
    ------
    ValueError
        If it cannot be had; the message names the cache and the remedy.
    """
    refuse_download(model_id)
    name, _, revision = model_id.partition("@")
    from huggingface_hub import snapshot_download

    for patterns in (ADAPTER_PATTERNS,) if is_adapter else PATTERNS:
        # Its errors have no common class but `Exception`: those of the network are another package's.
        folder = as_value(
            snapshot_download,
            name,
            revision=revision or None,
            allow_patterns=patterns,
            cache_dir=str(cache_dir()),
        )
        if isinstance(folder, Exception):
            reason = next(iter(str(folder).strip().splitlines()), type(folder).__name__)
            raise ValueError(
                f"{in_words(model_id)}, and it cannot be downloaded ({reason}): put it there, or name a path"
            )
        if any(file.suffix in (".safetensors", ".bin") for file in Path(folder).iterdir()):
            return
    raise ValueError(f"{name} on the Hugging Face hub has no weights of PyTorch: name another model")
