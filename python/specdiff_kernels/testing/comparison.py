"""What was seen beside an exact distribution: Pearson's chi-squared, the exact binomial test."""

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
    what: str  # what was compared, see the checks
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
    counts = {**dict.fromkeys(distribution, 0), **Counter(seen)}
    chances = [distribution.get(outcome, 0.0) for outcome in counts]
    return compare_counts(case, what, list(counts.values()), chances)


def compare_counts(
    case: str, what: str, counts: Sequence[int], chances: Sequence[float], fewest: int = FEWEST
) -> Finding:
    """The same of counts; what is expected less than `fewest` times shares a cell."""
    N = sum(counts)
    distance = sum(abs(n / N - p) for n, p in zip(counts, chances, strict=True)) / 2
    if any(n > 0 and p == 0 for n, p in zip(counts, chances, strict=True)):
        return Finding(case, what, 0.0, distance)
    cells = pooled([(p * N, n) for n, p in zip(counts, chances, strict=True)], fewest)
    statistic = sum((n - e) ** 2 / e for e, n in cells)
    if len(cells) < 2:
        return Finding(case, what, 1.0, distance)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return Finding(case, what, torch.special.gammaincc(*half).item(), distance)


def pooled(cells: Sequence[tuple[float, int]], fewest: int = FEWEST) -> list[tuple[float, int]]:
    """(expected, counted) where at least `fewest` are expected; rarer cells are added together,
    from the rarest on, until that is so."""
    result, waiting = [], (0.0, 0)
    for cell in sorted(cells, key=lambda cell: cell[0]):
        waiting = waiting[0] + cell[0], waiting[1] + cell[1]
        if waiting[0] >= fewest:
            result.append(waiting)
            waiting = 0.0, 0
    if result and waiting[0] > 0:
        result[-1] = result[-1][0] + waiting[0], result[-1][1] + waiting[1]
    return result


def compare_count(case: str, what: str, count: int, N: int, p: float) -> Finding:
    """The exact binomial test, on both sides, of an event of chance p that came `count` times in
    N."""
    k = torch.arange(N + 1, dtype=torch.float64)
    orders = torch.lgamma(k + 1)
    ways = orders[N] - orders - orders.flip(0)
    chances = (ways + torch.special.xlogy(k, p) + torch.special.xlog1py(N - k, -p)).exp()
    rarer = min(chances[: count + 1].sum().item(), chances[count:].sum().item())
    return Finding(case, what, min(1.0, 2 * rarer), abs(count / max(N, 1) - p))
