"""The schema of the configuration, and the checks that need no file and no device.

Hydra composes ``conf/`` and the command line's ``key=value`` into `Config`, once, at the border. Behind it
only these typed objects are passed on. The names of enum members are the values that the user writes, and
`--help` shows the text under each key.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import MISSING, OmegaConf

from dist_esm.outputs.formats.registry import FORMAT_NAMES, FORMATS, package_of

E = TypeVar("E", bound=Enum)


class Include(Enum):
    """Representations to return for each protein, fair-esm's words."""

    mean = "mean"
    bos = "bos"
    per_tok = "per_tok"


class Dtype(Enum):
    """Precision of parameters and matrix products."""

    auto = "auto"
    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"
    fp8 = "fp8"


class Fp8(Enum):
    """Which matrix products multiply 8-bit numbers under `dtype=fp8`."""

    all = "all"
    ffn = "ffn"


class DeviceKind(Enum):
    """Kinds of device."""

    auto = "auto"
    cuda = "cuda"
    cpu = "cpu"


class Attention(Enum):
    """Implementations of attention, see `attention`."""

    auto = "auto"
    triton = "triton"
    sdpa = "sdpa"


class LinearKind(Enum):
    """Implementations of the rest of a block, see `linear`."""

    auto = "auto"
    quack = "quack"
    triton = "triton"
    cublas = "cublas"
    torch = "torch"


class Format(Enum):
    """File format of the outputs: a member for each line in the registry of formats."""

    vars().update({name: name for name in FORMAT_NAMES})


class Compression(Enum):
    """What the numbers in outputs are compressed with."""

    none = "none"
    zstd = "zstd"


class Writers(Enum):
    """What writes the outputs of a rank."""

    auto = "auto"
    threads = "threads"
    processes = "processes"


class SaveDtype(Enum):
    """Precision of the numbers in outputs."""

    float32 = "float32"
    float16 = "float16"


class AssignBy(Enum):
    """Cost of a unit in the greedy assignment."""

    sequences = "sequences"
    residues = "residues"
    flops = "flops"


class Job(Enum):
    """What a call does."""

    embed = "embed"
    plan = "plan"
    selfcheck = "selfcheck"
    verify = "verify"
    report = "report"


class ReportKind(Enum):
    """What a report is written as."""

    html = "html"
    json = "json"


class Verbosity(Enum):
    """How much is said while a run is under way."""

    quiet = "quiet"
    normal = "normal"
    debug = "debug"


class Long(Enum):
    """Policies for a protein of more than ``truncation_seq_length`` residues."""

    truncate = "truncate"
    skip = "skip"
    fail = "fail"
    window = "window"


class Letter(Enum):
    """Policies for letters that ESM-2 could do without: put right, or treated like any unknown letter."""

    fix = "fix"
    unknown = "unknown"


class Unknown(Enum):
    """Policies for letters outside fair-esm's alphabet: X in their place, record skipped, file failed."""

    replace = "replace"
    skip = "skip"
    fail = "fail"


class SpecialTokens(Enum):
    """Policy for records with a special token such as `<mask>`: skip them, fail the file, or embed masks."""

    skip = "skip"
    fail = "fail"
    mask = "mask"


class Chains(Enum):
    """Policy for records of several chains, separated by `:`, `/` or `|`: skip them, or embed each chain."""

    skip = "skip"
    split = "split"


class ProteinId(Enum):
    """What of a header is the protein's id: its first word, or the accession in that word."""

    word = "word"
    accession = "accession"


class HeaderEncoding(Enum):
    """How headers are read: as UTF-8 and those that are not as Latin-1, or as UTF-8 alone."""

    auto = "auto"
    utf8 = "utf8"


@dataclass
class ModelConfig:
    """One ESM-2; ``conf/model`` has a file for each."""

    name: str = MISSING
    """fair-esm's name, and the name of the checkpoint file without `.pt`."""
    num_layers: int = MISSING
    """As the model's file has it, as the next two."""
    embed_dim: int = MISSING
    attention_heads: int = MISSING
    weights: str | None = None
    """A path; an id in Hugging Face's cache; null: fair-esm's own, fetched once; random: for tests."""
    adapter: str | None = None
    """Directory or id of a LoRA adapter (peft) to merge into the weights; null: none."""
    seed: int = 0
    """Seed of model.weights=random."""


