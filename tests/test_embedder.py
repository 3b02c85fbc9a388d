"""The Python API gives the numbers of the command line."""

from __future__ import annotations

import gzip
import os
import signal
import subprocess
import sys
import threading
import time
import warnings

import numpy as np
import pandas
import polars
import pytest
import torch
from Bio import SeqIO
from Bio.Seq import Seq
from Bio.SeqRecord import SeqRecord

from dist_esm import Embedder, load
from dist_esm import embedder as embedder_module
from dist_esm.__main__ import main
from dist_esm.jobs import setup
from dist_esm.model.kernels.choose import PLAIN
from dist_esm.model.memory import Memory
from helpers.command import MODEL, environment, run_ranks
from helpers.compare import digests
from helpers.data import PROTEINS
from helpers.fasta import read_sequences


@pytest.fixture(scope="module")
def embedder(checkpoint_8m):
    return Embedder("esm2_t6_8M_UR50D", weights=checkpoint_8m, device="cpu", toks_per_batch=300)


WINDOWS = {"long": "window", "truncation_seq_length": 60, "window_overlap": 20}


@pytest.mark.parametrize("options", [{}, WINDOWS], ids=["truncate", "window"])
def test_same_bits_as_the_command(checkpoint_8m, tmp_path, options):
    source = PROTEINS / "medium.faa"
    settings = ["include=[mean,bos,per_tok]", *(f"{key}={value}" for key, value in options.items())]
    result = run_ranks(
        None, f"input={source}", f"output_dir={tmp_path}", MODEL, f"model.weights={checkpoint_8m}", *settings
    )
    assert result.returncode == 0, result.stderr
    content = torch.load(tmp_path / "medium_ESM.pt", weights_only=True)
    embedder = Embedder(
        "esm2_t6_8M_UR50D", weights=checkpoint_8m, device="cpu", toks_per_batch=300, **options
    )
    letters = list(read_sequences(source).values())
    np.testing.assert_array_equal(embedder.embed(letters), content["mean_representations"][6])
    np.testing.assert_array_equal(embedder.embed(letters, include="bos"), content["bos_representations"][6])
    for mine, theirs in zip(
        embedder.embed(letters, include="per_tok"), content["representations"][6], strict=True
    ):
        np.testing.assert_array_equal(mine, theirs)


def test_letters_are_put_right_as_on_the_command_line(embedder):
    with pytest.warns(UserWarning, match="unknown letters"):
        put_right = embedder.embed(["mkt-AY*", "MKTJ"])
    np.testing.assert_array_equal(put_right, embedder.embed(["MKTAY", "MKTX"]))


FASTA = ">P1 first\nMKTAYIAKQR\n>P2 second\nGAVLI\n>P3\nMKTAYIAKQR\n"
NAMED = {"P1": "MKTAYIAKQR", "P2": "GAVLI", "P3": "MKTAYIAKQR"}


@pytest.fixture
def fasta(tmp_path):
    path = tmp_path / "x.fasta"
    path.write_text(FASTA)
    return path


def test_every_way_to_give_proteins_gives_the_same_bits(embedder, fasta):
    packed = fasta.with_suffix(".fasta.gz")
    packed.write_bytes(gzip.compress(FASTA.encode()))
    other_suffix = fasta.with_suffix(".txt")
    other_suffix.write_text(FASTA)
    records = list(SeqIO.parse(fasta, "fasta"))
    frame = pandas.DataFrame({"id": NAMED.keys(), "sequence": NAMED.values()})
    expected = embedder.embed(list(NAMED.values()))
    given = [
        tuple(NAMED.values()),
        (letters for letters in NAMED.values()),
        np.array(list(NAMED.values())),
        frame["sequence"],
        polars.Series(list(NAMED.values())),
        [Seq(letters) for letters in NAMED.values()],
        NAMED,
        {name: Seq(letters) for name, letters in NAMED.items()},
        NAMED.items(),
        list(NAMED.items()),
        [list(pair) for pair in NAMED.items()],
        zip(frame.id, frame.sequence, strict=True),
        [("P1", records[0]), *records[1:]],
        records,
        SeqIO.parse(fasta, "fasta"),
        SeqIO.to_dict(records),
        SeqIO.index(str(fasta), "fasta"),
        fasta,
        str(fasta),
        packed,
        other_suffix,
        str(other_suffix),
    ]
    for proteins in given:
        np.testing.assert_array_equal(embedder.embed(proteins), expected, err_msg=repr(proteins))
    assert expected.shape == (3, 320)


