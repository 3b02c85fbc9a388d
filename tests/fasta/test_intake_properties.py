"""Intake held to simple models: whole files with every oddity, and bytes that no one meant to be FASTA."""

from __future__ import annotations

import gzip
import random
import re
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from Bio import bgzf
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dist_esm.config import Chains, Include, Letter, Long, ResidueConfig, SpecialTokens, Unknown
from dist_esm.fasta import blocks
from dist_esm.fasta.segments import windows
from dist_esm.planning import units
from dist_esm.planning.assign import count_sequences
from helpers.data import INTAKE
from helpers.fasta import LETTERS, block_gzip
from helpers.standin import Embedded, accounts_add_up, embed_directory, expected

LIMIT, OVERLAP = 40, 12
BLANKS = " \t\n\r\x0b\x0c"


# A whole file as its author means it, how it is written down, and what should come of it.


@dataclass(frozen=True)
class Record:
    """One record: the header after `>`, and the letters that its author meant, before any line is broken."""

    header: str
    letters: str


@dataclass(frozen=True)
class Layout:
    """How records are written down; nothing here may change a result."""

    end: str
    width: int
    has_mark: bool
    last_end: bool
    seed: int
    compression: str


def written(records: list[Record], layout: Layout) -> bytes:
    """The bytes of a file: wrapped lines, with blank lines, comments and trailing blanks strewn in."""
    rng = random.Random(layout.seed)
    lines = [""] * rng.randrange(3)
    for record in records:
        lines.append(">" + record.header)
        wrapped = [record.letters[i : i + layout.width] for i in range(0, len(record.letters), layout.width)]
        for line in wrapped:
            lines += rng.choices([[], [""], ["  "], ["; a remark > not a header"]], [12, 1, 1, 1])[0]
            # A line break takes the blank that it falls on: only lines without blanks at their ends get some.
            lines.append(
                line
                if line[0] in BLANKS or line[-1] in BLANKS
                else rng.choices(["", " "], [9, 1])[0] + line + rng.choices(["", " \t"], [5, 1])[0]
            )
    text = layout.end.join(lines) + (layout.end if layout.last_end else "")
    content = (b"\xef\xbb\xbf" if layout.has_mark else b"") + text.encode()
    if layout.compression == "plain" or not content:
        return content
    return gzip.compress(content) if layout.compression == "gzip" else block_gzip(content, 64)


TOKEN_NAMES = ("cls", "pad", "eos", "bos", "unk", "mask", "sep")


def tokens_in(text: str) -> list[str]:
    """Text in brackets, and what begins like a token of fair-esm though it is not closed."""
    tokens, start = [], 0
    while start < len(text):
        left = text[start]
        right = {"<": ">", "[": "]", "(": ")", "{": "}"}.get(left, "")
        rest = re.split(f"[{re.escape(left + right)}]", text[start + 1 :])[0] if right else ""
        start += 1
        if right and text[start + len(rest) :][:1] == right:
            tokens.append(left + "".join(rest.split()).lower() + right)
            start += len(rest) + 1
        elif left == "<" and rest.lstrip().lower().startswith((*TOKEN_NAMES, "null_")):
            tokens.append("unclosed")
    return tokens


@dataclass(frozen=True)
class Policy:
    """What decides on letters, as far as these tests vary it."""

    residues: ResidueConfig = field(default_factory=ResidueConfig)
    special_tokens: SpecialTokens = SpecialTokens.skip
    chains: Chains = Chains.skip


