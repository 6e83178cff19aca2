"""Conformance: tests which samplers and verifiers keep the target's distribution exactly.

    python benchmarks/bench_conformance.py [--draws 20000]

Each contender is called as in `bench_verify.py`, on drafts of two tokens over three ids. Only
specdiff can be told in which reverse step a token was drawn. On a draft from right to left, the
others use every recorded row, as they would in a decoder that gives them such a draft.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Annotated, Any

import torch
import typer
from inputs import Shape
from machine import save
from peers import CONTENDERS, Contender, Ours, Unusable
from rich.console import Console
from rich.table import Table

import specdiff_kernels as sk
from specdiff_kernels.testing import (
    CASES,
    Drafted,
    Outcome,
    Report,
    check_sampler,
    check_verifier,
    power,
)

console = Console(width=110)


class Contestant:
    """Adapts a contender to the kit: one instance per shape, with numbered calls."""

    def __init__(self, make: Callable[[Shape], Contender]) -> None:
        self.made = cache(lambda *shape: make(Shape(*shape)))
        self.name, self.batched = make.name, make.batched  # type: ignore[attr-defined]
        self.calls = 0

    def sample(self, logits: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        size = len(logits) if self.batched else 1
        parts = logits[:, None].split(size)
        drawn = [self.made(size, 1, logits.shape[1]).draft(part, self.calls)[0] for part in parts]
        return torch.cat(drawn)[:, 0]

    def verify(self, draft: Drafted) -> Outcome:
        self.calls += 1
        contender = self.made(*draft.draft_logits.shape)
        if isinstance(contender, Ours):
            contender.tau = draft.steps.expand(draft.tokens.shape).contiguous()
            if draft.zero:
                return with_zeros(contender, draft)
        distribution = contender.distribution(draft.draft_logits)
        result = contender.verify(draft.target_logits, draft.tokens, distribution, self.calls)
        accepted, token = contender.outcome(result)
        return Outcome(torch.tensor(accepted), torch.tensor(token))


def with_zeros(contender: Ours, draft: Drafted) -> Outcome:
    """Verify with words of zero: ours are not from torch's generator, which the kit replaces."""
    rows, distribution = contender.distribution(draft.draft_logits)
    words = torch.zeros(*draft.target_logits.shape[:2], dtype=torch.int64)
    made = sk.Draft(draft.tokens, contender.tau, contender.rows, rows, distribution)
    result = sk.verify(draft.target_logits, made, words=words, backend=contender.backend)
    accepted, token = contender.outcome(result)
    return Outcome(torch.tensor(accepted), torch.tensor(token))


def main(
    draws: Annotated[int, typer.Option(help="drafts to verify in each world")] = 20_000,
) -> None:
    """Print the verdict on each contender, then how often each known mistake is found."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    table = Table(
        title=f"total variation from the exact distribution over {draws} drafts; red: refuted"
    )
    for heading in ("", "tokens", *(case.name for case in CASES), "u = 0"):
        table.add_column(heading, justify="right" if heading else "left")
    cases: list[dict[str, Any]] = []
    for make in CONTENDERS:
        try:
            contestant = Contestant(make)
            tokens = check_sampler(contestant.sample, draws=draws)
            batch = None if contestant.batched else 1
            texts = check_verifier(contestant.verify, contestant.sample, draws=draws, batch=batch)
        except Unusable as reason:
            console.print(f"not tested: {make.name}: {reason}", style="dim")  # type: ignore[attr-defined]
            continue
        cases += [
            {"contender": contestant.name, **f._asdict(), "refuted": f.p_value < report.alarm}
            for report in (tokens, texts)
            for f in report.findings
        ]
        table.add_row(contestant.name, *cells(tokens, texts))
    console.print(table)
    found = power(draws=draws, repetitions=20)
    for mutant, share in found.items():
        console.print(f"found in {share:.0%} of 20 repetitions: {mutant}")
    content = {
        "command": f"python benchmarks/bench_conformance.py --draws {draws}",
        "draws": draws,
        "alarm": texts.alarm,
        "cases": cases,
        "power": found,
    }
    console.print(f"saved {save('conformance', content)}", soft_wrap=True)


def cells(tokens: Report, texts: Report) -> list[str]:
    """The worst findings: on sampled tokens, on each world, and on u = 0."""
    groups = [list(tokens.findings)]
    groups += [
        [f for f in texts.findings if f.case == case.name and f.what != "u = 0"] for case in CASES
    ]
    groups.append([f for f in texts.findings if f.what == "u = 0"])
    worst = [min(group, key=lambda f: f.p_value) for group in groups]
    return [
        f"[red]{f.distance:.3f}[/red]" if f.p_value < texts.alarm else f"{f.distance:.3f}"
        for f in worst
    ]


if __name__ == "__main__":
    typer.run(main)