@pytest.mark.parametrize("library", ["pandas", "polars"])
def test_a_frame_has_ids_lengths_and_every_kind_and_layer(embedder, fasta, library):
    wanted = {"include": ["mean", "bos", "per_tok"], "repr_layers": [3, -1]}
    arrays = embedder.embed(fasta, **wanted)
    names = [f"{kind}_layer_{layer}" for kind in ("mean", "bos", "per_tok") for layer in (3, 6)]
    assert list(arrays) == names
    for proteins in (fasta, NAMED, list(NAMED.items()), list(SeqIO.parse(fasta, "fasta"))):
        frame = embedder.embed(proteins, **wanted, as_frame=library)
        assert type(frame).__module__.startswith(library)
        assert list(frame["id"]) == list(NAMED)
        assert list(frame["length"]) == [10, 5, 10]
        assert list(frame.columns) == ["id", "length", *names]
        for name in names:
            for row, array in zip(frame[name], arrays[name], strict=True):
                row = row.to_numpy() if isinstance(row, polars.Series) else row
                assert row.dtype == np.float32
                np.testing.assert_array_equal(row, array)
    if library == "polars":
        assert frame["mean_layer_6"].dtype == polars.Array(polars.Float32, 320)
        assert frame["per_tok_layer_6"].dtype == polars.List(polars.Array(polars.Float32, 320))
        np.testing.assert_array_equal(frame["mean_layer_6"].to_numpy(), arrays["mean_layer_6"])
    else:
        same = embedder.embed(NAMED, as_frame=True)
        np.testing.assert_array_equal(np.stack(same["mean_layer_6"]), arrays["mean_layer_6"])
    nameless = embedder.embed(["MKT", "GAV"], as_frame=library)
    assert list(nameless["id"]) == ["sequence_0", "sequence_1"]


def test_layers_and_kinds_are_those_that_are_asked_for_alone(embedder, checkpoint_8m):
    letters = ["MKTAYIAKQR", "GAVLI"]
    several = embedder.embed(letters, ["mean", "bos"], [0, 3, 6])
    for layer in (0, 3, -1):
        name = layer % 7
        np.testing.assert_array_equal(
            embedder.embed(letters, repr_layers=layer), several[f"mean_layer_{name}"]
        )
        np.testing.assert_array_equal(embedder.embed(letters, "bos", layer), several[f"bos_layer_{name}"])
    assert list(embedder.embed(letters, "mean", [3])) == ["mean_layer_3"]
    both = Embedder("esm2_t6_8M_UR50D", weights=checkpoint_8m, device="cpu", repr_layers=[3, 6]).embed(
        letters
    )
    assert list(both) == ["mean_layer_3", "mean_layer_6"]
    np.testing.assert_array_equal(both["mean_layer_3"], several["mean_layer_3"])
    with pytest.raises(ValueError, match="has no layer 7: use -7 to 6"):
        embedder.embed(letters, repr_layers=7)


def test_no_proteins_give_what_has_the_right_shape(embedder, tmp_path):
    (tmp_path / "none.fasta").write_text("")
    for nothing in ([], {}, tmp_path / "none.fasta"):
        arrays = embedder.embed(nothing, ["mean", "per_tok"], [3, 6])
        assert arrays["mean_layer_3"].shape == (0, 320)
        assert arrays["mean_layer_3"].dtype == np.float32
        assert arrays["per_tok_layer_6"] == []
        for library in ("pandas", "polars"):
            frame = embedder.embed(nothing, ["mean", "per_tok"], as_frame=library)
            assert frame.shape == (0, 4)
    assert frame.schema["mean_layer_6"] == polars.Array(polars.Float32, 320)
    assert embedder.embed([]).shape == (0, 320)


def test_identical_sequences_are_computed_once_and_share_no_memory(embedder, monkeypatch):
    computed = []
    on_cpu = type(embedder.engine)._on_cpu

    def counting(engine, segments, num_rows):
        computed.extend(segments)
        return on_cpu(engine, segments, num_rows)

    monkeypatch.setattr(type(embedder.engine), "_on_cpu", counting)
    rows = embedder.embed(["MKTAY", "GAV", "mkt-ay*", "GAV", "MKTAY"], "per_tok")
    assert sorted(len(segment.tokens) - 2 for segment in computed) == [3, 5]
    np.testing.assert_array_equal(rows[0], rows[2])
    before = rows[4].copy()
    rows[0][:] = 0
    np.testing.assert_array_equal(rows[4], before)


