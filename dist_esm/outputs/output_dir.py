"""An output directory in the hands of one launch: locked, compared, cleaned, its journal read.

Below it, ``.dist_esm`` holds what is not an output:

- ``lock``: held by rank 0 while a launch works
- ``settings.json``: what one directory must not mix, for a resume to compare
- ``config.json``: the whole configuration of the last launch
- ``journal/``: a file for each launch and rank, of what is finished
- ``launches/``: a file for each launch, of the inputs that it was given, its plan and settings
- ``events/``: a file for each launch and rank, of what it began and ended, and when
- ``logs/``: a log for each launch and rank
- ``progress.json``: how far the last launch is
- ``shards/``: what units of cut files contribute, until it is joined
- ``scratch/``: a folder for each launch and rank, of files that are not committed yet
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import uuid
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from filelock import FileLock, Timeout

from dist_esm.atomic import atomically, discard, is_leftover, refuse_to_replace, remove
from dist_esm.config import Config, plain_values
from dist_esm.launcher import num_restarts
from dist_esm.names import few, number_of_part, output_path, part_ending
from dist_esm.outputs import events, in_hand, journal, launches
from dist_esm.outputs.events import Events
from dist_esm.outputs.format_version import FORMAT_VERSION, REMEDY, read_json, version_of
from dist_esm.outputs.formats.registry import FORMATS, format_at
from dist_esm.outputs.in_hand import Deaths, InHand
from dist_esm.outputs.journal import Entry, Journal
from dist_esm.outputs.placed import SUFFIX, output_in_making, part_from_finished
from dist_esm.outputs.trust import LOOSE, SHARDS, is_file_of, refuse_linked_folders, refuse_strange_files
from dist_esm.types import FastaFile, WrittenFile
from dist_esm.wire import decode, encode

if TYPE_CHECKING:
    from dist_esm.distributed import World

log = logging.getLogger("dist_esm")

LOCK_SECONDS = 5.0
"""A run that is being killed has so long to end."""
REPORTS = ("report.json", "report.html", "failed_files.txt", "verify.json")
"""Files at the top of the directory that speak of what was done."""
RECORDS = ".records.tsv"
"""Ends the name of what says which records of an output did not come as they should."""
UNNAMED = {"numerics": 1, "id": "word", "compression": "none"}
"""What settings were before they had a name."""


class OutputDir:
    """The output directory, as one rank of one launch knows and owns it.

    Attributes
    ----------
    path : Path
        The directory.
    launch : int
        Number of this launch; later launches have higher ones.
    entries : list of Entry
        What the journal said at the start, the oldest first; [] under ``resume=false``.
    journal : Journal
        This rank's, for appending.
    scratch : Path
        A folder that only this rank of this launch writes.
    shards : Path
        Where shards wait to be joined.
    deaths : dict of str to Deaths
        Units whose processes died in earlier launches.
    in_hand : InHand
        This rank's notes of what may kill its process.
    events : Events
        This rank's record of what it begins and ends.
    """

    def __init__(self, path: Path, launch: int, rank: int, entries: Sequence[Entry]) -> None:
        self.path = path
        self.launch = launch
        self.rank = rank
        self.entries = list(entries)
        self.journal = Journal(path, launch, rank)
        self.scratch = inside(path) / "scratch" / f"{launch:020d}.{rank:05d}"
        self.shards = inside(path) / SHARDS[0]
        self.deaths: dict[str, Deaths] = {}
        self.in_hand = InHand(path, launch, rank)
        self.events = Events(path, launch, rank)

    @classmethod
    @contextmanager
    def open(
        cls, config: Config, settings: dict[str, Any], world: World, weights_in_words: str = ""
    ) -> Iterator[OutputDir]:
        """Take the directory for a launch. All ranks call it: all get it, or all are refused.

        Parameters
        ----------
        config
            Its `output_dir` is opened, to go on from what is there or, under `resume=false`, to start over.
        settings
            All that one directory must not mix.
        world
            The ranks; the first holds the lock, and cleans.
        weights_in_words
            What the weights are, for the message that refuses to mix two.

        Raises
        ------
        RefusedError
            On every rank, if the directory cannot be written, another launch holds it, it holds work done
            under other settings, or what is in it cannot be understood.
        """
        with ExitStack() as held:
            prepared = world.all_or_none(_prepare, config, settings, weights_in_words, world.is_main, held)
            told = {"launch": prepared.launch, "deaths": prepared.deaths} if prepared else None
            (first, *_) = world.exchange(encode(told).decode())
            told = decode(first.encode(), Deaths)
            opened = world.all_or_none(
                cls._enter, config, told["launch"], world.rank, prepared and prepared.entries
            )
            opened.deaths = told["deaths"]
            try:
                yield opened
            finally:
                opened._leave()

    @classmethod
    def _enter(cls, config: Config, launch: int, rank: int, entries: list[Entry] | None) -> OutputDir:
        if entries is None:
            entries = journal.read(config.output_dir) if config.resume else []
        opened = cls(config.output_dir, launch, rank, entries)
        opened.scratch.mkdir(parents=True)
        return opened

    def _leave(self) -> None:
        self.journal.close()
        self.events.close()
        discard(self.scratch)  # what a thread or process that ended early left in there with it
        with suppress(OSError):  # unless other ranks have theirs there
            self.scratch.parent.rmdir()

    def record_inputs(self, files: Sequence[FastaFile], about: Mapping[str, Any] | None = None) -> None:
        """Write down, on rank 0, which inputs this launch was given, in input order, and what else a report
        says of it.

        Raises
        ------
        OSError
            On rank 0, if it cannot be written.
        ValueError
            On rank 0, if an output would be written outside the directory, through a link.
        """
        if self.rank == 0:
            refuse_linked_folders(self.path, [file.output for file in files])
            launches.record_launch(self.path, self.launch, files, self.scratch, about or {})

    def entries_of_this_launch(self) -> list[Entry]:
        """Read what all ranks of this launch have finished so far."""
        return journal.read(self.path, self.launch)

    def remove_superseded(self, finished: Collection[str], outputs: Collection[str]) -> list[str]:
        """Remove what earlier launches made of files whose text has changed since, on rank 0.

        Most of it was written over. What is left has another name: parts with numbers that are no longer
        there, or a whole output beside parts.

        Parameters
        ----------
        finished
            Outputs, without suffix, of the files that are embedded from their beginning to their end.
        outputs
            Paths of all outputs that stay.

        Returns
        -------
        list of str
            What was removed.

        Raises
        ------
        OSError
            If something cannot be removed.
        ValueError
            If it is outside the directory, or no output of this package; then nothing is removed.
        """
        superseded = {
            written.path: entry.output
            for entry in self.entries
            if entry.output in finished and not entry.is_shard
            for written in entry.written
            if written.path not in outputs and os.path.lexists(self.path / written.path)
        }
        refuse_linked_folders(self.path, superseded)
        for path, output in superseded.items():
            refuse_to_remove(self.path, path, output)
        for path, output in superseded.items():
            records_tsv_of(self.path / output, path).unlink(missing_ok=True)
            remove(self.path / path)
        return list(superseded)

    def remove_useless_shards(self) -> None:
        """Remove shards that nothing will be made of, on rank 0 and when all ranks are done.

        There are such if a file that is complete now was cut in other places before, or not at all.

        Raises
        ------
        OSError
            If one cannot be removed.
        """
        if any(path.is_file() for name in SHARDS for path in (inside(self.path) / name).rglob("*")):
            remove_useless_shards(self.path, journal.read_by_launch(self.path))


def inside(output_dir: Path) -> Path:
    """Return the folder of an output directory that holds what is not an output."""
    return output_dir / ".dist_esm"


def make_output_dir(output_dir: Path) -> None:
    """Create the output directory and try to write to it.

    Raises
    ------
    ValueError
        If it cannot be written to, or is not as runs leave it (see `refuse_strange_files`).
    """
    refuse_strange_files(output_dir)
    probe = inside(output_dir) / f"writable.{uuid.uuid4().hex}"
    try:
        probe.parent.mkdir(parents=True, exist_ok=True)
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise ValueError(unwritable(output_dir, error.strerror)) from None


def nearest_folder(output_dir: Path) -> Path:
    """Return the directory, or what is there of the path to it."""
    path = output_dir.absolute()
    return next(folder for folder in (path, *path.parents) if os.path.lexists(folder))


def refuse_unwritable(output_dir: Path) -> None:
    """Make sure that `make_output_dir` can do its work, without doing it, and that no run holds the
    directory.

    A file system that has no size is tried with a folder that is removed at once; all others are asked.

    Raises
    ------
    ValueError
        If it cannot be written to, is not as runs leave it, or is in use.
    """
    refuse_strange_files(output_dir)
    path = inside(output_dir) if inside(output_dir).is_dir() else nearest_folder(output_dir)
    number = 0 if path.is_dir() else errno.ENOTDIR
    if not number and not os.access(path, os.W_OK | os.X_OK):
        number = errno.EROFS if os.statvfs(path).f_flag & os.ST_RDONLY else errno.EACCES
    if not number and not os.statvfs(path).f_blocks:  # such as /proc, which takes nothing, whatever it says
        probe = path / f"writable.{uuid.uuid4().hex}"
        try:
            probe.mkdir()
            probe.rmdir()
        except OSError as error:
            number = error.errno or errno.EIO
    if number:
        raise ValueError(unwritable(output_dir, os.strerror(number)))
    with suppress(FileNotFoundError), open(inside(output_dir) / "lock", "rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(in_use(output_dir)) from None


def unwritable(output_dir: Path, reason: str | None) -> str:
    """Say that the directory cannot be written to."""
    return f"output_dir={output_dir} cannot be written to ({reason}): name a directory that can"


def in_use(output_dir: Path) -> str:
    """Say that another run holds the directory."""
    return f"output_dir={output_dir} is in use by another run: wait for its end, or name another output_dir"


class Prepared(NamedTuple):
    """The directory as rank 0 found it."""

    launch: int
    entries: list[Entry]
    deaths: dict[str, Deaths]


def _prepare(
    config: Config, settings: dict[str, Any], weights_in_words: str, is_main: bool, held: ExitStack
) -> Prepared | None:
    """Do rank 0's part of `OutputDir.open`; None on other ranks."""
    if not is_main:
        return None
    output_dir = config.output_dir
    make_output_dir(output_dir)
    held.enter_context(lock(output_dir))
    launch = launches.next_launch(output_dir)
    by_launch = journal.read_by_launch(output_dir)
    entries = [entry for launched in by_launch for entry in launched]
    if config.resume:
        check_settings(output_dir, settings, entries, weights_in_words)
    else:
        start_over(output_dir, entries)
        in_hand.forget(output_dir)
        by_launch, entries = [], []
    was_restarted = num_restarts() > 0
    deaths = in_hand.collect(output_dir, was_restarted)
    clean(output_dir, by_launch)
    journal.folder(output_dir).mkdir(exist_ok=True)
    content = {"format": FORMAT_VERSION, "settings": settings, "weights_in_words": weights_in_words}
    _write_json(inside(output_dir) / "settings.json", content)
    _write_json(inside(output_dir) / "config.json", plain_values(config))
    return Prepared(launch, entries, deaths)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    with atomically(path) as temporary:
        temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


