"""The schema of the configuration, and the checks that need no file and no device.

Hydra composes ``conf/`` and the command line's ``key=value`` into `Config`, once, at the border; behind it only these typed
objects are passed on. The names of enum members are the values that the user writes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from enum import Enum
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from omegaconf import MISSING, OmegaConf


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


class DeviceKind(Enum):
    """Where to run."""

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
    torch = "torch"


class Format(Enum):
    """File format of the outputs."""

    pt = "pt"
    fair_esm = "fair_esm"
    h5 = "h5"
    parquet = "parquet"
    safetensors = "safetensors"


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
    """What to do."""

    embed = "embed"
    plan = "plan"
    selfcheck = "selfcheck"
    verify = "verify"


class Long(Enum):
    """What becomes of a protein of more than ``truncation_seq_length`` residues."""

    truncate = "truncate"
    skip = "skip"
    fail = "fail"
    window = "window"


class Letter(Enum):
    """What becomes of letters that ESM-2 could do without: put right, or treated like any unknown letter."""

    fix = "fix"
    unknown = "unknown"


class Unknown(Enum):
    """What becomes of a letter outside fair-esm's alphabet: X in its place, or its record skipped, or its file failed."""

    replace = "replace"
    skip = "skip"
    fail = "fail"


class SpecialTokens(Enum):
    """What becomes of a record with a special token such as `<mask>`: skipped, its file failed, or masks embedded."""

    skip = "skip"
    fail = "fail"
    mask = "mask"


class Chains(Enum):
    """What becomes of a record of several chains, separated by `:`, `/` or `|`: skipped, or a protein for each."""

    skip = "skip"
    split = "split"


class HeaderEncoding(Enum):
    """How headers are read: as UTF-8, or, where they are not, as Latin-1; or as UTF-8 alone, else the file fails."""

    auto = "auto"
    utf8 = "utf8"


@dataclass
class ModelConfig:
    """One ESM-2; ``conf/model`` has a file for each."""

    name: str = MISSING
    """fair-esm's name, and the name of the checkpoint file without `.pt`."""
    num_layers: int = MISSING
    embed_dim: int = MISSING
    attention_heads: int = MISSING
    weights: str | None = None
    """null: torch hub's cache, downloaded once if absent; a path; or `random`: seeded random weights for tests and benchmarks."""
    seed: int = 0
    """Seed of `weights=random`."""


@dataclass
class ResidueConfig:
    """What becomes of letters that are not residues as ESM-2 knows them. Every change is counted."""

    lower_case: Letter = Letter.fix
    """`fix`: soft-masked residues are upper-cased."""
    trailing_stop: Letter = Letter.fix
    """`fix`: `*` at the end of a sequence (Prodigal) is removed."""
    gaps: Letter = Letter.fix
    """`fix`: `-` and `.` are removed."""
    blanks: Letter = Letter.fix
    """`fix`: blanks and tabs inside a sequence are removed, and numbers at the ends of its blocks."""
    unknown: Unknown = Unknown.replace
    """Anything outside `ACDEFGHIKLMNPQRSTVWY` and `XBUZO`: `replace` by X, `skip` the record, or `fail` the file."""


@dataclass
class SelfcheckConfig:
    """What `job=selfcheck` looks at, and how far from fair-esm is too far."""

    proteins: int = 32
    """Proteins in the sample: the shortest, the longest, and others spread over the lengths between."""
    min_cosine: float | None = None
    """Least cosine of a mean with fair-esm's; null: 0.999."""
    max_relative_error: float | None = None
    """Largest ||ours - fair-esm's|| / ||fair-esm's|| of a mean; null: 1e-5 in fp32, no limit in bf16 and fp16."""