def test_what_is_no_sequence_is_said_and_never_embedded(embedder, fasta):
    one = SeqRecord(Seq("MKT"), id="P1")
    frame = pandas.DataFrame({"id": ["P1"], "sequence": ["MKT"]})
    cases = [
        ("MKT", "sequences is one string, and no file has that name: pass a list of sequences, a dict"),
        ("nowhere.fasta", "nowhere.fasta is not there: name an existing FASTA file"),
        ("nowhere.FAA.gz", "nowhere.FAA.gz is not there"),
        ("./nowhere", "nowhere is not there"),
        (fasta.parent / "nowhere", "nowhere is not there"),
        (fasta.parent, "is a folder: embed_file embeds the FASTA files in it"),
        (
            [str(fasta)],
            "sequence 0 looks like a path .*x.fasta'.: pass one path alone, or several to embed_file",
        ),
        (["MKT", "x.fasta"], "sequence 1 looks like a path"),
        (["MKT", "data/x.fa.gz"], "sequence 1 looks like a path"),
        (["MKT", "/data/x"], "sequence 1 looks like a path"),
        ([fasta], "sequence 0 looks like a path"),
        ({"P1": "x.faa"}, "the sequence of 'P1' looks like a path"),
        ([">P1\nMKT\n"], "sequence 0 is text in FASTA"),
        (("P1", "MKTAYIAKQR"), "sequence 0 looks like an id .'P1'.: pass its letters"),
        (["P12345"], "sequence 0 looks like an id"),
        (one, "sequences is one SeqRecord: pass a list"),
        (Seq("MKT"), "sequences is one Seq: pass a list"),
        (b"MKT", "sequences is one bytes"),
        ([b"MKT"], "sequence 0 is a bytes"),
        (frame, "sequences is a data frame: pass the pairs of two of its columns"),
        (5, "sequences is a int: pass a list"),
        (["MKT", 5], "sequence 1 is a int"),
        (["MKT", None], "sequence 1 is a NoneType"),
        ([("P1", "MKT", 3)], "sequence 0 is a tuple of 3: pass pairs"),
        ([(1.5, "MKT")], "1.5 is no id: use text"),
        ([SeqRecord(Seq(None, 5), id="P1")], "the record 'P1' has a length and no letters"),
        ([SeqRecord(None, id="P1")], "the record 'P1' is a NoneType"),
    ]
    for proteins, message in cases:
        with pytest.raises(ValueError, match=message) as caught:
            embedder.embed(proteins)
        assert "\n" not in str(caught.value)


def test_what_a_policy_leaves_out_is_named_by_place_and_id(embedder, fasta):
    cases = [
        (["MKT", ""], "sequence 1 is left out: empty sequence; take it out"),
        ({"P1": "MKT", "P2": " "}, r"protein 1 \(P2\) is left out: empty sequence"),
        ([("P1", "***")], r"protein 0 \(P1\) is left out: no residues left"),
        ([SeqRecord(Seq("MK<mask>T"), id="P7")], r"protein 0 \(P7\) is left out: special token <mask>"),
        (["MKT:GAV"], "sequence 0 is left out: chain separators"),
    ]
    for proteins, message in cases:
        with pytest.raises(ValueError, match=message):
            embedder.embed(proteins)
    fasta.write_text(">P1\nMKT\n>P2\n\n")
    with pytest.raises(ValueError, match=r"x.fasta: record 2 \(P2\) is left out: empty sequence"):
        embedder.embed(fasta)
    fasta.write_text("MKT\n")
    with pytest.raises(ValueError, match=r"x.fasta: line 1 has text before the first '>'"):
        embedder.embed(fasta)
    with pytest.raises(ValueError, match=r"include=median is no choice: .*use one of mean, bos, per_tok$"):
        embedder.embed(["MKT"], include="median")
    with pytest.raises(ValueError, match="include must name each wanted representation once"):
        embedder.embed(["MKT"], include=[])
    with pytest.raises(ValueError, match="'arrow' is no library of data frames"):
        embedder.embed(["MKT"], as_frame="arrow")