@contextmanager
def lock(output_dir: Path) -> Iterator[None]:
    """Hold the directory for this launch until the block or the process ends.

    Raises
    ------
    ValueError
        If another launch holds it, after a wait in which one that is being killed may end.
    """
    try:
        held = FileLock(inside(output_dir) / "lock", timeout=LOCK_SECONDS)
        held.acquire()
    except Timeout:
        raise ValueError(in_use(output_dir)) from None
    except NotImplementedError:
        raise ValueError(
            f"output_dir={output_dir} is on a file system without locks: name a directory on another"
        ) from None
    try:
        yield
    finally:
        held.release()


def read_settings(output_dir: Path) -> dict[str, Any] | None:
    """Read the settings that the work in a directory was done under; None if none was begun.

    Raises
    ------
    ValueError
        If they cannot be understood.
    """
    path = inside(output_dir) / "settings.json"
    if not path.exists():
        return None
    content = read_json(path)
    is_bare = (
        isinstance(content, dict) and "settings" not in content
    )  # version 1, whose `format` is the outputs'
    if not is_bare:
        version_of(content, path)
    settings: Any = content if is_bare else content["settings"]
    if not isinstance(settings, dict):
        raise ValueError(f"{path} holds no settings: {REMEDY}")
    return settings


def read_weights(output_dir: Path) -> str:
    """Read what the weights were that the work in a directory was done with, in words; "" if it is not known.

    Raises
    ------
    ValueError
        If the settings cannot be understood.
    """
    path = inside(output_dir) / "settings.json"
    content = read_json(path) if path.exists() else None
    return str(content.get("weights_in_words", "")) if isinstance(content, dict) else ""


