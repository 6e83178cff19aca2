"""Costs of a pair: how they are kept, and the predictions made of them."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from specdiff import Decoder, Sampling, Target
from specdiff.drafters import PromptLookup
from specdiff.files import stamped
from specdiff.planning.costs import PLAIN, Costs, Plan, costs_file, kept_costs
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


NAMES = {"target": "some-model"}


def test_costs_are_kept_for_each_way_to_decode(decoder, tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDIFF_HOME", str(tmp_path))
    ways = [
        {}, {"batch": 2}, {"ks": (4,)}, {"steps": (2,)}, {"sampling": Sampling(1.0)}
    ]  # fmt: skip
    files = [costs_file(decoder, NAMES, **way) for way in ways]
    assert files == [costs_file(decoder, NAMES, **way) for way in ways]
    files.append(costs_file(decoder, {"target": "another"}))
    monkeypatch.setenv("SPECDIFF_BACKEND", "reference")
    files.append(costs_file(decoder, NAMES))
    assert len(set(files)) == len(files) and {file.parent for file in files} == {tmp_path / "plans"}
    for batch, file in enumerate(files, 1):
        replace(COSTS, batch=batch).save(file)
    assert kept_costs(decoder, [[1]], NAMES).batch == len(files)
    monkeypatch.delenv("SPECDIFF_BACKEND")
    for batch, way in enumerate(ways, 1):
        assert kept_costs(decoder, [[1]], NAMES, **way).batch == batch


def test_costs_are_measured_once_unless_asked_for_again(decoder, tmp_path, monkeypatch):
    monkeypatch.setenv("SPECDIFF_HOME", str(tmp_path))
    costs = kept_costs(decoder, [[1]], NAMES, ks=(2,))
    (file,) = (tmp_path / "plans").iterdir()
    assert costs.plans == [PLAIN, Plan(2, 0)] and Costs.load(file) == costs
    assert kept_costs(decoder, [[1]], NAMES, ks=(2,)) == costs
    again = kept_costs(decoder, [[1]], NAMES, ks=(2,), again=True)
    assert again.verify != costs.verify and Costs.load(file) == again


@pytest.mark.parametrize("content", ["", '{"plans": [], "examined": []}', "short"])
def test_costs_that_cannot_be_read_are_measured_again(decoder, tmp_path, monkeypatch, content):
    """They are no more than kept: nothing is lost but time."""
    monkeypatch.setenv("SPECDIFF_HOME", str(tmp_path))
    file = costs_file(decoder, NAMES, ks=(2,))
    COSTS.save(file)
    whole = json.loads(file.read_text())
    file.write_text(json.dumps(whole | {"draft": [0.0]}) if content == "short" else content)
    with pytest.warns(UserWarning, match="holds no costs .*; measured anew"):
        costs = kept_costs(decoder, [[1]], NAMES, ks=(2,))
    assert Costs.load(file) == costs


def test_costs_that_cannot_be_kept_are_used(decoder, tmp_path, monkeypatch):
    (tmp_path / "plans").write_text("not a folder")
    monkeypatch.setenv("SPECDIFF_HOME", str(tmp_path))
    with pytest.warns(UserWarning, match="costs are not kept"):
        assert kept_costs(decoder, [[1]], NAMES, ks=(2,)).plans == [PLAIN, Plan(2, 0)]


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


def test_measured_speed_ups_are_those_of_the_plans(decoder):
    """Rates are made up: what counts is that each plan is decoded with, and set against plain."""
    costs = Costs(2, [PLAIN, Plan(2, 0), Plan(4, 0)], [0.0] * 3, [1.0] * 3)
    drafted = []

    class Fake:
        """A decoder that decodes nothing, at a rate of one token and those drafted a second."""

        def __init__(self, real):
            self.drafter, self.real = real.drafter, real

        def replace(self, **changes):
            return Fake(self.real.replace(**changes))

        def generate(self, prompts, **options):
            assert len(prompts) == 2
            chooser = self.real.settings.chooser
            drafted.append(0 if self.drafter is None else chooser.want(64).width)
            return SimpleNamespace(stats=SimpleNamespace(tokens_per_second=1.0 + drafted[-1]))

    plans = [Plan(2, 0), Plan(4, 0)]
    assert measured_speed_ups(Fake(decoder), costs, plans, [[1], [2], [3]], 4) == {
        plans[0]: 3,
        plans[1]: 5,
    }
    assert drafted == [0, 2, 4] * 3


def test_a_picture_s_legend_and_title_cover_nothing(tmp_path, monkeypatch):
    made = []
    figure = lambda **options: made.append(Figure(**options)) or made[-1]
    monkeypatch.setattr("specdiff.planning.predictions.figure_class", lambda: figure)
    title = f"/a/folder{'/below' * 20}/drafter for $target$"
    draw(predictions(COSTS), {Plan(4, 2): 1.5}, title, tmp_path / "plans.png")
    (axes,), (legend,) = made[0].axes, made[0].legends
    renderer = FigureCanvasAgg(made[0]).get_renderer()
    made[0].draw_without_rendering()
    assert len(legend.get_texts()) > 3
    assert not legend.get_window_extent(renderer).overlaps(axes.get_tightbbox(renderer))
    title = axes.title.get_window_extent(renderer)
    assert made[0].bbox.x0 <= title.x0 and title.x1 <= made[0].bbox.x1


def test_a_picture(tmp_path, monkeypatch):
    rows = predictions(COSTS)
    draw(rows, {Plan(4, 2): 1.5}, "a pair", tmp_path / "plans.png")
    assert (tmp_path / "plans.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in tmp_path.iterdir()] == ["plans.png"]
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match=r"a picture needs matplotlib: pip install matplotlib$"):
        draw(rows, {}, "a pair", tmp_path / "plans.png")
