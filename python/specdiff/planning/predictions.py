"""Predictions: what a pair of models is good for on a machine, in numbers and a picture."""

from __future__ import annotations

import statistics
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from ..files import naming
from ..loop.decoder import Decoder
from ..loop.sampling import Sampling
from ..theory import needed_acceptance, needed_draft_cost, speed_up, tokens_per_round
from .costs import PLAIN, Costs, Plan
from .planner import Planner


class Prediction(NamedTuple):
    """Expected costs, tokens and speed-up of a plan; costs are in units of a plain round."""

    plan: Plan
    draft: float
    verify: float
    tokens: float  # in a round
    speed_up: float


def predictions(costs: Costs) -> list[Prediction]:
    """Predictions from the acceptance seen when the costs were measured, best first; plain decoding
    is 1."""
    plain = costs.verify[costs.plans.index(PLAIN)]
    rows = []
    for plan, draft in zip(costs.plans, costs.draft, strict=True):
        chances = [mean for mean, _ in costs.acceptances(plan.steps, plan.k)]
        c, v = draft / plain, costs.rest(plan, costs.share.get(plan.steps, 1.0)) / plain
        if plan == PLAIN:
            c = 0.0
        rows.append(Prediction(plan, c, v, tokens_per_round(chances), speed_up(chances, c, v)))
    return sorted(rows, key=lambda row: -row.speed_up)


class Need(NamedTuple):
    """The acceptance, or the draft cost, that a wanted speed-up needs."""

    wanted: float
    acceptance: tuple[float, Plan] | None  # the least constant one; None: unreachable even at 1
    draft_cost: (
        tuple[float, Plan] | None
    )  # the most, at today's acceptance; None: even 0 is too much


def needs(costs: Costs, wanted: Sequence[float] = (2.0, 4.0, 8.0)) -> list[Need]:
    """For each wanted speed-up, the acceptance it needs at these costs, and the draft cost it needs
    at this acceptance."""
    rows = [row for row in predictions(costs) if row.plan != PLAIN]
    result = []
    for speed in wanted:
        alphas = [
            (alpha, row.plan)
            for row in rows
            if (alpha := needed_acceptance(speed, row.plan.k, row.draft, row.verify)) is not None
        ]
        prices = []
        for row in rows:
            chances = [mean for mean, _ in costs.acceptances(row.plan.steps, row.plan.k)]
            price = needed_draft_cost(speed, chances, row.verify)
            if price is not None:
                prices.append((price, row.plan))
        result.append(Need(speed, min(alphas, default=None), max(prices, default=None)))
    return result


def as_dict(
    rows: Sequence[Prediction], measured: dict[Plan, float], wanted: Sequence[Need]
) -> dict[str, Any]:
    """The JSON of `specdiff plan --json`."""

    def found(need: tuple[float, Plan] | None) -> dict[str, Any] | None:
        return None if need is None else {"value": need[0], **need[1]._asdict()}

    plans = [
        {**row._asdict(), **row.plan._asdict(), "measured_speed_up": measured.get(row.plan)}
        for row in rows
    ]
    for plan in plans:
        del plan["plan"]
    asked = [
        {"speed_up": n.wanted, "acceptance": found(n.acceptance), "draft": found(n.draft_cost)}
        for n in wanted
    ]
    return {"plans": plans, "needs": asked}


def measured_speed_ups(
    decoder: Decoder,
    costs: Costs,
    plans: Sequence[Plan],
    prompts: Sequence[Sequence[int]],
    tokens: int,
    sampling: Sampling | None = None,
) -> dict[Plan, float]:
    """Speed-up of each plan over plain decoding: the median over prompts. Plans take turns."""
    decoders = {
        plan: decoder.replace(
            drafter=decoder.drafter if plan.k else None,
            k=Planner(costs, ks=(plan.k,), steps=(plan.steps,)),
        )
        for plan in (PLAIN, *plans)
    }
    rates: dict[Plan, list[float]] = {plan: [] for plan in decoders}
    for number, prompt in enumerate(prompts):
        ids = [list(prompt)] * costs.batch
        for plan, one in decoders.items():
            run = one.generate(ids, max_new_tokens=tokens, sampling=sampling, seed=number)
            rates[plan].append(run.stats.tokens_per_second)
    return {
        plan: statistics.median(
            rate / plain for rate, plain in zip(rates[plan], rates[PLAIN], strict=True)
        )
        for plan in plans
    }


def figure_class() -> Any:
    """Matplotlib's. Raises ValueError where it is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ValueError("a picture needs matplotlib: pip install matplotlib") from error
    return Figure


def draw(rows: Sequence[Prediction], measured: dict[Plan, float], title: str, path: Path) -> None:
    """Predicted against measured speed-up as a picture, in the format of the file's name.

    Raises:
        ValueError: matplotlib is not installed, or cannot write such a file.
    """
    figure = figure_class()(figsize=(7.6, 4.4), layout="constrained")
    axes = figure.subplots()
    for steps in sorted({row.plan.steps for row in rows if row.plan != PLAIN}):
        own = sorted(row for row in rows if row.plan.steps == steps and row.plan != PLAIN)
        label = f"predicted, T = {steps}" if steps else "predicted"
        (line,) = axes.plot(
            [row.plan.k for row in own], [row.speed_up for row in own], ".-", label=label
        )
        seen = [(row.plan.k, measured[row.plan]) for row in own if row.plan in measured]
        if seen:
            label = f"measured, T = {steps}" if steps else "measured"
            axes.plot(*zip(*seen, strict=True), "o", mfc="none", color=line.get_color(), ms=9,
                      label=label)  # fmt: skip
    axes.axhline(1.0, color="grey", lw=1, label="plain decoding")
    axes.set(xlabel="K, tokens drafted in a round", ylabel="speed-up")
    axes.set_title(textwrap.fill(title, 50), parse_math=False)
    figure.legend(loc="outside right upper", frameon=False)
    part = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        with naming(path):
            figure.savefig(part, dpi=150)
            part.replace(path)
    finally:
        part.unlink(missing_ok=True)
