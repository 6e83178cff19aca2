"""Every reveal order, every use of records, every rule: the output distribution is the target's, or
the combination is refused and, where it is forced, measurably biased. docs/losslessness.md has the
same table; `python -m tests.test_losslessness` prints it.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

import pytest

from specdiff_kernels import Reveal, use_backend
from tests.worlds import SCHEDULES, Way, World

DOCUMENT = Path(__file__).parents[1] / "docs" / "losslessness.md"
SEEDS = range(3)
RULES = ("token", "block")
# what is asked for, and how to do it all the same if it is refused
WAYS = {
    "running max": (Way("running-max"), Way("running-max", forget=True)),
    "final": (Way("final"), Way("final")),
    "one-hot": (Way("one-hot"), Way("one-hot")),
    "everywhere": (Way("entangled"), Way("forced")),
    "entangled": (
        Way("entangled", hot_start="entangled"),
        Way("forced", hot_start="entangled"),
    ),
    "recycled": (Way(hot_start="recycled"), Way(hot_start="recycled")),
}
MONOTONE = ("one step", "chunks", "sequential head")
EXACT, BIASED = 1e-12, 1e-3


@cache
def measured(schedule: str, name: str, rule: str) -> tuple[bool, float]:
    """Whether a combination is refused, and its total variation, at most over the seeds."""
    asked, forced = (way._replace(rule=rule) for way in WAYS[name])
    try:
        return False, max(world(schedule, seed).distance(asked) for seed in SEEDS)
    except ValueError as error:
        assert "would bias the output" in str(error)
        return True, max(world(schedule, seed).distance(forced) for seed in SEEDS)


@cache
def world(schedule: str, seed: int) -> World:
    return World(2, schedule, seed)


def cell(refused: bool, distance: float) -> str:
    size = "0" if distance < EXACT else f"{distance:.3f}"
    return f"refused ({size})" if refused else size


def table() -> list[list[str]]:
    """Schedules by uses of records, token rule / block rule."""
    head = ["order", *WAYS]
    rows = [
        [schedule, *(" / ".join(cell(*measured(schedule, name, rule)) for rule in RULES)
                     for name in WAYS)]
        for schedule in SCHEDULES
    ]  # fmt: skip
    return [head, *rows]


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("name", WAYS)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_exact_or_refused(schedule, name, rule):
    refused, distance = measured(schedule, name, rule)
    assert refused or distance < EXACT


@pytest.mark.parametrize("schedule", [s for s in SCHEDULES if s not in MONOTONE])
def test_what_is_refused_is_biased(schedule):
    """Forced, every refused combination leaves the target's distribution; for monotone orders q
    everywhere is what the running max gives anyway."""
    cells = {(name, rule): measured(schedule, name, rule) for name in WAYS for rule in RULES}
    refused = {key: distance for key, (no, distance) in cells.items() if no}
    assert all(distance > BIASED for distance in refused.values()), refused
    value_dependent = schedule in ("confidence", "remasking")
    expected = {("everywhere", "token"), ("everywhere", "block"), ("entangled", "block")}
    if value_dependent:
        expected |= {("running max", "token"), ("running max", "block"), ("entangled", "token")}
    assert set(refused) == expected


@pytest.mark.parametrize("name", ["running max", "final", "one-hot", "entangled", "recycled"])
@pytest.mark.parametrize("schedule", ["random", "remasking"])
def test_the_reference_too(schedule, name):
    with use_backend("reference"):
        try:
            assert World(2, schedule, seed=5).distance(WAYS[name][0]) < EXACT
        except ValueError as error:
            assert "would bias" in str(error)
            assert schedule == "remasking" and name in ("running max", "entangled")


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("schedule", ["chunks", "first-hitting", "confidence", "sequential head"])
def test_three_tokens(schedule, rule):
    assert World(3, schedule, seed=3).distance(Way(rule=rule)) < EXACT


@pytest.mark.parametrize("way", [Way(), Way(rule="block"), Way(hot_start="entangled")], ids=str)
@pytest.mark.parametrize("order", [(1, 2, 0, 3), (3, 1, 0, 2), (2, 3, 1, 0)], ids=str)
def test_four_positions(order, way):
    one_by_one = [Reveal.chunk(i, i + 1) for i in order]
    assert World(2, one_by_one, seed=0, length=4).distance(way) < EXACT


def test_what_was_kept_once_has_to_stay():
    """Kept for an examined token's sake, then dropped because a later round has no such token."""
    order = [Reveal.chunk(i, i + 1) for i in (1, 2, 0)]
    kept, anew = (Way(hot_start=hot) for hot in ("entangled", "entangled anew"))
    assert max(World(2, order, seed).distance(kept) for seed in SEEDS) < EXACT
    assert max(World(2, order, seed).distance(anew) for seed in SEEDS) > BIASED


@pytest.mark.parametrize("rule", RULES)
def test_a_sequential_head_s_record_is_the_corrected_distribution(rule):
    """The token was not drawn from the distribution before the correction."""
    corrected, uncorrected = Way(rule=rule), Way(rule=rule, uncorrected=True)
    assert max(world("sequential head", seed).distance(corrected) for seed in SEEDS) < EXACT
    assert max(world("sequential head", seed).distance(uncorrected) for seed in SEEDS) > BIASED


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("schedule", ["one step", "chunks", "random", "sequential head"])
def test_adaptive_lengths(schedule, rule):
    """K may follow entropies from before the sampling, never a value that it withholds."""
    before, after = (Way(rule=rule, withhold=what) for what in ("entropy", "value"))
    assert World(2, schedule, seed=1).distance(before) < EXACT
    assert World(2, schedule, seed=1).distance(after) > BIASED


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("schedule", ["right first", "confidence"])
def test_entangled_drafts_under_other_records(schedule, rule):
    """The record that `verify` chooses is exact. The running max is refused, as it would bias."""
    way = Way(rule=rule, hot_start="entangled")
    assert world(schedule, 0).distance(way) < EXACT
    with pytest.raises(ValueError, match="would bias the output"):
        world(schedule, 0).distance(way._replace(record="running-max"))
    forced = way._replace(record="running-max", forget=True)
    assert max(world(schedule, seed).distance(forced) for seed in SEEDS) > BIASED


def test_adaptive_lengths_and_entangled_tokens_do_not_go_together():
    """A token that another was conditioned on, withheld and then overwritten."""
    way = Way(hot_start="entangled", withhold="entropy")
    assert max(World(2, "right first", seed).distance(way) for seed in SEEDS) > BIASED


def test_the_document_shows_these_figures():
    text = DOCUMENT.read_text(encoding="utf-8")
    rows = [[part.strip() for part in line.strip("|").split("|")]
            for line in re.findall(r"^\|.*\|$", text, re.M)]  # fmt: skip
    start = rows.index(table()[0])
    assert [rows[start], *rows[start + 2 : start + 2 + len(SCHEDULES)]] == table()


if __name__ == "__main__":
    head, *rows = table()
    for row in (head, ["---"] * len(head), *rows):
        print("|", " | ".join(row), "|")
