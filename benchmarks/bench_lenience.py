"""Measures gain and bias of the lenient rules of `verify`, on a real pair of models.

    python benchmarks/bench_lenience.py

Each rule decodes 16 prompts at temperature 1, with several amounts; settings take turns on each
prompt. Reported are the rejections and the total variation spent per examined token, tokens per
target forward, and the speed relative to the exact rule. In theory, bias and rejections add up to
the TV of the two distributions, for every rule and amount. Texts differ between settings, so here
this holds on average only.
"""

from __future__ import annotations

from typing import Annotated

import typer
from machine import save
from rich.console import Console
from rich.table import Table

from specdiff.bench.harness import Setting, quantiles, speedups, take_turns
from specdiff.bench.methods import ours
from specdiff.bench.tasks import prompts as read_prompts
from specdiff.drafters import load_drafter, weights_digest
from specdiff.loop.decoder import Decoder
from specdiff.loop.sampling import Sampling
from specdiff.loop.target import Target
from specdiff_kernels import Lenience

AMOUNTS = {
    "lenience": (0.75, 0.5, 0.25),
    "additive": (0.01, 0.05, 0.2),
    "ensemble": (0.75, 0.5, 0.25),
}
EXACT = "exact"
console = Console(width=110)


def main(
    target: Annotated[str, typer.Option(help="a known model's name, or a folder")] = "smollm2-135m",
    drafter: Annotated[str, typer.Option(help="as in `specdiff generate`")] = "parallel",
    k: Annotated[int, typer.Option("--k", help="draft length")] = 3,
    tokens: Annotated[int, typer.Option(help="new tokens of each prompt")] = 48,
) -> None:
    """Print rejections, bias and speed of each rule."""
    seen = Target.load(target, device="cpu")
    drafts = load_drafter(drafter, seen)
    prompts = read_prompts("chat", seen.tokenizer, 16)
    sampling = Sampling(1.0)
    rules = [Lenience(kind, amount) for kind, amounts in AMOUNTS.items() for amount in amounts]
    settings = [Setting(EXACT, ours(Decoder(seen, drafts, k), sampling))]
    for rule in rules:
        decoder = Decoder(seen, drafts, k, "lenient", lenience=rule)
        settings.append(Setting(f"{rule.kind} {rule.amount}", ours(decoder, sampling)))
    take_turns(settings, [[prompt] for prompt in prompts], tokens)
    cases = []
    for setting, rule in zip(settings, [None, *rules], strict=True):
        stats = [run.stats for run in setting.runs]
        examined, accepted = (
            sum(sum(counts) for counts in (getattr(s, name) for s in stats))
            for name in ("examined_at", "accepted_at")
        )
        cases.append({
            "kind": EXACT if rule is None else rule.kind,
            "amount": None if rule is None else rule.amount,
            "examined": examined,
            "rejection": 1 - accepted / examined,
            "bias": sum(s.bias for s in stats) / examined,
            "bias_per_token": sum(s.bias for s in stats) / sum(s.tokens for s in stats),
            "tokens_per_forward": sum(s.tokens for s in stats) / sum(s.row_forwards for s in stats),
            "speedup": quantiles(speedups(setting, settings[0]))["median"],
        })  # fmt: skip
    console.print(table(cases))
    content = {
        "command": f"python benchmarks/bench_lenience.py --drafter {drafter} --k {k} "
        f"--tokens {tokens}",
        "target": target,
        "drafter": drafter,
        "weights": weights_digest(drafter),
        "prompts": len(prompts),
        "cases": cases,
    }
    console.print(f"saved {save('lenience', content)}", soft_wrap=True)


def table(cases: list[dict]) -> Table:
    shown = Table(title="per examined token, and over the exact rule")
    for heading in ("rule", "rejected", "bias", "sum", "tokens/forward", "speed"):
        shown.add_column(heading, justify="left" if heading == "rule" else "right")
    for case in cases:
        shown.add_row(
            case["kind"] if case["amount"] is None else f"{case['kind']} {case['amount']}",
            f"{case['rejection']:.3f}",
            f"{case['bias']:.3f}",
            f"{case['rejection'] + case['bias']:.3f}",
            f"{case['tokens_per_forward']:.2f}",
            f"{case['speedup']:.2f}x",
        )
    return shown


if __name__ == "__main__":
    typer.run(main)