def check_settings(
    output_dir: Path, settings: dict[str, Any], entries: Sequence[Entry], weights_in_words: str = ""
) -> None:
    """Refuse to mix settings in one output directory.

    Parameters
    ----------
    output_dir
        The directory.
    settings
        Of the launch that begins.
    entries
        What the journal says is done; without any, there is nothing to mix with.
    weights_in_words
        What the weights of this launch are: a fingerprint tells nobody which file to name.

    Raises
    ------
    ValueError
        If the work was done under other settings, in one line that names what changed.
    """
    recorded = read_settings(output_dir)
    if recorded is None or not entries:
        return
    before = {**UNNAMED, **recorded}
    now = {**UNNAMED, **json.loads(json.dumps(settings))}
    words = {"weights": (read_weights(output_dir), weights_in_words)}
    changed = [
        f"{key}={_shown(before.get(key), was)} before, {_shown(now.get(key), is_now)} now"
        for key in {**before, **now}
        if before.get(key) != now.get(key)
        for was, is_now in [words.get(key, ("", ""))]
    ]
    if changed:
        remedy = "name another output_dir, or start over with resume=false"
        raise ValueError(
            f"output_dir={output_dir} holds embeddings made under other settings "
            f"({'; '.join(changed)}): {remedy}"
        )