def test_an_id_stays_as_it_was_given(embedder):
    names = ["a b", "sp|P12345|X", "", "ü", "P1", "P1"]
    frame = embedder.embed([(name, "MKT") for name in names], as_frame=True)
    assert list(frame["id"]) == names
    assert list(embedder.embed({7: "MKT"}, as_frame=True)["id"]) == ["7"]


def test_truncation_and_unknown_letters_are_said_with_their_ids(embedder, checkpoint_8m):
    long = {f"L{number}": "MKTAY" * 205 + "W" * number for number in range(7)}
    with pytest.warns(UserWarning, match="truncation_seq_length") as caught:
        vectors = embedder.embed({"S": "MKT", **long})
    (warning,) = caught
    assert str(warning.message) == (
        "7 of 8 proteins are longer than truncation_seq_length=1022 and embedded by their first residues "
        "alone (L0, L1, L2, L3, L4 and 2 more): Embedder(long='window') embeds all of them"
    )
    assert warning.filename == __file__
    np.testing.assert_array_equal(vectors[1], vectors[7])
    with pytest.warns(UserWarning, match=r"1 of 2 proteins have unknown letters, and X .* \(sequence_1\)"):
        embedder.embed(["MKT", "MJT"])
    with pytest.warns(UserWarning, match=r"1 of 1 proteins look like DNA \(gene\)"):
        embedder.embed({"gene": "ATGGCATTAGGC" * 3})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        embedder.embed(["mkt-AY*", "MKTX"])
    for policy, message in (
        ("skip", "is left out: too long"),
        ("fail", "use long=truncate, skip or window$"),
    ):
        strict = Embedder(
            "esm2_t6_8M_UR50D", weights=checkpoint_8m, device="cpu", truncation_seq_length=4, long=policy
        )
        with pytest.raises(ValueError, match=message):
            strict.embed(["MKT", "MKTAY"])
    whole = Embedder("esm2_t6_8M_UR50D", weights=checkpoint_8m, device="cpu", truncation_seq_length=None)
    with pytest.raises(ValueError, match="more letters than are looked at"):
        whole.embed(["M" * 1_000_001])


def test_a_progress_bar_is_shown_for_what_takes_long(embedder, monkeypatch, capsys):
    monkeypatch.setattr("dist_esm.embedder.BAR_SECONDS", 0.0)
    embedder.embed(["MKTAY" * 20] * 3 + ["GAV" * 30] * 3)
    assert "embedding: 100%" in capsys.readouterr().err
    embedder.embed(["MKTAY" * 20] * 3, progress=False)
    monkeypatch.setattr("dist_esm.embedder.BAR_SECONDS", 3.0)
    embedder.embed(["MKTAY" * 20] * 3)
    assert capsys.readouterr().err == ""
    monkeypatch.setitem(sys.modules, "tqdm", None)
    monkeypatch.setattr("dist_esm.embedder.find_spec", lambda name: None)
    embedder.embed(["MKT"])
    with pytest.raises(ValueError, match=r"progress=True needs tqdm: pip install 'dist_esm\[notebook\]'"):
        embedder.embed(["MKT"], progress=True)


def test_a_frame_without_its_library_is_one_line(embedder, monkeypatch):
    monkeypatch.setitem(sys.modules, "polars", None)
    with pytest.raises(ValueError, match=r"a data frame needs polars: pip install 'dist_esm\[notebook\]'"):
        embedder.embed(["MKT"], as_frame="polars")


KEYS = {"include": ["mean", "per_tok"], "format": "pt"}