def modelled(record: Record, number: int, policy: Policy, width: int) -> list[tuple[str, list[str], str]]:
    """Work out a record a letter at a time: of each chain its id, its tokens, and why it is skipped, or ''.

    Raises ValueError where the file fails.
    """
    name = record.header.split()[0] if record.header.split() else f"unnamed_{number}"
    lines = [record.letters[i : i + width].strip() for i in range(0, len(record.letters), width)]
    while lines and lines[-1] in ("", "//"):
        lines.pop()
    text = "".join(lines).replace("\n", "")
    if tokens := tokens_in(text):
        named = sorted(token for token in tokens if token[0] in "<[" and token[1:-1] in TOKEN_NAMES)
        if policy.special_tokens is SpecialTokens.fail:
            raise ValueError
        if policy.special_tokens is SpecialTokens.skip or set(tokens) != {"<mask>"}:
            return [(name, [], f"special token {named[0]}" if named else "text in brackets")]
    letters = list(
        re.sub(r"<\s*m\s*a\s*s\s*k\s*>", "\0", "\n".join(line for line in lines if line), flags=re.I)
    )
    told = [letter for letter in letters if not letter.isspace() and letter not in ".*-"]
    if 2 * sum(letter == "\0" or (letter.isascii() and letter.isalpha()) for letter in told) < len(told):
        if policy.residues.unknown is Unknown.fail:
            raise ValueError
        return [(name, [], "mostly no residues")]
    chains: list[list[str]] = [[]]
    for letter in letters:
        if letter in ":/|":
            chains.append([])
        else:
            chains[-1].append(letter)
    if len(chains) > 1:
        if policy.chains is Chains.skip:
            return [(name, [], "chain separators")]
        chains = [chain for chain in chains if "".join(chain).strip()]
    names = [name] if len(chains) == 1 else [f"{name}_{index + 1}" for index in range(len(chains))]
    return [(name, *put_right(chain, policy.residues)) for name, chain in zip(names, chains, strict=True)]


def put_right(letters: list[str], policy: ResidueConfig) -> tuple[list[str], str]:
    """The tokens that one chain should come to, and why it is skipped or ''."""
    if not "".join(letters).strip():
        return [], "empty sequence"
    words = re.split(r"(\s+)", "".join(letters))
    if policy.blanks is Letter.fix:
        words = [word.strip("0123456789") for word in words if not word.isspace()]
    letters = list("".join(words).replace("\n", ""))
    if policy.lower_case is Letter.fix:
        letters = [letter.upper() if "a" <= letter <= "z" else letter for letter in letters]
    if policy.gaps is Letter.fix:
        letters = [letter for letter in letters if letter not in "-."]
    while policy.trailing_stop is Letter.fix and letters and letters[-1] == "*":
        letters.pop()
    if any(letter not in LETTERS + "\0" for letter in letters):
        if policy.unknown is Unknown.fail:
            raise ValueError
        if policy.unknown is Unknown.skip:
            return [], "unknown letters"
    tokens = [letter if letter in LETTERS else "X" for letter in letters]
    tokens = ["<mask>" if letter == "\0" else token for letter, token in zip(letters, tokens, strict=True)]
    return tokens, "" if tokens else "no residues left"


WORDS = st.text(alphabet="abAB01|._:<>=;\u03b1\u20ac", min_size=1, max_size=6).filter(
    lambda word: word.strip() == word
)
HEADERS = st.one_of(
    WORDS,
    st.tuples(WORDS, st.text(alphabet="ab >;\t\u00e9[]<mask>", max_size=12)).map(
        lambda pair: f"{pair[0]} {pair[1]}".rstrip()
    ),
    st.sampled_from(["", "", "same", "same again", "unnamed_2"]),
)
SEQUENCES = st.one_of(
    st.text(alphabet=LETTERS, max_size=LIMIT + 2),
    st.text(alphabet=LETTERS + "acdxz*-.J?17 <", max_size=30),
    st.tuples(st.text(alphabet=LETTERS, max_size=20), st.sampled_from(["*", "**", "-", "", "*-", " *"])).map(
        "".join
    ),
    st.tuples(st.text(alphabet=LETTERS, min_size=1, max_size=5), st.integers(9, 60)).map(
        lambda pair: pair[0] * pair[1]
    ),
    st.sampled_from(["", "", "MKV", "MKV", "-", "*", "mkv", "\u00e9M", "\u00e9M?", "<mask", "M\u00a0K\tV"]),
    st.sampled_from(["MK<mask>V", "M<mask>K<mask>", "<mask>", "<cls>MKV<eos>", "M<mask>K<x>", "M< MASK >L<"]),
    st.sampled_from(["MKV:LAG", "MKV/", ":MKV", "AC | DE", "MK/mk*/-", "M1 K:12 L", ":", "K:K:K<mask>"]),
    st.sampled_from(["1 MKVLA 6 MKVLA", "12 MK", "MK 12", "12", "40 40 38", "9987", "1 M 2 K", "M 1K"]),
)
RECORDS = st.lists(st.builds(Record, HEADERS, SEQUENCES), max_size=14)
LAYOUTS = st.builds(
    Layout,
    st.sampled_from(["\n", "\r\n", "\r"]),
    st.sampled_from([1, 5, 13, 60, 10_000]),
    st.booleans(),
    st.booleans(),
    st.integers(0, 1 << 16),
    st.sampled_from(["plain", "plain", "gzip", "blocks"]),
)
LETTER, UNKNOWN = (
    st.sampled_from(Letter),
    st.sampled_from([Unknown.replace, Unknown.replace, Unknown.skip, Unknown.fail]),
)
POLICIES = st.builds(
    Policy,
    st.one_of(st.just(ResidueConfig()), st.builds(ResidueConfig, LETTER, LETTER, LETTER, LETTER, UNKNOWN)),
    st.sampled_from([*SpecialTokens, SpecialTokens.skip, SpecialTokens.mask]),
    st.sampled_from(Chains),
)
SETTINGS = st.fixed_dictionaries(
    {
        "truncation_seq_length": st.sampled_from([LIMIT, LIMIT, None]),
        "long": st.sampled_from(Long),
        "dedupe": st.booleans(),
        "unit_share": st.sampled_from([1.0, 0.3, 0.02]),
        "toks_per_batch": st.sampled_from([3, 60, 1000]),
    }
)