def _shown(value: Any, words: str) -> str:
    return f"{value!r} ({words})" if words else repr(value)


def start_over(output_dir: Path, entries: Sequence[Entry]) -> None:
    """Forget all that was done: remove what speaks of it, the outputs that the journal lists, and the
    journal, in this order.

    Raises
    ------
    ValueError
        If an output is outside the directory, or is none; then nothing is removed.
    """
    listed = {
        written.path: entry.output
        for entry in entries
        if not entry.is_shard
        for written in entry.written
        if os.path.lexists(output_dir / written.path)
    }
    refuse_linked_folders(output_dir, [*listed, *(entry.output for entry in entries)])
    for path, output in listed.items():
        refuse_to_remove(output_dir, path, output)
    outputs = list(listed)
    if outputs:
        log.warning(
            "resume=false: starting over, %d finished outputs in %s are removed: %s",
            len(outputs),
            output_dir,
            few(outputs),
        )
    for name in REPORTS:
        (output_dir / name).unlink(missing_ok=True)
    for path in outputs:
        remove(output_dir / path)
    for entry in entries:
        stem = output_dir / entry.output
        of_parts = (records_tsv_of(stem, written.path) for written in entry.written)
        for records_tsv in {output_path(stem, RECORDS), *of_parts}:
            records_tsv.unlink(missing_ok=True)
    for record in [
        *launches.launch_files(output_dir),
        *journal.folder(output_dir).glob("*.jsonl"),
        *events.folder(output_dir).glob("*.jsonl"),
        *(inside(output_dir) / "logs").glob("*.log"),
    ]:
        record.unlink()


def records_tsv_of(stem: Path, output: str) -> Path:
    """Return the path of the records.tsv of an output, given its file's output without suffix."""
    number = number_of_part(output)
    return output_path(stem, ("" if number is None else part_ending(number)) + RECORDS)


