"""Pearson's chi-squared of what was seen and an exact distribution."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .worlds import Distribution, Text

FEWEST = 5  # expected outcomes in a cell of Pearson's chi-squared


class Finding(NamedTuple):
    """One comparison with an exact distribution."""

    case: str
    what: str  # "text", "outcome", "u = 0" or "token"
    p_value: (
        float  # chance of a deviation as large under the exact distribution; 0: the impossible came
    )
    distance: (
        float  # total variation between what came and the distribution; sampling noise included
    )


class Report(NamedTuple):
    """Every comparison, and whether all of them passed."""

    findings: tuple[Finding, ...]
    draws: int
    alarm: float  # a smaller p value is a failure

    @property
    def passed(self) -> bool:
        return not self.failures()

    def failures(self, what: str | None = None) -> tuple[Finding, ...]:
        """Findings below the alarm level; of one kind if it is named."""
        return tuple(
            f for f in self.findings if f.p_value < self.alarm and what in (None, f.what)
        )  # fmt: skip

    def __str__(self) -> str:
        lines = [f"{'case':20} {'distribution of':8} {'p value':>8} {'distance':>9}"]
        for f in self.findings:
            verdict = "FAILED" if f.p_value < self.alarm else "ok"
            lines.append(f"{f.case:20} {f.what:8} {f.p_value:8.1e} {f.distance:9.4f} {verdict}")
        return "\n".join(lines)


def compare(case: str, what: str, seen: Sequence[Text], distribution: Distribution) -> Finding:
    """Pearson's chi-squared of outcomes with their distribution."""
    N = len(seen)
    counts = {**dict.fromkeys(distribution, 0), **Counter(seen)}
    distance = sum(abs(n / N - distribution.get(outcome, 0.0)) for outcome, n in counts.items()) / 2
    if any(n > 0 and distribution.get(outcome, 0.0) == 0 for outcome, n in counts.items()):
        return Finding(case, what, 0.0, distance)
    cells = pooled([(distribution[outcome] * N, n) for outcome, n in counts.items()])
    statistic = sum((n - e) ** 2 / e for e, n in cells)
    if len(cells) < 2:
        return Finding(case, what, 1.0, distance)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return Finding(case, what, torch.special.gammaincc(*half).item(), distance)


def pooled(cells: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    """(expected, counted) where at least FEWEST are expected; rarer cells are added together, from
    the rarest on, until that is so."""
    result, waiting = [], (0.0, 0)
    for cell in sorted(cells, key=lambda cell: cell[0]):
        waiting = waiting[0] + cell[0], waiting[1] + cell[1]
        if waiting[0] >= FEWEST:
            result.append(waiting)
            waiting = 0.0, 0
    if result and waiting[0] > 0:
        result[-1] = result[-1][0] + waiting[0], result[-1][1] + waiting[1]
    return result