def well_formed(record: Record, layout: Layout) -> bool:
    """No line of the record reads as a header or as a comment.

    Such lines are taken for what they look like, by rule, and have tests of their own.
    """
    return not any(
        record.letters[i : i + layout.width].strip().startswith((";", ">"))
        for i in range(0, len(record.letters), layout.width)
    )


@settings(max_examples=100, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(
    st.lists(st.tuples(RECORDS, LAYOUTS), min_size=1, max_size=4),
    POLICIES,
    SETTINGS,
    st.sampled_from([1, 7, 1 << 20]),
)
def test_every_record_of_every_file_comes_out_as_its_author_meant_it(files, policy, overrides, block):
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(blocks, "BLOCK", block),
        patch.object(units, "MIN_UNIT_BYTES", 40),
    ):
        inputs = Path(folder) / "in"
        inputs.mkdir()
        files = [
            ([record for record in records if well_formed(record, layout)], layout)
            for records, layout in files
        ]
        for number, (records, layout) in enumerate(files):
            (inputs / f"f{number}.fasta").write_bytes(written(records, layout))
        include = [Include.mean, Include.bos, Include.per_tok]
        done = embed_directory(
            inputs,
            Path(folder) / "out",
            **vars(policy),
            include=include,
            window_overlap=OVERLAP,
            **overrides,
        )
        assert accounts_add_up(done.report)
        outcomes: Counter[str] = Counter()
        reasons: Counter[str] = Counter()
        for number, (records, layout) in enumerate(files):
            outcome = check_file(done, f"f{number}", records, layout, policy, overrides)
            outcomes.update(outcome[0])
            reasons.update(outcome[1])
        assert {
            key: done.report.records[key] for key in ("ok", "truncated", "windowed", "skipped", "failed")
        } == {key: outcomes[key] for key in ("ok", "truncated", "windowed", "skipped", "failed")}
        assert Counter(done.report.records["skipped_by_reason"]) == reasons
        more_chains = done.report.records["more_chains"]
        assert done.report.records["in"] == sum(len(records) for records, _ in files) + more_chains
        assert policy.chains is Chains.split or more_chains == 0
        assert done.report.records["not_attempted"] == 0
        assert done.report.status == ("partial" if outcomes["failed"] else "complete")


