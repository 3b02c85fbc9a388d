"""Docs that stay true: keys and defaults, links, files in commands, length of the README and of lines."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from dataclasses import fields, is_dataclass, replace
from enum import Enum
from pathlib import Path
from types import ModuleType
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch
import yaml

from dist_esm.config import Config
from dist_esm.outputs.embeddings import ChunkedTensor
from dist_esm.outputs.formats.registry import FORMATS, OutputFormat
from dist_esm.outputs.load import load
from dist_esm.version import __version__
from helpers.outputs import table_of, write_table

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").glob("*.md"))
LINKED = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *DOCS]
NARROW = [*LINKED, ROOT / "LOG.md", ROOT / "CHANGELOG.md"]
MAX_WORDS = 1400
MAX_COLUMNS = 110
KEY_ROW = re.compile(r"^\| `([a-z0-9_.]+)` \| (`[^`]*`|required|of the model) \| (.*) \|$")
FENCE = re.compile(r"^```.*?^```$", re.MULTILINE | re.DOTALL)
CODE_SPAN = re.compile(r"`[^`\n]*`")
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
OUR_FILE = re.compile(r"(?<![\w/.-])((?:\.ci|scripts|tests|conf|docs|dist_esm)/[\w./-]*\w)")


def relative(path: Path) -> str:
    """Name a test's case by its path in the repository."""
    return str(path.relative_to(ROOT))


