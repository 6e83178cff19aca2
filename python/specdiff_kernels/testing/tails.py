"""A world with a long tail: one likely token, and a large vocabulary far below it.

The tail's tokens together have a chance of 0.2%, which noise of few bits changes. The largest
Gumbel variate that -log(-log u) makes of a u of 24 bits is 16.6. So a token 18 below the likely one
can win only where that one's own noise is low: the tail comes once in 6,000 draws, not in 500.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from .answers import integers, outcome_of
from .comparison import Finding, compare_count
from .mutants import Verifier
from .worlds import NEVER, Drafted, K, Sampler

V = 2**17
DEPTH = 18.0
LIKELY = V // 2
DRAFTED = 0  # the token that every draft of the verifier's worlds consists of
ROWS = 16  # of a call


def sampler_findings(sample: Sampler, draws: int) -> list[Finding]:
    row = tail()
    tokens = [integers(sample(row.expand(n, V)), "token", n, V - 1) for n in sizes(draws, ROWS)]
    return counted("long tail", torch.cat(tokens), row)


def verifier_findings(verify: Verifier, draws: int, batch: int | None) -> list[Finding]:
    """Of the token that replaces a drafted one, and of the token behind a whole draft."""
    only, row = torch.full((V,), NEVER), tail()
    only[DRAFTED], row[DRAFTED] = 0.0, NEVER  # never drafted: what replaces it follows the row
    findings = []
    for case, rows, at in (
        ("tail, replaced", [row, only, only], 0),
        ("tail, behind", [only, only, row], K),
    ):
        parts = [
            outcome_of(verify, drafts(n, only, torch.stack(rows)), V)
            for n in sizes(draws, batch or ROWS)
        ]
        accepted, token = (torch.cat(field) for field in zip(*parts, strict=True))
        again = (accepted < at) & (token == DRAFTED)  # what had to stand was emitted, so it may be
        token = torch.where(accepted == at, token, DRAFTED)
        findings += counted(case, token[~again], row)
    return findings


def tail() -> Tensor:
    row = torch.full((V,), -DEPTH)
    row[LIKELY] = 0.0
    return row


def drafts(N: int, drafted: Tensor, target: Tensor) -> Drafted:
    """N equal drafts. Rows of logits share their memory."""
    return Drafted(
        torch.full((N, K), DRAFTED),
        drafted.expand(N, K, V),
        target.expand(N, K + 1, V),
        torch.arange(K, dtype=torch.int32),
        torch.ones(K, dtype=torch.bool),
    )


def sizes(count: int, most: int) -> Iterator[int]:
    """Of calls that make so many in all."""
    for start in range(0, count, most):
        yield min(most, count - start)


def counted(case: str, tokens: Tensor, row: Tensor) -> list[Finding]:
    """How often the tail came: all of it, and the ids below and above the likely token."""
    p, N = row.double().softmax(-1), len(tokens)
    if (p[tokens] == 0).any():
        return [Finding(case, "tail", 0.0, (p[tokens] == 0).double().mean().item())]
    low, high = tokens < LIKELY, tokens > LIKELY
    return [
        compare_count(case, what, int(here.sum()), N, chance.item())
        for what, here, chance in (
            ("tail", low | high, p[:LIKELY].sum() + p[LIKELY + 1 :].sum()),
            ("low ids", low, p[:LIKELY].sum()),
            ("high ids", high, p[LIKELY + 1 :].sum()),
        )
    ]