@dataclass
class ResidueConfig:
    """Policies for letters that are not residues as ESM-2 knows them. Every change is counted."""

    lower_case: Letter = Letter.fix
    """fix: soft-masked residues are upper-cased; unknown: they are treated as unknown letters."""
    trailing_stop: Letter = Letter.fix
    """fix: `*` at the end of a sequence (Prodigal) is removed."""
    gaps: Letter = Letter.fix
    """fix: `-` and `.` are removed."""
    blanks: Letter = Letter.fix
    """fix: blanks and tabs inside a sequence are removed, and numbers at the ends of its blocks."""
    unknown: Unknown = Unknown.replace
    """Letters other than ACDEFGHIKLMNPQRSTVWYXBUZO: replace each by X, skip the record, or fail the file."""


@dataclass
class SelfcheckConfig:
    """The sample of `job=selfcheck`, and how far from fair-esm is too far."""

    proteins: int = 200
    """Proteins in the sample: the shortest, the longest, and others spread over the lengths between."""
    max_spread_error: float | None = None
    """Largest |ours - fair-esm's| of a mean, as a share of the spread: of the root mean square of the
    distance of fair-esm's means from the mean of all of them; null: 0.1 in fp8, else 0.03."""
    min_neighbours_kept: float | None = None
    """Least share of the proteins' 10 nearest neighbours, by fair-esm's means, that are so by ours; null:
    0.98 in fp8, else 0.99."""
    max_relative_error: float | None = None
    """Largest |ours - fair-esm's| / |fair-esm's| of a mean; null: 1e-5 in fp32, else no limit."""