@pytest.mark.parametrize("options", [{}, WINDOWS], ids=["truncate", "window"])
def test_embed_file_is_the_run_of_the_command_with_one_rank(checkpoint_8m, tmp_path, options):
    embedder = Embedder(
        "esm2_t6_8M_UR50D",
        weights=checkpoint_8m,
        device="cpu",
        toks_per_batch=300,
        repr_layers=[3, -1],
        **options,
    )
    run = embedder.embed_file(PROTEINS, tmp_path / "mine", **KEYS, verbosity="quiet")
    common = [
        f"input={PROTEINS}",
        MODEL,
        f"model.weights={checkpoint_8m}",
        "device=cpu",
        "toks_per_batch=300",
    ]
    common += [
        "repr_layers=[3,-1]",
        "include=[mean,per_tok]",
        *(f"{key}={value}" for key, value in options.items()),
    ]
    theirs = run_ranks(None, *common, f"output_dir={tmp_path / 'theirs'}", "ranks=1")
    assert theirs.returncode == 0, theirs.stderr
    assert digests(tmp_path / "mine") == digests(tmp_path / "theirs")
    assert len(digests(tmp_path / "mine")) == 4
    left = [{path.name for path in (tmp_path / name).iterdir()} for name in ("mine", "theirs")]
    assert left[0] == left[1]
    assert run.ids == load(tmp_path / "theirs").ids
    np.testing.assert_array_equal(run.vectors, load(tmp_path / "theirs").vectors)
    again = run_ranks(None, *common, f"output_dir={tmp_path / 'mine'}", "ranks=1")
    assert again.returncode == 0, "the command goes on with what embed_file did: " + again.stderr
    assert "4 of 4 files embedded (4 by earlier launches)" in again.stdout
    letters = [str(record.seq) for record in SeqIO.parse(PROTEINS / "medium.faa", "fasta")]
    position = run.positions(next(SeqIO.parse(PROTEINS / "medium.faa", "fasta")).id)[0]
    np.testing.assert_array_equal(run.residues(position), embedder.embed(letters[:1], "per_tok", -1)[0])


def test_embed_file_says_what_failed_and_what_is_no_key(embedder, tmp_path, capsys):
    inputs = tmp_path / "in"
    inputs.mkdir()
    (inputs / "good.fasta").write_text(">a\nMKTAY\n")
    (inputs / "bad.fasta").write_text("no FASTA\n")
    with pytest.raises(ValueError, match=r"^1 of 2 files failed, .*bad.fasta: line 1 has text before"):
        embedder.embed_file(inputs, tmp_path / "out")
    assert load(tmp_path / "out").ids == ["a"]
    for keys, message in (
        ({"fromat": "pt"}, r"there is no key fromat: did you mean format\?"),
        ({"format": "hdf5"}, r"format=hdf5 is no choice: did you mean h5\?"),
        ({"include": ["median"]}, "include=median is no choice"),
        ({"max_proteins_per_output": "many"}, "'many'.* could not be converted to Integer"),
        ({"max_proteins_per_output": 0}, "max_proteins_per_output=0 is too small: use 1 or more"),
        (
            {"model": "esm2_t12_35M_UR50D"},
            "model is no key for embed_file: it is settled when an Embedder is made",
        ),
        ({"ranks": 2}, "ranks is no key for embed_file: embed_file sets it itself"),
        ({"residues": {"unknown": "explode"}}, "explode"),
        ({"repr_layers": [9]}, "has no layer 9"),
    ):
        with pytest.raises(ValueError, match=message) as caught:
            embedder.embed_file(inputs / "good.fasta", tmp_path / "other", **keys)
        assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="nowhere"):
        embedder.embed_file(tmp_path / "nowhere.fasta", tmp_path / "other")
    (inputs / "odd.fasta").write_text(">a\nMKJ\n")
    with pytest.raises(ValueError, match="has letters outside the alphabet: 'J'"):
        embedder.embed_file(inputs / "odd.fasta", tmp_path / "odd", residues={"unknown": "fail"})
    with pytest.raises(ValueError, match=r"other settings \(include=\['mean'\] before, \['bos'\] now\)"):
        embedder.embed_file(inputs / "good.fasta", tmp_path / "out", include="bos")
    capsys.readouterr()


def test_embed_file_leaves_signals_logging_and_threads_to_the_program(embedder, fasta, tmp_path):
    import logging

    log = logging.getLogger("dist_esm")
    mine = logging.NullHandler()
    log.addHandler(mine)
    before = list(log.handlers), log.level, log.propagate
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    embedder.embed_file(fasta, tmp_path / "out", verbosity="quiet")
    results = []
    thread = threading.Thread(
        target=lambda: results.append(
            embedder.embed_file(str(fasta), str(tmp_path / "thread"), report="json")
        )
    )
    thread.start()
    thread.join()
    assert results[0].ids == ["P1", "P2", "P3"]
    assert not (tmp_path / "thread" / "report.html").exists()
    assert (list(log.handlers), log.level, log.propagate) == before
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    log.removeHandler(mine)


