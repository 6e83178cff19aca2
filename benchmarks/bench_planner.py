"""Compares the planner with every fixed K and T, also for a useless drafter.

    python benchmarks/bench_planner.py

All settings decode the 16 prompts in turn, as in `specdiff bench`. A speed-up is the median over
prompts of tokens per second relative to plain decoding. `of the best` is the planner's speed-up
relative to the best fixed K and T of its drafter. The useless drafter has the parallel drafter's
shape and random weights.
"""

from __future__ import annotations

from typing import Annotated, Any

import torch
import typer
from machine import save
from rich.console import Console
from rich.table import Table

from specdiff.bench.harness import Setting, pooled, quantiles, speedups, take_turns
from specdiff.bench.methods import PLAIN, ours
from specdiff.bench.tasks import prompts as read_prompts
from specdiff.drafters import ParallelDrafter, drafter_folder, load_drafter, weights_digest
from specdiff.drafters.network import DraftNetwork
from specdiff.loop.decoder import Decoder
from specdiff.loop.sampling import Sampling
from specdiff.loop.target import Target
from specdiff.models import encode
from specdiff.planning.costs import PROMPTS as COST_PROMPTS
from specdiff.planning.costs import Costs, Plan
from specdiff.planning.costs import measure as measure_costs
from specdiff.planning.planner import Planner
from specdiff.planning.predictions import predictions

PLANS = {  # fixed plans
    "parallel": [Plan(k, 0) for k in (2, 3, 4, 6, 8)],
    "eagle": [Plan(k, 0) for k in (1, 2, 4)],
    "block-diffusion": [Plan(2, 1), Plan(4, 1), Plan(4, 2)],
    "prompt-lookup": [Plan(k, 0) for k in (2, 4)],
}
USELESS = "random weights"
console = Console(width=110)


def main(
    target: Annotated[str, typer.Option(help="a known model's name, or a folder")] = "smollm2-135m",
    tokens: Annotated[int, typer.Option(help="new tokens of each prompt")] = 48,
) -> None:
    """Print speed-ups over plain decoding, greedy and at temperature 1."""
    seen = Target.load(target, device="cpu")
    prompts = read_prompts("chat", seen.tokenizer, 16)
    known = [encode(seen.tokenizer, text) for text in COST_PROMPTS]
    cases: list[dict[str, Any]] = []
    for temperature in (0.0, 1.0):
        sampling = Sampling(temperature)
        settings = [Setting(PLAIN, ours(Decoder(seen), sampling))]
        plans: dict[str, tuple[str, Plan | None, float | None]] = {}
        for name, drafter in drafters(seen).items():
            costs = measure_costs(Decoder(seen, drafter), known, sampling=sampling)
            predicted = {row.plan: row.speed_up for row in predictions(costs)}
            own: list[Plan | None] = [None, *PLANS.get(name, [])]
            for plan in own:
                setting = f"{name}, {label(plan)}"
                plans[setting] = (name, plan, None if plan is None else predicted[plan])
                settings.append(
                    Setting(setting, ours(decoder(seen, drafter, costs, plan), sampling))
                )
        batches = [[prompt] for prompt in prompts]
        take_turns(settings, batches, tokens, title=f"temperature {temperature:g}")
        for setting in settings[1:]:
            name, plan, expected = plans[setting.name]
            cases.append({
                "temperature": temperature,
                "drafter": name,
                "weights": None if name == USELESS else weights_digest(name),
                "k": None if plan is None else plan.k,
                "steps": None if plan is None else plan.steps,
                "tokens_per_forward": pooled(setting.runs).tokens_per_forward,
                "predicted": expected,
                "speedup": quantiles(speedups(setting, settings[0]))["median"],
            })  # fmt: skip
    show(cases)
    content = {
        "command": f"python benchmarks/bench_planner.py --tokens {tokens}",
        "target": target,
        "prompts": len(prompts),
        "new_tokens": tokens,
        "cases": cases,
    }
    console.print(f"saved {save('planner', content)}", soft_wrap=True)


def drafters(target: Target) -> dict[str, Any]:
    found = {name: load_drafter(name, target) for name in PLANS}
    shape = DraftNetwork.load(drafter_folder("parallel"))
    useless = DraftNetwork(shape.config, shape.draft_ids)
    useless.initialise(target.model.get_input_embeddings().weight, torch.Generator().manual_seed(0))
    with torch.no_grad():  # a random bias, so that frequent tokens are not favoured
        useless.bias.copy_(torch.randn(useless.bias.shape) * 8)
    found[USELESS] = ParallelDrafter(useless, target)
    return found


def decoder(target: Target, drafter: Any, costs: Costs, plan: Plan | None) -> Decoder:
    if plan is None:
        return Decoder(target, drafter, Planner(costs))
    return Decoder(target, drafter, Planner(costs, ks=(plan.k,), steps=(plan.steps,)))


def label(plan: Plan | None) -> str:
    if plan is None:
        return "planner"
    return f"K = {plan.k}" + (f", T = {plan.steps}" if plan.steps else "")


def show(cases: list[dict[str, Any]]) -> None:
    for temperature in (0.0, 1.0):
        table = Table(title=f"temperature {temperature:g}")
        for heading in (
            "drafter",
            "K, T",
            "tokens/forward",
            "predicted",
            "speed-up",
            "of the best",
        ):
            table.add_column(heading, justify="left" if heading == "drafter" else "right")
        rows = [case for case in cases if case["temperature"] == temperature]
        for case in rows:
            fixed = [c["speedup"] for c in rows if c["drafter"] == case["drafter"] and c["k"]]
            best = max([*fixed, 1.0])  # plain decoding is also a plan
            plan = None if case["k"] is None else Plan(case["k"], case["steps"])
            table.add_row(
                case["drafter"],
                label(plan),
                f"{case['tokens_per_forward']:.2f}",
                "" if case["predicted"] is None else f"{case['predicted']:.2f}x",
                f"{case['speedup']:.3f}x",
                f"{case['speedup'] / best:.3f}" if plan is None else "",
            )
        console.print(table)


if __name__ == "__main__":
    typer.run(main)
