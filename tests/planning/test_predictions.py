"""What is kept of a pair's costs, and what is made of them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace

import pytest

from specdiff import Decoder, Sampling, Target
from specdiff.drafters import PromptLookup
from specdiff.files import stamped
from specdiff.planning.costs import PLAIN, Costs, Plan, kept_costs
from specdiff.planning.predictions import draw, measured_speed_ups, needs, predictions
from specdiff.theory import best_plan, speed_up
from tests.tiny import tiny_model

COSTS = Costs(
    1,
    [PLAIN, *(Plan(k, T) for T in (1, 2) for k in (2, 4, 8))],
    [0.0, 0.2, 0.2, 0.2, 0.4, 0.4, 0.4],
    [2.0, 2.2, 2.4, 2.8, 2.2, 2.4, 2.8],
    {1: [30, 20, 9, 4], 2: [30, 24, 20, 18]},
    {1: [20, 9, 4, 2], 2: [24, 20, 18, 15]},
)


@pytest.fixture(scope="module")
def decoder():
    return Decoder(Target(tiny_model("llama")), PromptLookup())


def test_costs_are_kept_for_each_way_to_decode(decoder, tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDIFF_HOME", str(tmp_path))
    calls = []

    def measure(decoder, prompts, *, batch, **options):
        calls.append(options)
        return replace(COSTS, batch=batch)

    monkeypatch.setattr("specdiff.planning.costs.measure", measure)
    names = {"target": "some-model"}
    assert kept_costs(decoder, [[1]], names) == COSTS == kept_costs(decoder, [[1]], names)
    assert len(calls) == 1
    ways = [
        {"batch": 2}, {"ks": (4,)}, {"steps": (2,)}, {"sampling": Sampling(1.0)}, {"again": True}
    ]  # fmt: skip
    for number, way in enumerate(ways, 2):
        kept_costs(decoder, [[1]], names, **way)
        assert len(calls) == number, way
    kept_costs(decoder, [[1]], {"target": "another"})
    monkeypatch.setenv("SPECDIFF_BACKEND", "reference")
    kept_costs(decoder, [[1]], names)
    assert len(calls) == len(ways) + 3
    assert len(list((tmp_path / "plans").iterdir())) == len(calls) - 1  # one was written again


@pytest.mark.parametrize("content", ["", '{"plans": [], "examined": []}', "short"])
def test_costs_that_cannot_be_read_are_measured_again(decoder, tmp_path, monkeypatch, content):
    """They are no more than kept: nothing is lost but time."""
    monkeypatch.setenv("SPECDIFF_HOME", str(tmp_path))
    monkeypatch.setattr("specdiff.planning.costs.measure", lambda *args, **options: COSTS)
    kept_costs(decoder, [[1]], {})
    (file,) = (tmp_path / "plans").iterdir()
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | {"draft": [0.0]}) if content == "short" else content)
    with pytest.warns(UserWarning, match="holds no costs .*; measured anew"):
        assert kept_costs(decoder, [[1]], {}) == COSTS
    assert json.loads(file.read_text()) == whole


def test_costs_that_cannot_be_kept_are_used(decoder, tmp_path, monkeypatch):
    (tmp_path / "plans").write_text("not a folder")
    monkeypatch.setenv("SPECDIFF_HOME", str(tmp_path))
    monkeypatch.setattr("specdiff.planning.costs.measure", lambda *args, **options: COSTS)
    with pytest.warns(UserWarning, match="costs are not kept"):
        assert kept_costs(decoder, [[1]], {}) == COSTS


def test_a_folder_that_changes_is_another(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    before = stamped(str(tmp_path))
    assert before == stamped(str(tmp_path)) and before[0] == str(tmp_path)
    (tmp_path / "config.json").write_text("{ }")
    assert stamped(str(tmp_path)) != before
    assert stamped("smollm2-135m") == ["smollm2-135m"]


def test_predictions_are_the_theorys():
    rows = predictions(COSTS)
    assert {row.plan for row in rows} == set(COSTS.plans)
    assert [row.speed_up for row in rows] == sorted((row.speed_up for row in rows), reverse=True)
    chances = {T: [mean for mean, _ in COSTS.acceptances(T, 8)] for T in (1, 2)}
    for row in rows:
        k, T = row.plan
        if k == 0:
            assert row == (PLAIN, 0, 1, 1, 1)
            continue
        assert row.speed_up == speed_up(chances[T][:k], 0.1 * T, 1 + 0.05 * k)
    best = best_plan(chances, lambda T, K: 0.1 * T, lambda K: 1 + 0.05 * K)
    assert rows[0].speed_up == max(row.speed_up for row in rows) <= best.speed_up


def test_needs_are_met_and_no_less_would_do():
    by_plan = {row.plan: row for row in predictions(COSTS)}
    two, four, eight = needs(COSTS)
    for need in (two, four):
        alpha, plan = need.acceptance
        row = by_plan[plan]
        assert speed_up([alpha] * plan.k, row.draft, row.verify) >= need.wanted
        for plan, row in by_plan.items():
            if plan.k:
                assert speed_up([alpha - 1e-9] * plan.k, row.draft, row.verify) < need.wanted
    price, plan = two.draft_cost
    row = by_plan[plan]
    chances = [mean for mean, _ in COSTS.acceptances(plan.steps, plan.k)]
    assert speed_up(chances, price, row.verify) == pytest.approx(2.0)
    assert four.draft_cost is None and eight.acceptance is None is eight.draft_cost


def test_measured_speed_ups_are_those_of_the_plans(decoder, monkeypatch):
    """Rates are made up: what counts is that each plan is decoded with, and set against plain."""
    costs = Costs(2, [PLAIN, Plan(2, 0), Plan(4, 0)], [0.0] * 3, [1.0] * 3)
    drafted = []

    def generate(self, prompts, **options):
        assert len(prompts) == 2
        most = 0 if self.drafter is None else self.settings.chooser.want(64).width
        drafted.append(most)
        rate = float(1 + most)
        return type("Run", (), {"stats": type("Stats", (), {"tokens_per_second": rate})})

    monkeypatch.setattr(Decoder, "generate", generate)
    plans = [Plan(2, 0), Plan(4, 0)]
    assert measured_speed_ups(decoder, costs, plans, [[1], [2], [3]], 4) == {
        plans[0]: 3,
        plans[1]: 5,
    }
    assert drafted == [0, 2, 4] * 3


def test_a_picture(tmp_path, monkeypatch):
    rows = predictions(COSTS)
    draw(rows, {Plan(4, 2): 1.5}, "a pair", tmp_path / "plans.png")
    assert (tmp_path / "plans.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["plans.png"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"a picture needs matplotlib: pip install 'specdiff-kern"):
        draw(rows, {}, "a pair", tmp_path / "plans.png")