@pytest.fixture
def ctrl_c():
    """Ctrl-C as a program has it, also where the tests run in the background, in which shells ignore it."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
def test_an_interrupted_embed_file_goes_on_and_the_program_lives(embedder, tmp_path):
    inputs = tmp_path / "in"
    inputs.mkdir()
    for number in range(40):
        letters = "ACDEFGHIKL"[number % 10] * (number + 1)
        text = "".join(f">p{number}_{i}\n{'MKTAYIAKQR' * (10 + i)}{letters}\n" for i in range(8))
        (inputs / f"{number:02}.fasta").write_text(text)
    interrupt = threading.Thread(target=interrupt_when, args=(tmp_path / "out",))
    interrupt.start()
    with pytest.raises(KeyboardInterrupt):
        embedder.embed_file(inputs, tmp_path / "out", verbosity="quiet")
    interrupt.join()
    done = len(load(tmp_path / "out").ids)
    assert 0 < done < 320
    with pytest.raises(KeyboardInterrupt):  # Ctrl-C is the program's own again
        signal.raise_signal(signal.SIGINT)
    assert len(embedder.embed_file(inputs, tmp_path / "out", verbosity="quiet")) == 320
    assert main(["--version"]) == 0, "the command in the same program does not take that Ctrl-C for its own"


def interrupt_when(output_dir) -> None:
    """Send Ctrl-C once a first output is there."""
    deadline = time.monotonic() + 60
    while not any(output_dir.rglob("*_ESM.pt")):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGINT)


def test_it_lives_in_a_program_that_uses_hydra(tmp_path, checkpoint_8m):
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    program = f"""
import sys
import dist_esm.embedder
assert "hydra" not in sys.modules
from hydra import compose, initialize_config_dir
with initialize_config_dir({str(tmp_path)!r}, version_base="1.3"):
    embedder = dist_esm.embedder.Embedder("esm2_t6_8M_UR50D", weights={str(checkpoint_8m)!r}, device="cpu")
    run = embedder.embed_file({str(PROTEINS / "medium.faa")!r}, {str(tmp_path / "out")!r}, verbosity="quiet")
    assert compose("config").mine == 1
import torch
assert not torch.distributed.is_initialized()
print(embedder.embed(["MKT"]).shape, len(run.vectors), file=sys.stderr)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=120, env=environment()
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr.endswith("(1, 320) 8\n")
    assert not (tmp_path / "outputs").exists()


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("esm2_t33_650M_UR50", r"is no model: did you mean esm2_t33_650M_UR50D\?"),
        ("facebook/esm2_t6_8M_UR50D", r"is no model: did you mean esm2_t6_8M_UR50D\?"),
        ("650M", r"is no model: did you mean esm2_t33_650M_UR50D\?"),
        ("esm2-3b", r"is no model: did you mean esm2_t36_3B_UR50D\?"),
        ("esm1b_t33_650M_UR50S", "is not an ESM-2, and no other model is embedded here:"),
        ("esmc_600m", "is not an ESM-2, and no other model is embedded here:"),
        ("", "is no model:"),
    ],
)
def test_an_unknown_model_is_answered_with_those_that_there_are(name, problem):
    names = (
        "esm2_t6_8M_UR50D, esm2_t12_35M_UR50D, esm2_t30_150M_UR50D, esm2_t33_650M_UR50D, esm2_t36_3B_UR50D, "
    )
    with pytest.raises(
        ValueError, match=f"^model={name} {problem} use one of {names}esm2_t48_15B_UR50D, auto$"
    ):
        Embedder(name)


@pytest.mark.parametrize(
    ("given", "free", "rows"), [(None, 10**9, 50_688), (None, 10**11, None), (4096, 10**9, 4096)]
)
def test_packs_are_made_to_fit_a_gpus_free_memory(checkpoint_8m, monkeypatch, caplog, given, free, rows):
    """What a card has free is arranged, and no model is loaded: there is no GPU at hand."""
    loaded = []
    monkeypatch.setattr(setup, "device_memory", lambda device: Memory(10**11, free))
    monkeypatch.setattr(embedder_module, "choose_device", lambda *_: torch.device("cuda", 0))
    monkeypatch.setattr(embedder_module, "choose_kernels", lambda *_: PLAIN)
    monkeypatch.setattr(embedder_module, "build_engine", lambda config, *_, **__: loaded.append(config))
    Embedder("esm2_t6_8M_UR50D", weights=checkpoint_8m, dtype="fp16", toks_per_batch=given)
    assert [config.toks_per_batch for config in loaded] == [rows]
    said = [record.getMessage() for record in caplog.records]
    line = "packs of 50688 tokens, not 101376: larger ones do not fit in the 1 GB that are free"
    assert said == ([line] if rows == 50_688 else [])