@dataclass
class Config:
    """Every key of the command line."""

    input: Any = MISSING
    """A FASTA file, a directory (searched recursively), a glob, or a list of these."""
    output_dir: Path = Path("embeddings")
    """Where everything is written."""
    model: ModelConfig = field(default_factory=ModelConfig)
    repr_layers: list[int] = field(default_factory=lambda: [-1])
    """Layers to return, fair-esm's numbering: 0 is the embedding, negatives count from the end."""
    include: list[Include] = field(default_factory=lambda: [Include.mean])
    """Representations to write for each protein and layer."""
    truncation_seq_length: int | None = 1022
    """Residues that one forward sees of a protein; null: all of them, of at most 1,000,000 letters."""
    long: Long = Long.truncate
    """What becomes of a protein of more residues than that."""
    window_overlap: int = 256
    """Residues that neighbouring windows share under `long=window`."""
    residues: ResidueConfig = field(default_factory=ResidueConfig)
    special_tokens: SpecialTokens = SpecialTokens.skip
    """Records with a special token such as `<mask>`; `mask` embeds fair-esm's mask token as fair-esm does."""
    chains: Chains = Chains.skip
    """Records of several chains; `split` makes each a protein, named by the record's id and its place."""
    header_encoding: HeaderEncoding = HeaderEncoding.auto
    """`auto`: a header that is not UTF-8 is read as Latin-1, and listed."""
    dedupe: bool = True
    """Embed identical sequences once per rank and give every id its copy."""
    toks_per_batch: int | None = None
    """Tokens in a pack; null: the default for the device."""
    dtype: Dtype = Dtype.auto
    """Precision of parameters and matrix products; `auto`: bf16 where the GPU has it, else fp32."""
    device: DeviceKind = DeviceKind.auto
    attention: Attention = Attention.auto
    """Implementation of attention; `auto` picks the fastest that the device can run."""
    linear: LinearKind = LinearKind.auto
    """Implementation of matrix products and what is fused to them; `auto` picks the fastest that the device can run."""
    format: Format = Format.pt
    save_dtype: SaveDtype = SaveDtype.float32
    assign_by: AssignBy = AssignBy.sequences
    """Cost of a unit in the greedy assignment."""
    unit_share: float = 0.01
    """A plain or block-gzip file of more than this share of all input bytes is cut into units of about that size; 1: none is."""
    max_proteins_per_output: int = 100_000
    """A file of more proteins than this is written as numbered parts of at most so many."""
    max_consecutive_failures: int = 3
    """So many failed units in a row on one rank stop the run."""
    resume: bool = True
    """Skip units that the journal has as done under the same settings."""
    selfcheck: SelfcheckConfig = field(default_factory=SelfcheckConfig)
    job: Job = Job.embed

    def input_list(self) -> list[str]:
        """`input` as a list of strings."""
        return list(self.input) if isinstance(self.input, list) else [self.input]

    def resolved_layers(self) -> list[int]:
        """`repr_layers` without negatives, in the order given."""
        return [layer + self.model.num_layers + 1 if layer < 0 else layer for layer in self.repr_layers]

    def output_representations(self) -> list[tuple[Include, int]]:
        """Kinds and layers in an output: those included, and the mean of the last layer requested, which is always there."""
        layers = self.resolved_layers()
        return list(
            dict.fromkeys(
                [*((kind, layer) for kind in self.include for layer in layers), (Include.mean, layers[-1])]
            )
        )


def to_dict(config: Config) -> dict[str, Any]:
    """The configuration as plain values, as it can be written on the command line."""

    def plain(value: Any) -> Any:
        if isinstance(value, Enum):
            return value.value
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return [plain(item) for item in value] if isinstance(value, (list, tuple)) else value

    return {key: plain(value) for key, value in asdict(config).items()}


NEEDS = {Format.h5: "h5py", Format.parquet: "pyarrow", Format.safetensors: "safetensors"}
"""Package that writes a format, or reads it back."""


def from_dict(values: dict[str, Any]) -> Config:
    """What `to_dict` made plain, typed again."""
    config = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(Config), values))
    assert isinstance(config, Config)
    return config


LEAST = {
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
    if not inputs or not all(isinstance(item, str) and item for item in inputs):
        remedy = "for example input=proteins/ or input=[a.fasta,b.fasta]"
        raise ValueError(f"input={config.input!r} is neither a path, a glob nor a list of these: {remedy}")
    num_layers = config.model.num_layers
    resolved = config.resolved_layers()
    if not resolved:
        raise ValueError("repr_layers is empty: name at least one layer, for example repr_layers=[-1]")
    for given, layer in zip(config.repr_layers, resolved, strict=True):
        if not 0 <= layer <= num_layers:
            raise ValueError(
                f"repr_layers: {config.model.name} has no layer {given}: use {-num_layers - 1} to {num_layers}"
            )
    if len(set(resolved)) < len(resolved):
        raise ValueError(f"repr_layers={config.repr_layers} names a layer twice: name each once")
    if not config.include or len(set(config.include)) < len(config.include):
        raise ValueError("include must name each wanted representation once: any of mean, bos, per_tok")
    for key, least in LEAST.items():
        value = getattr(config, key)
        if value is not None and value < least:
            raise ValueError(f"{key}={value} is too small: use {least} or more")
    if not 0 < config.unit_share <= 1:
        raise ValueError(f"unit_share={config.unit_share} is not a share: use a number above 0 and up to 1")
    if config.long is Long.window:
        limit = config.truncation_seq_length
        if limit is None:
            raise ValueError(
                "long=window needs a window: set truncation_seq_length to its residues, for example 1022"
            )
        if config.window_overlap >= limit:
            raise ValueError(
                f"window_overlap={config.window_overlap} must be smaller than the window, truncation_seq_length={limit}"
            )
    package = NEEDS.get(config.format)
    if package and find_spec(package) is None:
        raise ValueError(f"format={config.format.name} needs {package}: pip install 'dist_esm[formats]'")
    check_selfcheck(config.selfcheck)
    if config.job is Job.plan:
        raise ValueError("job=plan is not there yet: use job=embed, job=selfcheck or job=verify")


def check_selfcheck(config: SelfcheckConfig) -> None:
    """The part of `check` for `selfcheck.*`."""
    if config.proteins < 1:
        raise ValueError(f"selfcheck.proteins={config.proteins} is too small: use 1 or more")
    if config.min_cosine is not None and not -1 <= config.min_cosine <= 1:
        raise ValueError(
            f"selfcheck.min_cosine={config.min_cosine} is no cosine: use a number up to 1, for example 0.999"
        )
    if config.max_relative_error is not None and not config.max_relative_error >= 0:
        raise ValueError(
            f"selfcheck.max_relative_error={config.max_relative_error} is no limit: use 0 or more, for example 1e-5"
        )