@dataclass
class Config:
    """Every key of the command line."""

    input: Any = MISSING
    """A FASTA file, a directory (searched recursively), a glob, or a list of these in brackets."""
    output_dir: Path = Path("embeddings")
    """Where everything is written."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """The ESM-2, by fair-esm's name."""
    repr_layers: list[int] = field(default_factory=lambda: [-1])
    """Layers to return, fair-esm's numbering: 0 is the embedding, negatives count from the end."""
    include: list[Include] = field(default_factory=lambda: [Include.mean])
    """Representations to write for each protein and layer."""
    truncation_seq_length: int | None = 1022
    """Residues that one forward sees of a protein; null: all of them, of at most 1,000,000 letters."""
    long: Long = Long.truncate
    """What becomes of a longer protein: its first residues are embedded (truncate), it is skipped, its file
    fails, or all of it is embedded in overlapping windows, each residue where it is most central (window)."""
    window_overlap: int = 256
    """Residues that neighbouring windows share under long=window."""
    residues: ResidueConfig = field(default_factory=ResidueConfig)
    """Policies for letters that are no residues."""
    special_tokens: SpecialTokens = SpecialTokens.skip
    """Records with a special token such as <mask> are skipped, or fail their file; mask embeds fair-esm's
    mask token as fair-esm does."""
    chains: Chains = Chains.skip
    """Records of several chains (separated by : / or |) are skipped; split makes each chain a protein, named
    by the record's id and the chain's place."""
    id: ProteinId = ProteinId.word
    """The id of a protein: the first word of its header, or the accession in it (P12345 of
    sp|P12345|NAME); a word without one stays."""
    header_encoding: HeaderEncoding = HeaderEncoding.auto
    """A header that is not UTF-8 is read as Latin-1, and listed (auto), or its file fails (utf8)."""
    dedupe: bool = True
    """Embed identical sequences once per rank and give every id its copy."""
    toks_per_batch: int | None = None
    """Tokens in a pack; null: the default for the device."""
    dtype: Dtype = Dtype.auto
    """Precision of parameters and matrix products; auto: bf16 where the GPU has it, fp16 on a V100 or
    T4, else fp32. fp8 is for Hopper GPUs: faster and less exact, see job=selfcheck."""
    fp8: Fp8 = Fp8.all
    """Products of 8-bit numbers under dtype=fp8: all four of a block (all), or the two of its feed-forward
    layers alone (ffn), which is slower and more exact."""
    device: DeviceKind = DeviceKind.auto
    """Where to run; auto: a GPU if there is one."""
    ranks: int | str = "auto"
    """Processes on this host, each with a device of its own; auto: one for each visible GPU, else one. Under
    torchrun it is what torchrun starts."""
    attention: Attention = Attention.auto
    """Implementation of attention; auto: the fastest that the device can run."""
    linear: LinearKind = LinearKind.auto
    """Implementation of matrix products and what is fused to them; auto: the fastest on the device."""
    format: Format = Format[FORMAT_NAMES[0]]
    """File format of the outputs."""
    save_dtype: SaveDtype = SaveDtype.float32
    """Precision of the numbers in outputs."""
    compression: Compression = Compression.none
    """What numbers are compressed with; zstd: for format=parquet alone, 7% smaller and slower."""
    writers: Writers = Writers.auto
    """What writes a rank's outputs: threads of its process, or processes of their own; auto: processes where
    there is a GPU."""
    assign_by: AssignBy = AssignBy.sequences
    """What is balanced over the ranks."""
    unit_share: float = 0.01
    """A plain or block-gzip file of more than this share of all input bytes is cut into units of about that
    size; 1: no file is cut."""
    max_proteins_per_output: int = 100_000
    """A file of more proteins than this is written as numbered parts of at most so many."""
    max_consecutive_failures: int = 3
    """So many files in a row that could be read and failed all the same stop the run: a broken device."""
    steal: bool = True
    """A rank that has finished its bin takes units that others have not begun; false: it waits."""
    heartbeat_timeout: float = 60.0
    """A rank that gives no sign of life for so many seconds counts as lost, and the run ends as aborted."""
    max_restarts: int = 0
    """So often all ranks are started again, and go on, after one of them has crashed."""
    resume: bool = True
    """Skip what earlier launches finished under the same settings; false: remove it and start over."""
    progress_seconds: float = 30.0
    """Seconds between two lines of progress where there is no terminal to show a live view on."""
    verbosity: Verbosity = Verbosity.normal
    """quiet: warnings, errors and how it ended; normal: progress and summary, too; debug: all of every
    rank's log lines."""
    report: ReportKind = ReportKind.html
    """html: report.json and report.html, a page to look at; json: report.json alone."""
    selfcheck: SelfcheckConfig = field(default_factory=SelfcheckConfig)
    """Sample and limits of job=selfcheck."""
    job: Job = Job.embed
    """What to do, see above."""

    def input_list(self) -> list[str]:
        """Return `input` as a list of strings."""
        return list(self.input) if isinstance(self.input, list) else [self.input]

    def resolved_layers(self) -> list[int]:
        """Return `repr_layers` without negatives, in the order given."""
        return [layer + self.model.num_layers + 1 if layer < 0 else layer for layer in self.repr_layers]

    def output_representations(self) -> list[tuple[Include, int]]:
        """Return the representations and layers of an output.

        The mean of the last layer requested is always there.
        """
        layers = self.resolved_layers()
        included = [(include, layer) for include in self.include for layer in layers]
        return list(dict.fromkeys([*included, (Include.mean, layers[-1])]))


def plain_values(config: Config) -> dict[str, Any]:
    """Return the configuration as JSON and YAML can hold it: names of enum members, paths as text.

    OmegaConf's own containers would read `${` in a file's name as a reference to another key.
    """
    values: dict[str, Any] = json.loads(
        json.dumps(
            asdict(config), default=lambda value: value.name if isinstance(value, Enum) else str(value)
        )
    )
    return values


def conf_dir() -> Path:
    """The folder of configuration files: inside an installed package, beside it in a checkout."""
    here = Path(__file__).resolve().parent
    return next(path for path in (here / "conf", here.parent / "conf") if path.is_dir())


def model_config(name: str) -> ModelConfig:
    """Read the configuration of an ESM-2 by fair-esm's name.

    Raises
    ------
    ValueError
        If there is none of that name; the message lists the names that there are.
    """
    names = [path.stem for path in (conf_dir() / "model").glob("*.yaml")]
    if name not in names:
        raise ValueError(unknown_model(name, names))
    values = OmegaConf.load(conf_dir() / "model" / f"{name}.yaml")
    model = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(ModelConfig), values))
    assert isinstance(model, ModelConfig)
    return model