def check_file(
    done: Embedded, stem: str, records: list[Record], layout: Layout, policy: Policy, overrides: dict
) -> tuple[Counter[str], Counter[str]]:
    """Hold one file's output to the model; returns its records' outcomes and reasons for skipping."""
    outcomes: Counter[str] = Counter()
    reasons: Counter[str] = Counter()
    right = []
    limit, long = overrides["truncation_seq_length"], overrides["long"]
    try:
        proteins = [
            (record, *protein)
            for number, record in enumerate(records, 1)
            for protein in modelled(record, number, policy, layout.width)
        ]
        for record, name, residues, reason in proteins:
            spans = None
            kind = "ok"
            if reason:
                kind = "skipped"
            elif limit is not None and len(residues) > limit:
                if long is Long.fail:
                    raise ValueError
                kind = {Long.truncate: "truncated", Long.window: "windowed", Long.skip: "skipped"}[long]
                reason = "too long" if long is Long.skip else ""
                residues = residues[:limit] if long is Long.truncate else residues
                spans = windows(len(residues), limit, OVERLAP) if long is Long.window else None
            outcomes[kind] += 1
            if reason:
                reasons[reason] += 1
            else:
                right.append((name, record.header, residues, spans))
    except ValueError:
        assert f"{stem}_ESM" not in done.outputs()
        assert done.failure(f"{stem}.fasta")
        return Counter(failed=len(records)), Counter()
    content = done.load(f"{stem}_ESM")
    assert content["proteins"] == [name for name, *_ in right]
    assert content["headers"] == [header for _, header, *_ in right]
    assert content["lengths"] == [len(residues) for *_, residues, _ in right]
    for i, (_, _, residues, spans) in enumerate(right):
        answer = expected(residues, spans=spans)
        assert np.array_equal(content["data"][i].numpy(), answer.mean)
        assert np.array_equal(content["bos_representations"][1][i].numpy(), answer.bos)
        assert np.array_equal(content["representations"][1][i].numpy(), answer.rows)
    return outcomes, reasons


# Bytes: a naive reader of what is left of a file after anything happened to it.


def naive(content: bytes) -> list[tuple[str, str]] | None:
    """(id, residues) of every record that is not empty, under the default policy; None: no FASTA."""
    if content[:2] == b"\x1f\x8b":
        if is_cut_between_blocks(content):
            return None
        try:
            content = gzip.decompress(content)
        except Exception:
            return None
        if not content:
            return None
    found: list[list[str]] = []
    tail = ""
    for raw in re.split(b"\r\n|\r|\n", content.removeprefix(b"\xef\xbb\xbf")):
        if raw.startswith(b">"):
            if b"\0" in raw:
                return None
            try:
                header = raw[1:].decode("utf-8")
            except UnicodeDecodeError:
                header = raw[1:].decode("latin-1")
            found.append([header, ""])
            tail = ""
            continue
        try:
            line = raw.decode("utf-8")
        except UnicodeDecodeError:
            return None
        if any(letter in line for letter in [*map(chr, range(9)), *map(chr, range(14, 32)), "\x7f"]):
            return None
        line = line.strip()
        if not line or line[0] == ";":
            continue
        if not found or "\ufeff" in line:
            return None
        # A '>' that closes a '<' is of a token. Any other marks a line end that is missing.
        is_open = False
        for letter in tail + line:
            if letter == ">" and not is_open:
                return None
            is_open = letter == "<" or (is_open and letter != ">")
        unclosed = re.search(r"<\s*[A-Za-z_0-9]{0,6}$", tail + line)
        tail = unclosed[0] if unclosed else ""
        found[-1][1] += ("\n" if found[-1][1] else "") + line
    proteins = [
        protein
        for number, (header, lines) in enumerate(found, 1)
        for protein in modelled(Record(header, lines), number, Policy(), 10**9)
    ]
    return [(name, "".join(residues)) for name, residues, reason in proteins if not reason]


def is_cut_between_blocks(content: bytes) -> bool:
    """Block-gzip of whole blocks of which the last is not the empty one."""
    if content.rstrip(b"\0").endswith(bgzf._bgzf_eof.rstrip(b"\0")):
        return False
    place = 0
    while place < len(content):
        head = content[place : place + 18]
        if len(head) < 18 or head[:4] != b"\x1f\x8b\x08\x04" or head[12:16] != b"BC\x02\0":
            return False
        size = int.from_bytes(head[16:18], "little") + 1
        if size <= 18:
            return False
        place += size
    return place == len(content)