def refuse_to_remove(output_dir: Path, path: str, output: str) -> None:
    """Refuse to remove what is no output, or a folder that holds more than embeddings.

    Parameters
    ----------
    output_dir
        The directory.
    path, output
        The path of a file or folder, and of the output, without suffix, that the journal calls it a part of.

    Raises
    ------
    ValueError
        If it is something else.
    """
    full = output_dir / path
    if not is_file_of(output, path):
        raise ValueError(f"the journal calls {full} an output, and it is none: {REMEDY}")
    if full.is_dir() and not full.is_symlink():
        # Of a folder that no format knows, no format's marks are all there.
        known = format_at(full) or next(folder for folder in FORMATS.values() if folder.is_folder)
        try:
            refuse_to_replace(full, known.codec.marks)
        except FileExistsError as error:
            raise ValueError(str(error)) from None


def clean(output_dir: Path, by_launch: Sequence[Sequence[Entry]]) -> None:
    """Remove what dead launches left: their scratch folders, and shards that nothing will be made of.

    Nothing else is touched: neither files of others that look temporary, nor a directory of another run below
    this one.

    Parameters
    ----------
    output_dir
        The directory, which the caller holds.
    by_launch
        What the journal says, launch by launch.
    """
    shutil.rmtree(inside(output_dir) / "scratch", ignore_errors=True)
    for folder, names in (
        (output_dir, (*REPORTS, "selfcheck.json")),
        (inside(output_dir), ("settings.json", "config.json", "progress.json", in_hand.RECORD.name)),
    ):
        for path in folder.glob(".*.tmp"):
            if is_leftover(path, names):
                discard(path)
    for path in filter(Path.exists, remove_useless_shards(output_dir, by_launch)):
        part_from_finished(path)


def remove_useless_shards(output_dir: Path, by_launch: Sequence[Sequence[Entry]]) -> set[Path]:
    """Remove shards that nothing will be made of, and return the outputs in the making of the others."""
    kept = {output_dir / path for path in _shards_to_join(output_dir, by_launch)}
    outputs = {output_in_making(shard) for shard in kept}
    for folder in (inside(output_dir) / name for name in SHARDS):
        for path in [path for path in folder.rglob("*.pt") if path not in kept]:
            path.unlink()
        for path in [*folder.glob(f"*{SUFFIX}*"), *folder.glob(f"*{LOOSE}")]:
            if path not in outputs and path not in kept:
                remove(path)
    return outputs


def _shards_to_join(output_dir: Path, by_launch: Sequence[Sequence[Entry]]) -> set[str]:
    """Return the paths of shards that an entry speaks of and that may be joined yet.

    Some are joined already, by their launch or a later one, as a kill may come before they are removed; of
    others a later launch has made the output otherwise. What an earlier launch joined was edited or damaged
    since, and its text was embedded again.
    """
    entries = [entry for launch in by_launch for entry in launch]
    launches = [number for number, launch in enumerate(by_launch) for _ in launch]
    cut = {entry.output for entry in entries if entry.is_shard}
    latest = {
        entry.output: place
        for place, entry in enumerate(entries)
        if entry.output in cut
        and entry.is_whole
        and not entry.is_shard
        and _is_there(output_dir, entry.written[0])
    }
    joined = {
        (entry.output, text): launch
        for launch, entry in zip(launches, entries, strict=True)
        if entry.is_joined and _is_there(output_dir, entry.written[0])
        for text in zip(entry.slices, entry.digests, strict=True)
    }
    return {
        written.path
        for place, (launch, entry) in enumerate(zip(launches, entries, strict=True))
        if entry.is_shard
        and place > latest.get(entry.output, -1)
        and launch > joined.get((entry.output, (entry.slices[0], entry.digests[0])), -1)
        for written in entry.written
    }


def _is_there(output_dir: Path, written: WrittenFile) -> bool:
    path = output_dir / written.path
    return path.is_dir() or (path.is_file() and path.stat().st_size == written.num_bytes)