NOT_ESM2 = re.compile(r"esm-?_?(1|c\b|c_|3|-?if|fold|msa)|msa|prot_?t5|prot_?bert|ankh|progen", re.IGNORECASE)
"""Names of protein language models of other families."""


def unknown_model(name: str, names: Sequence[str]) -> str:
    """Say in one line that no model has this name, and which names there are."""
    names = sorted(names, key=by_layers)
    wanted = name.rpartition("/")[2].removesuffix(".pt").removesuffix(".yaml").lower()
    parts = [part for part in re.split(r"[-_]", wanted) if part not in ("", "esm2", "esm")]
    holding = [known for known in names if all(part in known.lower().split("_") for part in parts)]
    near = holding if parts and len(holding) == 1 else difflib.get_close_matches(wanted, names, n=1)
    if NOT_ESM2.search(wanted):
        problem = "is not an ESM-2, and no other model is embedded here"
    else:
        problem = "is no model" + (f": did you mean {near[0]}?" if near else "")
    return f"model={name} {problem}{'' if problem.endswith('?') else ':'} use one of {', '.join(names)}"


def by_layers(name: str) -> tuple[int, str]:
    """Return what sorts models from the smallest to the largest."""
    layers = re.search(r"_t(\d+)_", name)
    return (int(layers[1]) if layers else sys.maxsize), name


def choice(choices: type[E], key: str, value: str) -> E:
    """Return the member of an enum that a key's value names.

    Raises
    ------
    ValueError
        If there is none; the message lists them.
    """
    if value not in choices.__members__:
        raise ValueError(no_choice(choices, key, value))
    return choices[value]


SYNONYMS = (
    ("cuda", "gpu"),
    ("fp32", "float32", "float"),
    ("fp16", "float16", "half"),
    ("bf16", "bfloat16"),
    ("fp8", "float8", "e4m3", "float8_e4m3fn"),
    ("h5", "hdf5"),
    ("pt", "pth", "torch"),
    ("per_tok", "per_token", "per_residue"),
    ("bos", "cls"),
    ("plan", "dry_run", "dry-run", "dryrun", "estimate"),
)
"""Words for the same thing; some are spelled like another choice, as `gpu` like `cpu`."""


def no_choice(choices: type[Enum], key: str, value: str) -> str:
    """Say in one line that a key has no such choice, and which it has."""
    word = str(value).lower().partition(":")[0]  # cuda:0
    names = list(choices.__members__)
    same = [name for words in SYNONYMS if word in words for name in words if name in names]
    near = same or difflib.get_close_matches(word, names, n=1)
    guess = f"did you mean {near[0]}? " if near else ""
    return f"{key}={value} is no choice: {guess}use one of {', '.join(choices.__members__)}"


LEAST_HEARTBEAT = 5.0
"""Seconds; a rank gives a sign of life every two."""
LEAST_PROGRESS = 0.5
LEAST = {
    "max_restarts": 0,
    "truncation_seq_length": 1,
    "toks_per_batch": 3,
    "max_consecutive_failures": 1,
    "max_proteins_per_output": 1,
    "window_overlap": 0,
}