def check_bytes(contents: list[bytes], block: int = 1 << 20, unit_share: float = 1.0) -> list[str | int]:
    """Embed files of any bytes; returns the number of proteins of each, or the message with which it fails.

    Each must end as the naive reader has it.
    """
    ends: list[str | int] = []
    with (
        tempfile.TemporaryDirectory() as folder,
        patch.object(blocks, "BLOCK", block),
        patch.object(units, "MIN_UNIT_BYTES", 100),
    ):
        inputs = Path(folder) / "in"
        inputs.mkdir()
        for number, content in enumerate(contents):
            (inputs / f"f{number:03d}.fasta").write_bytes(content)
        done = embed_directory(
            inputs, Path(folder) / "out", truncation_seq_length=None, unit_share=unit_share
        )
        assert accounts_add_up(done.report)
        assert done.report.records["not_attempted"] == 0
        failed = {Path(failure.path).name: failure for failure in done.report.failed}
        for number, content in enumerate(contents):
            right = naive(content)
            if right is None:
                failure = failed.pop(f"f{number:03d}.fasta")
                assert failure.error_type == "FastaError"
                assert re.match(r"line \d+|(damaged|truncated|empty) gzip|this is ", failure.error_message)
                ends.append(failure.error_message)
                continue
            output = done.load(f"f{number:03d}_ESM")
            assert output["proteins"] == [name for name, _ in right]
            assert output["lengths"] == [len(residues) for _, residues in right]
            for vector, (_, residues) in zip(output["data"], right, strict=True):
                assert np.array_equal(vector.numpy(), expected(residues).mean)
            if content:
                assert count_sequences(inputs / f"f{number:03d}.fasta") >= len(right)
            ends.append(len(right))
        assert not failed
    return ends


SEEDS = [
    b">a one\nMKVLAAGIVG\nACDEFGHIKL\n>b\nMNPQRSTVWY\n>a\nMKV*\n",
    b"\xef\xbb\xbf>x\r\nmkvl\r\n\r\n;note\r\n>y z\r\nAC-DE.F\r\n>\r\nGH IK\r\n",
    b">1\rMKV\r>2\r\r>3\rXBUZO\r",
    ">prot\u00e9ine \u03b1\nMKV\n>\U0001f9ec\nVKM\n".encode(),
    b"\n \n>only",
    b"".join(
        b">r%d\n%s\n" % (i, bytes(random.Random(i).choices(b"ACDEFGHIKLMNPQRSTVWY", k=30))) for i in range(20)
    ),
]
CHUNKS = [
    b">",
    b"\n>",
    b"\r",
    b"\n",
    b"\r\n",
    b"\0",
    b";",
    b"\xef\xbb\xbf",
    b"\xff",
    b"\xc2\x85",
    b"\xe2\x80\xa8",
    b" ",
    b"*",
    b"-",
    b"<mask>",
    b"\x0c",
    b"\x1f\x8b",
]


def mutated(rng: random.Random, seeds: list[bytes]) -> bytes:
    """A seed after a few accidents."""
    content = bytearray(rng.choice(seeds))
    for _ in range(rng.choice([0, 1, 1, 2, 4, 8])):
        place, other = sorted(rng.randrange(len(content) + 1) for _ in range(2))
        accident = rng.randrange(7)
        if accident == 0 and content:
            content[min(place, len(content) - 1)] ^= 1 << rng.randrange(8)
        elif accident == 1:
            del content[place:other]
        elif accident == 2:
            content[place:place] = content[place:other]
        elif accident == 3:
            content[place:place] = rng.choice(CHUNKS)
        elif accident == 4:
            donor = rng.choice(seeds)
            first = rng.randrange(len(donor))
            content[place:other] = donor[first : first + rng.randrange(60)]
        elif accident == 5:
            content = content[:other]
        else:
            content[place:place] = rng.randbytes(rng.randrange(4))
    return bytes(content)


