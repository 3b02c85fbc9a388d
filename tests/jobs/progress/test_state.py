"""Share done, speed and time left, of what the ranks say."""

from __future__ import annotations

import json

import pytest

from dist_esm.config import AssignBy
from dist_esm.distributed import World
from dist_esm.jobs.progress.lines import duration, line_of, percent
from dist_esm.jobs.progress.state import Totals, Tracker, as_json, totals_of
from dist_esm.planning.agree import agree_on_plan
from dist_esm.planning.assign import unit_cost
from dist_esm.planning.inputs import find_files
from dist_esm.progress import Phase, Progress, RankProgress
from helpers.standin import WIDTH, embed_directory, make_config


def rank(number: int, **values: object) -> RankProgress:
    return RankProgress(rank=number, phase=Phase.embedding.name, **values)  # type: ignore[arg-type]


def test_share_is_of_the_cost_and_speed_of_the_last_minute():
    tracker = Tracker()
    tracker.totals = Totals(10, 1000, cost=1000, files_before=2, proteins_before=100, cost_before=200)
    for second in range(100):
        speed = 10 if second < 30 else 2  # cost a second of both ranks together
        cost = sum(10 if past < 30 else 2 for past in range(second))
        ranks = [
            rank(0, cost=cost / 2, tokens=second * 100, files=1.5),
            rank(1, cost=cost / 2, tokens=second * 300),
        ]
        overall = tracker.look(ranks, float(second))
    assert overall.share == pytest.approx((200 + cost) / 1000)
    assert overall.seconds_left == pytest.approx((1000 - 200 - cost) / speed, rel=0.05)
    assert overall.tokens_per_second == pytest.approx(400)
    assert overall.rank_tokens_per_second == pytest.approx({0: 100, 1: 300})
    assert (overall.files, overall.proteins) == (3, 100)


def test_the_run_is_at_what_its_last_rank_is_at():
    ranks = [
        RankProgress(phase="embedding"),
        RankProgress(rank=1, phase="loading"),
        RankProgress(phase="\x1b[31m"),
    ]
    assert Tracker().look(ranks, 1.0).phase == "loading"
    assert Tracker().look([], 1.0).phase == "starting"


def test_nothing_is_said_of_speed_before_there_is_one():
    tracker = Tracker()
    overall = tracker.look([RankProgress(phase="loading")], 3.0)
    assert (overall.share, overall.tokens_per_second, overall.seconds_left) == (None, None, None)
    assert line_of(overall, None) == "loading the model, 3 s so far"
    content = as_json(overall, None, [RankProgress(phase="loading")], status="running")
    assert json.loads(json.dumps(content))["of_files"] is None


def test_words():
    assert [duration(seconds) for seconds in (0.4, 59.4, 61, 3600 * 3 + 65, 86400 * 3 + 3600 * 5)] == [
        "0 s",
        "59 s",
        "1 min 01 s",
        "3 h 01 min",
        "3 d 5 h",
    ]
    assert [percent(share) for share in (0, 0.34567, 0.99999, 1)] == ["0.0%", "34.6%", "99.9%", "100%"]


def test_all_that_is_done_comes_to_the_whole(tmp_path):
    """Truncated, skipped, identical and failed records included; a second launch counts the first one's."""
    folder = tmp_path / "in"
    folder.mkdir()
    letters = "ACDEFGHIKLMNPQRSTVWY"
    for file in range(6):
        records = [f">{i}\n{letters[file:] * (i % 9 + 1)}\n" for i in range(20)]
        (folder / f"{file}.fasta").write_text("".join([*records, ">empty\n\n", records[0]]))
    (folder / "no.fasta").write_text("no header\n")
    config = make_config(str(folder), tmp_path / "out", truncation_seq_length=60)
    plan = agree_on_plan(config, find_files([str(folder)]), [], World(None, 0, 1, 0, 1))
    totals = totals_of(plan, WIDTH)
    assert totals.cost == sum(unit_cost(unit, AssignBy.flops, WIDTH) for unit in plan.units)
    for before in (0, 6):
        embed_directory(folder, tmp_path / "out", truncation_seq_length=60)
        state = json.loads((tmp_path / "out" / ".dist_esm" / "progress.json").read_text())
        assert (state["status"], state["share"]) == ("partial", 1.0)
        assert (state["files"], state["of_files"], state["failed"]) == (6, 7, 1)
        assert (state["proteins"], state["of_proteins"]) == (6 * 22, 6 * 22)
        assert state["ranks"][0]["files"] == 6 - before


def test_phases_take_the_time_between_them():
    progress, entered = Progress(), []
    progress.on_phase = entered.append
    progress.enter(Phase.counting)
    progress.enter(Phase.embedding)
    assert entered == [Phase.counting, Phase.embedding]
    assert set(progress.seconds) == {"starting", "counting"}
    assert progress.now.phase == "embedding"