def check(config: Config) -> None:
    """Refuse values that the schema's types let through.

    Raises
    ------
    ValueError
        One line that names the key, the value and the remedy.
    """
    inputs = config.input_list()
    read_as_values = [item for item in inputs if isinstance(item, (bool, int, float))]
    if read_as_values:
        item = read_as_values[0]
        raise ValueError(f"input={item} is read as a number or a truth value: write it in quotes")
    if not inputs or not all(isinstance(item, str) and item for item in inputs):
        remedy = "for example input=proteins/ or input=[a.fasta,b.fasta]"
        raise ValueError(f"input={config.input!r} is neither a path, a glob nor a list of these: {remedy}")
    for key, path in (("weights", config.model.weights), ("adapter", config.model.adapter)):
        if path is not None and not path.strip():
            raise ValueError(f"model.{key} is empty: name a path, or write null")
    if not config.repr_layers:
        raise ValueError("repr_layers is empty: name at least one layer, for example repr_layers=[-1]")
    if config.model.num_layers:  # of model=auto they are not known yet
        check_layers(config)
    if not config.include or len(set(config.include)) < len(config.include):
        raise ValueError("include must name each wanted representation once: any of mean, bos, per_tok")
    if config.ranks != "auto" and (not isinstance(config.ranks, int) or config.ranks < 1):
        raise ValueError(f"ranks={config.ranks} is no number of ranks: write ranks=auto or ranks=2")
    for key, least in LEAST.items():
        value = getattr(config, key)
        if value is not None and value < least:
            raise ValueError(f"{key}={value} is too small: use {least} or more")
    if config.fp8 is not Fp8.all and config.dtype is not Dtype.fp8:
        remedy = "use dtype=fp8 with it, or leave it out"
        raise ValueError(f"fp8={config.fp8.name} is not for dtype={config.dtype.name}: {remedy}")
    if config.compression is not Compression.none and not FORMATS[config.format.name].can_compress:
        able = ", ".join(
            output_format.name for output_format in FORMATS.values() if output_format.can_compress
        )
        raise ValueError(
            f"compression={config.compression.name} is not for format={config.format.name}: "
            f"use compression=none, or format={able}"
        )
    if not config.heartbeat_timeout >= LEAST_HEARTBEAT:
        remedy = f"use {LEAST_HEARTBEAT:g} seconds or more"
        raise ValueError(f"heartbeat_timeout={config.heartbeat_timeout} is too small: {remedy}")
    if not LEAST_PROGRESS <= config.progress_seconds < math.inf:
        remedy = f"use {LEAST_PROGRESS:g} seconds or more, or verbosity=quiet for no progress"
        raise ValueError(f"progress_seconds={config.progress_seconds:g} is no time between lines: {remedy}")
    if not 0 < config.unit_share <= 1:
        raise ValueError(f"unit_share={config.unit_share} is not a share: use a number above 0 and up to 1")
    if config.long is Long.window:
        limit = config.truncation_seq_length
        if limit is None:
            raise ValueError(
                "long=window needs a window: set truncation_seq_length to its residues, for example 1022"
            )
        if config.window_overlap >= limit:
            window = f"the window, truncation_seq_length={limit}"
            raise ValueError(f"window_overlap={config.window_overlap} must be smaller than {window}")
    package = package_of(config.format.name)
    if package and find_spec(package) is None:
        raise ValueError(f"format={config.format.name} needs {package}: pip install 'dist_esm[formats]'")
    check_selfcheck(config.selfcheck)


def check_layers(config: Config) -> None:
    """Refuse layers that the model does not have.

    Raises
    ------
    ValueError
        With the layers that it has.
    """
    num_layers, resolved = config.model.num_layers, config.resolved_layers()
    for given, layer in zip(config.repr_layers, resolved, strict=True):
        if not 0 <= layer <= num_layers:
            there_are = f"use {-num_layers - 1} to {num_layers}"
            raise ValueError(f"repr_layers: {config.model.name} has no layer {given}: {there_are}")
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"repr_layers={config.repr_layers} names a layer twice: name each once")


def check_selfcheck(config: SelfcheckConfig) -> None:
    """Refuse values of `selfcheck.*` that the schema's types let through."""
    if config.proteins < 1:
        raise ValueError(f"selfcheck.proteins={config.proteins} is too small: use 1 or more")
    if config.min_neighbours_kept is not None and not 0 <= config.min_neighbours_kept <= 1:
        raise ValueError(
            f"selfcheck.min_neighbours_kept={config.min_neighbours_kept} is no share: "
            "use 0 to 1, for example 0.99"
        )
    limits = (
        ("max_spread_error", config.max_spread_error, "0.03"),
        (
            "max_relative_error",
            config.max_relative_error,
            "1e-5",
        ),
    )
    for name, limit, example in limits:
        if limit is not None and not limit >= 0:
            raise ValueError(f"selfcheck.{name}={limit} is no limit: use 0 or more, for example {example}")
