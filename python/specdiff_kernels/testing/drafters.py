"""Do a drafter's tokens follow the distributions that it records?

Whatever the distribution of a token, its place in it is uniform: the chance of the tokens before
it, and a random share of its own (Rosenblatt, Annals of Mathematical Statistics 23, 1952). So the
tokens of many drafts can be compared with as many distributions at once.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.record_check import is_of
from ..ops.verify import check_draft
from ..records import choose_record
from ..reference.numerics import weights
from ..reference.verify import draft_lengths, recorded_positions
from ..types import Draft, RowDistribution, Status, check_status
from .answers import require_some
from .comparison import Finding, Report, compare_count, compare_counts

CELL, MOST = 50, 16  # tokens expected in a cell of places, at least; such cells
RARE = 40  # tokens expected among the least likely
AT_ONCE = 2**22  # weights in memory
NOWHERE = 2.0  # the place of a token of no weight


def check_drafter(
    draft: Callable[[int], Draft], *, drafts: int = 1000, alarm: float = 1e-6
) -> Report:
    """Compare the tokens that a drafter draws with the distributions that it records.

    Nobody notices the bias of a token that was drawn otherwise than recorded: at another
    temperature, from columns in another order, from another position's row, by the wrong noise, or
    that was withheld for its value. No single draft shows it.

    Args:
        draft: a seed, an int in [0, 2^62), -> a Draft of [B, K] tokens. Its noise has to follow
            from the seed alone. Contexts may be the same for each seed, or others.
        drafts: how many are made, each with another seed. 30,000 tokens in all show a temperature
            that is 6% off.
        alarm: a p value below it is a failure, which an exact drafter meets at most about once in
            1 / alarm comparisons.

    Returns:
        Findings on the tokens whose records `verify` may use. For each position and for all, by
        Pearson's chi-squared: "token", how often each comes; and "rank", its place among all
        tokens, the likeliest first. Of two positions side by side "pair", the places of both. By
        the exact binomial test "rare", how often the least likely tokens come. A token of no weight
        is a failure, with p value 0.

    Raises:
        DistributionError: a record that is not that of its logits, as `verify(..., check=True)`
            finds it.
        ValueError, TypeError: no Draft, drafts of several K, none whose records may be used, or no
            drafts.

    Example:
        >>> logits = torch.randn(200, 9)
        >>> distribution = row_distribution(logits, 0.8)
        >>> def draft(seed, heat=0.8):
        ...     tokens = sample(logits, row_distribution(logits, heat), seed=seed, round=0)
        ...     return Draft.sequential(tokens[:, None], [logits], [distribution])
        >>> check_drafter(draft, drafts=50).passed
        True
        >>> check_drafter(lambda seed: draft(seed, heat=0.7), drafts=50).passed
        False
    """
    require_some("drafts", drafts)
    seeds, shares = random.Random(0xD12AF7), torch.Generator().manual_seed(0xD12AF7)
    made = (observe(draft(seeds.getrandbits(62)), shares) for _ in range(drafts))
    parts = [part for part in made if part is not None]
    if not parts:
        raise ValueError(
            f"draft: expected records that `verify` may use, got {drafts} drafts without; bare "
            "guesses and coupled draws need none"
        )
    shapes = {part.seen.shape for part in parts}
    if len(shapes) > 1:
        raise ValueError(
            "draft: expected as many positions and columns in every draft, got [K, V] of "
            f"{', '.join(str(list(shape)) for shape in sorted(shapes))}; set lengths where fewer "
            "tokens are drafted"
        )
    rank, by_id = torch.cat([p.rank for p in parts]), torch.cat([p.by_id for p in parts])
    seen = torch.stack([p.seen for p in parts]).sum(0)
    expected = torch.stack([p.expected for p in parts]).sum(0)
    findings = []
    for i in range(K := rank.shape[1]):
        findings += positions(f"position {i}", rank[:, i], seen[i], expected[i])
    findings += positions("all positions", rank.flatten(), seen.sum(0), expected.sum(0))
    for i in range(1, K):
        findings += uniform(f"positions {i - 1}, {i}", "pair", by_id[:, i - 1 : i + 1])
    N = int((~rank.isnan()).sum())
    share = min(RARE / N, 0.5)
    rare = int((rank >= 1 - share).sum())
    findings.append(compare_count("all positions", "rare", rare, N, share))
    return Report(tuple(findings), drafts, alarm)


def positions(case: str, rank: Tensor, seen: Tensor, expected: Tensor) -> list[Finding]:
    findings = uniform(case, "rank", rank[:, None])
    if seen.any():
        chances = (expected / expected.sum()).tolist()
        findings.append(compare_counts(case, "token", seen.tolist(), chances, CELL))
    return findings


def uniform(case: str, what: str, places: Tensor) -> list[Finding]:
    """Are places uniform? f64 [N, axes]; NaN: there is none."""
    places = places[~places.isnan().any(1)]
    N, axes = places.shape
    side = max(1, int(min(N / CELL, MOST) ** (1 / axes)))
    cell = torch.zeros(N, dtype=torch.int64)
    for place in places.unbind(1):
        cell = cell * side + (place * side).long()
    cell[(places >= 1).any(1)] = side**axes
    counts = cell.bincount(minlength=side**axes + 1).tolist()
    return [compare_counts(case, what, counts, [side**-axes] * side**axes + [0.0])] if N else []


class Observed(NamedTuple):
    """Of the tokens of one draft whose records count, f64 on the CPU."""

    rank: Tensor  # [B, K], the place of each, the likeliest first; NaN: other tokens
    by_id: Tensor  # [B, K], its place by id
    seen: Tensor  # [K, Vd], how often each column came
    expected: Tensor  # [K, Vd], how often it should


def observe(draft: Draft, shares: torch.Generator) -> Observed | None:
    check_draft(draft)
    B, K = draft.tokens.shape
    recorded = recorded_positions(draft, choose_record(draft, "token", None))
    within = torch.arange(K, device=recorded.device) < draft_lengths(draft, B, K)[:, None]
    counts = recorded & within
    if draft.logits is None or not counts.any():
        return None
    V = draft.logits.shape[1]
    rows, columns, slots = draft.rows[counts], columns_of(draft)[counts], counts.nonzero()[:, 1]
    if (last := int(rows.max())) >= len(draft.logits):
        raise ValueError(f"draft.rows: expected rows of {len(draft.logits)} logits, got {last}")
    # rows that many sequences share are read once for each token that came of them
    pairs, which = (rows * (V + 1) + columns).unique(return_inverse=True)
    came = frequencies(slots, which, (K, len(pairs)))
    sums, expected = [], torch.zeros(K, V, dtype=torch.float64, device=rows.device)
    size = max(1, AT_ONCE // V)
    for pair, often in zip(pairs.split(size), came.split(size, 1), strict=True):
        e = checked_weights(draft, pair // (V + 1))
        sums.append(sums_around(e, pair % (V + 1)))
        expected += often @ (e.double() / sums[-1][-1][:, None])
    own, likelier, tied, before, total = torch.cat(sums, 1)[:, which].cpu()
    first, second = torch.rand(2, len(which), generator=shares, dtype=torch.float64)
    found = torch.stack((likelier + first * tied, before + second * own)) / total
    places = torch.full((2, B, K), torch.nan, dtype=torch.float64)
    places[:, counts.cpu()] = torch.where(own > 0, found.clamp(max=1 - 2**-53), NOWHERE)
    seen = frequencies(slots, columns, (K, V + 1))[:, :V]
    return Observed(places[0], places[1], seen.cpu(), expected.cpu())


def columns_of(draft: Draft) -> Tensor:
    """The column of each token, or Vd if it has none. -> i64 [B, K]"""
    assert draft.logits is not None
    V = draft.logits.shape[1]
    ids = (
        torch.arange(V, device=draft.tokens.device) if draft.draft_ids is None else draft.draft_ids
    )
    column = torch.searchsorted(ids, draft.tokens.contiguous()).clamp(max=V - 1)
    return torch.where(ids[column] == draft.tokens, column, V)


def frequencies(i: Tensor, j: Tensor, shape: tuple[int, int]) -> Tensor:
    """How often each pair of indices comes. -> f64 of this shape"""
    ones = torch.ones(len(i), dtype=torch.float64, device=i.device)
    return ones.new_zeros(shape).index_put_((i, j), ones, accumulate=True)


def checked_weights(draft: Draft, row: Tensor) -> Tensor:
    """Of rows of the draft's logits, unless their record is another's. -> i64 [N, Vd]"""
    assert draft.logits is not None and draft.distribution is not None
    logits, distribution = draft.logits[row], RowDistribution(*(f[row] for f in draft.distribution))
    e = weights(logits, distribution)
    fits = is_of(distribution, logits, e.sum(-1))
    fault = torch.where(fits, int(Status.OK), int(Status.RECORD)).int()
    status = torch.zeros(len(draft.logits), dtype=torch.int32, device=row.device)
    status[row] = torch.where(distribution.status == Status.OK.value, fault, distribution.status)
    check_status(status, "draft row")
    return e


def sums_around(e: Tensor, column: Tensor) -> Tensor:
    """Of weights [N, V]: that of a column, all larger ones, all as large, those before the column,
    all. -> f64 [5, N]"""
    own = torch.nn.functional.pad(e, (0, 1)).gather(1, column[:, None])
    before = torch.arange(e.shape[1], device=e.device) < column[:, None]
    sums = [torch.where(mask, e, 0).sum(-1) for mask in (e > own, e == own, before)]
    return torch.stack((own[:, 0], *sums, e.sum(-1))).double()