def fuzzed(rng: random.Random) -> bytes:
    """A seed after accidents, before or after gzip, or nothing but noise."""
    kind = rng.randrange(8)
    if kind == 0:
        return rng.randbytes(rng.randrange(60))
    if kind == 1:
        return bytes(rng.choices(b">;\r\n \tMKV*-.j\xef\xbb\xbf\0", k=rng.randrange(60)))
    if kind == 2:
        return gzip.compress(mutated(rng, SEEDS), mtime=0)
    if kind == 3:
        return mutated(rng, [gzip.compress(seed, mtime=0) for seed in SEEDS])
    if kind == 4:
        return mutated(rng, [block_gzip(seed, 50) for seed in SEEDS])
    return mutated(rng, SEEDS)


@pytest.mark.parametrize("seed", range(12))
def test_any_bytes_end_as_their_own_proteins_or_as_a_failure_that_says_where(seed):
    rng = random.Random(seed)
    check_bytes([fuzzed(rng) for _ in range(60)], rng.choice([1, 3, 16, 1 << 20]), rng.choice([1.0, 0.001]))


# Files that are kept: the (id, residues) of each one's proteins, or the message with which it fails.

EIGHT = [(f"r{i}", "MKVLAAGIVG" + "ACDEFGH"[:i]) for i in range(8)]
KEPT: dict[str, list[tuple[str, str]] | str] = {
    "empty_blocks.fasta.gz": "empty gzip file: it decompresses to nothing",
    "block_size_0.fasta.gz": EIGHT,
    "last_crc.fasta.gz": "damaged gzip at or before byte 243 of the file: .*(CRC check failed|checksum)",
    "last_text_size.fasta.gz": r"damaged gzip",
    "without_end_mark.fasta.gz": r"truncated gzip: this is block-gzip \(BGZF\), and its end block is missing",
    "header_only.fasta.gz": "truncated gzip: the file ends at byte 5,",
    "rubbish_after.fasta.gz": "damaged gzip at or before byte 33 of the file: Not a gzipped file",
    "zeros_after.fasta.gz": [("a", "MK")],
    "noise_inside.fasta.gz": "damaged gzip at or before byte 23 of the file",
    "half_magic.fasta.gz": "line 1 holds control characters",
    "half_mark.fasta": r"line 1, byte 1 \(0xef\) is not UTF-8 text",
    "only_mark.fasta": [],
    "two_marks.fasta": "line 1 has text before the first '>'",
    "mark_inside.fasta": "line 3 has a '>' or a byte order mark inside a sequence",
    "lone_header.fasta": [],
    "headers_only.fasta": [],
    "old_mac.fasta": [("1", "MKV"), ("3", "XBUZO")],
    "every_line_end.fasta": [("a", "MKV"), ("c", "KM")],
    "other_line_ends.fasta": [("a", "MKVLACDEFG")],
    "letters_of_elsewhere.fasta": [],
    "joined_without_line_end.fasta": "line 2 has a '>' or a byte order mark inside a sequence",
    "ctrl_z.fasta": "line 3 holds control characters",
    "ctrl_a_in_header.fasta": [("a", "MK")],
    "latin1.fasta": [("prot\u00e9ine", "MK")],
    "utf16.fasta": "this is text in UTF-16",
    "page.fasta": r"line 1 has text before the first '>' \('<!DOCTYPE html>'\)",
    "document.fasta": r"line 1 has text before the first '>' \('%PDF-1.4'\)",
    "pointer.fasta": "line 1 has text before the first '>'",
    "remarks_only.fasta": [],
    "semicolon_letters.fasta": [("a;b", "MKXVLX")],
}


@pytest.mark.parametrize("block", [1, 3, 1 << 20])
@pytest.mark.parametrize("unit_share", [1.0, 0.001])
def test_kept_files_come_to_what_they_should(block, unit_share):
    contents = [(INTAKE / name).read_bytes() for name in KEPT]
    for content, end, right in zip(
        contents, check_bytes(contents, block, unit_share), KEPT.values(), strict=True
    ):
        if isinstance(right, str):
            assert isinstance(end, str)
            assert re.match(right, end)
        else:
            assert naive(content) == right
            assert end == len(right)


def test_kept_files_are_all_pinned_and_described():
    assert {path.name for path in INTAKE.iterdir()} == {*KEPT, "README.md"}
    text = (INTAKE / "README.md").read_text()
    assert [name for name in KEPT if f"`{name}`" not in text] == []