def read_yaml(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(content, dict)
    return content


def flatten(node: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in node.items():
        if isinstance(value, dict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def configured_defaults() -> dict[str, Any]:
    """Every key of the command line with its default in `conf/`; a set where models differ."""
    content = read_yaml(ROOT / "conf" / "config.yaml")
    (model,) = (entry["model"] for entry in content.pop("defaults") if "model" in entry)
    defaults = {"model": model, **dict(flatten(content))}
    models = [read_yaml(path) for path in sorted((ROOT / "conf" / "model").glob("*.yaml"))]
    assert len(models) > 1
    for key in models[0]:
        values = {values[key] for values in models}
        defaults[f"model.{key}"] = values.pop() if len(values) == 1 else values
    return defaults


def documented() -> dict[str, tuple[str, str]]:
    """Key to default and meaning, from the tables of keys in the reference; a key stands there once."""
    text = (ROOT / "docs" / "reference.md").read_text(encoding="utf-8")
    keys = re.split(r"^## ", text, flags=re.MULTILINE)
    (section,) = (part for part in keys if part.startswith("Keys\n"))
    rows = [line for line in section.splitlines() if line.startswith("| `")]
    matches = [KEY_ROW.match(row) for row in rows]
    assert all(matches), [row for row, match in zip(rows, matches, strict=True) if match is None]
    table = {match[1]: (match[2], match[3]) for match in matches if match}
    assert len(table) == len(rows)
    return table


def choices(schema: Any, prefix: str = "") -> Iterator[tuple[str, list[str]]]:
    """Keys whose value is one of several names, or a list of them, with the names."""
    hints = get_type_hints(schema)
    for field in fields(schema):
        kinds = [hints[field.name], *getattr(hints[field.name], "__args__", ())]
        for kind in kinds:
            if is_dataclass(kind):
                yield from choices(kind, f"{prefix}{field.name}.")
            elif isinstance(kind, type) and issubclass(kind, Enum):
                yield prefix + field.name, [member.name for member in kind]


def test_the_reference_has_every_key_with_its_default_and_no_other():
    table = documented()
    expected = {}
    for key, default in configured_defaults().items():
        if default == "???":
            expected[key] = "required"
        elif isinstance(default, set):
            expected[key] = "of the model"
        elif isinstance(default, list):
            expected[key] = f"`[{', '.join(map(str, default))}]`"
        else:
            text = {None: "null", True: "true", False: "false"}
            expected[key] = f"`{text[default] if default is None or isinstance(default, bool) else default}`"
    assert {key: default for key, (default, _) in table.items()} == expected


def test_the_readme_has_the_defaults_of_the_reference():
    rows = map(KEY_ROW.match, (ROOT / "README.md").read_text(encoding="utf-8").splitlines())
    table = {match[1]: match[2] for match in rows if match}
    assert len(table) >= 10
    reference = documented()
    assert table == {key: reference[key][0] for key in table}


def test_the_reference_names_every_choice_of_a_key():
    table, keys = documented(), dict(choices(Config))
    assert {"include", "device", "residues.unknown"} <= set(keys)
    absent = [
        f"{key}={name}" for key, names in keys.items() for name in names if f"`{name}`" not in table[key][1]
    ]
    assert absent == []
    models = {path.stem for path in (ROOT / "conf" / "model").glob("*.yaml")}
    assert models == set(re.findall(r"`(\w+)`", table["model"][1]))


def anchors(path: Path) -> set[str]:
    """Names under which the headings of a page can be linked to, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKED, ids=relative)
def test_every_link_resolves(page):
    text = CODE_SPAN.sub("", FENCE.sub("", page.read_text(encoding="utf-8")))
    links = [link for link in LINK.findall(text) if not re.match(r"[a-z]+:", link)]
    broken = []
    for link in links:
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert broken == []


def test_pages_of_docs_are_linked_from_the_readme():
    links = LINK.findall((ROOT / "README.md").read_text(encoding="utf-8"))
    assert {f"docs/{page.name}" for page in DOCS} <= {link.partition("#")[0] for link in links}


@pytest.mark.parametrize("page", LINKED, ids=relative)
def test_files_that_are_named_exist(page):
    text = page.read_text(encoding="utf-8")
    absent = [name for name in OUR_FILE.findall(text) if not (ROOT / name).exists()]
    assert absent == []


def test_commands_of_the_readme_run_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    commands = [line.strip() for line in text.splitlines() if line.startswith("    ")]
    scripts = [command.split()[0] for command in commands if command.startswith("scripts/")]
    assert "scripts/demo" in scripts
    assert [script for script in scripts if not (ROOT / script).is_file()] == []
    modules = {word for command in commands for word in re.findall(r"-m (\w+)", command)}
    assert modules == {"dist_esm"}


def table_after(heading: str, page: Path) -> list[list[str]]:
    """Cells of the first table of a section, without its heading."""
    section = page.read_text(encoding="utf-8").split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = [line.strip("|").split(" | ") for line in section.splitlines() if line.startswith("|")]
    assert len(rows) > 2
    return rows[2:]


def test_the_table_of_rooms_has_every_module():
    package = ROOT / "dist_esm"
    rooms = {}
    for room, modules in table_after("The rooms", ROOT / "docs" / "architecture.md"):
        words = re.findall(r"`([\w/]+)`", re.sub(r"\([^)]*\)", "", modules))
        rooms[room.strip().strip("`").rstrip("/")] = {word.rstrip("/") for word in words}
    for folder in sorted(path for path in package.iterdir() if (path / "__init__.py").exists()):
        there = {
            path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()
        }
        assert rooms[folder.name] == there - {"__init__"}, folder.name
    top = {path.stem for path in package.glob("*.py")} - {"__init__"}
    assert rooms["ground floor"] | rooms["top"] == top


def is_defined(name: str, source: str) -> bool:
    return bool(re.search(rf"^\s*((def|class) {name}\b|{name}(: [^=]+)? = )", source, re.MULTILINE))


@pytest.mark.parametrize(
    ("change", "place"), table_after("Where do I change ...?", ROOT / "docs" / "architecture.md")
)
def test_what_is_to_be_changed_stands_where_the_table_says(change, place):
    names = re.findall(r"`([^`]+)`", place)
    files = [
        next((base / name for base in (ROOT / "dist_esm", ROOT) if (base / name).exists()), None)
        for name in names
    ]
    text = "".join(file.read_text(encoding="utf-8") for file in files if file is not None and file.is_file())
    unknown = [
        name
        for name, file in zip(names, files, strict=True)
        if file is None and not all(is_defined(word, text) for word in name.split("."))
    ]
    assert any(files) or "](" in place
    assert unknown == [], f"{change}: {unknown} is in none of the files that are named"


def test_the_readme_is_read_in_five_minutes():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").split()) < MAX_WORDS


@pytest.mark.parametrize("page", NARROW, ids=relative)
def test_lines_are_narrow(page):
    lines = page.read_text(encoding="utf-8").splitlines()
    wide = [
        f"{number}: {len(line)} columns"
        for number, line in enumerate(lines, start=1)
        if len(line) > MAX_COLUMNS and not line.startswith("|") and not re.search(r"https?://\S{60}", line)
    ]
    assert wide == []


def test_the_example_of_a_format_writes_what_it_reads(tmp_path, monkeypatch):
    page = (ROOT / "docs" / "adding-a-format.md").read_text(encoding="utf-8")
    code, line = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    module = ModuleType("dist_esm.outputs.formats.npz")
    exec(compile(code, "adding-a-format.md", "exec"), module.__dict__)
    output_format = eval(line, {"OutputFormat": OutputFormat})
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setitem(FORMATS, output_format.name, output_format)

    table = table_of(["MKT", "GAVLI", "MKT"], ids=["a", "b", "a"])
    mean = table.mean[table.main_layer]
    rows = torch.arange(11.0 * mean.shape[1]).reshape(11, -1)
    chunks = ChunkedTensor([rows[:3], rows[3:]])
    table = replace(table, bos={5: mean + 0.5}, per_tok={5: chunks, table.main_layer: chunks})
    path = write_table(Enum("Format", ["npz"]).npz, table, tmp_path / "a_ESM")
    assert path == tmp_path / "a_ESM.npz"
    embeddings = load(path)
    assert (embeddings.ids, embeddings.lengths) == (["a", "b", "a"], [3, 5, 3])
    assert np.array_equal(embeddings.vectors, mean.numpy())
    assert np.array_equal(embeddings["b"], mean[1].numpy())
    assert np.array_equal(embeddings.vectors_of("bos", 5), mean.numpy() + 0.5)
    assert np.array_equal(embeddings.residues("b"), rows[3:8].numpy())
    assert np.array_equal(embeddings.residues(2, layer=5), rows[8:].numpy())


def test_the_version_to_cite_is_the_packages():
    assert read_yaml(ROOT / "CITATION.cff")["version"] == __version__
