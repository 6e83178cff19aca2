"""Tokens per round, speed-up, the best draft length, and the acceptance or cost for a speed-up.

Costs are in units of one plain step of the target. Drafting K tokens costs K c with an
autoregressive drafter of cost ratio c, and T c_d with a diffusion drafter of T reverse steps. The
target's forward over them costs v(K), with v(0) = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import NamedTuple

Cost = Callable[[int], float] | Sequence[float]  # a function of K, or its values at K = 0, 1, ...


def tokens_per_round(acceptances: Sequence[float]) -> float:
    """E(K) = 1 + sum_{k<=K} prod_{i<=k} a_i, the expected tokens per round.

    a_i is the probability that drafted token i is accepted, given that all before it are. The 1
    counts the token from the residual, or the bonus token.

    Raises:
        ValueError: an acceptance is outside [0, 1].

    Example:
        >>> tokens_per_round([0.5, 0.5])
        1.75
    """
    check_acceptances(acceptances)
    expected, chance = 1.0, 1.0
    for a in acceptances:
        chance *= float(a)
        expected += chance
    return expected


def tokens_per_round_at(alpha: float, K: int) -> float:
    """(1 - alpha^(K+1)) / (1 - alpha), or K + 1 if alpha = 1: E(K) at constant acceptance alpha.

    Leviathan et al. 2211.17192, Equation (1). It is computed as a geometric sum, which loses no
    digits near alpha = 1.

    Raises:
        ValueError: alpha is outside [0, 1], or K is below 0.

    Example:
        >>> tokens_per_round_at(0.5, 2), tokens_per_round_at(1, 5)
        (1.75, 6.0)
    """
    check_acceptances([alpha])
    check_count("K", K, 0)
    return math.fsum(alpha**k for k in range(K + 1))


def speed_up(acceptances: Sequence[float], draft_cost: float, verify_cost: float = 1.0) -> float:
    """Speed-up over plain decoding: E(K) / (draft_cost + verify_cost).

    For an autoregressive drafter, draft_cost = K c and verify_cost = 1. With constant a_i = alpha
    the speed-up is (1 - alpha^(K+1)) / ((1 - alpha)(K c + 1)), Leviathan et al. 2211.17192, Theorem
    3.8. For a diffusion drafter, draft_cost = T c_d and verify_cost = v(K) (SpecDiff, 2408.05636,
    where the cost of drafting does not depend on K).

    Raises:
        ValueError: an acceptance is outside [0, 1], a cost is negative, or a round costs nothing.

    Example:
        >>> speed_up([0.5, 0.5], draft_cost=2 * 0.125)
        1.4
    """
    if not (draft_cost >= 0 and verify_cost >= 0 and 0 < draft_cost + verify_cost < math.inf):
        raise ValueError(
            "draft_cost and verify_cost: expected finite numbers >= 0 that are not both 0, got "
            f"{draft_cost} and {verify_cost}"
        )
    return tokens_per_round(acceptances) / (draft_cost + verify_cost)


class BestPlan(NamedTuple):
    """Draft length and reverse steps, with the expected speed-up."""

    k: int  # K; 0: plain decoding is faster than any draft
    steps: int  # T; 0: the drafter has no reverse steps, or nothing is drafted
    speed_up: float


def best_length(acceptances: Sequence[float], draft_cost: Cost, verify_cost: Cost) -> BestPlan:
    """The K with the largest speed-up, 0 <= K <= len(acceptances). Ties go to the smallest K.

    K = 0 is plain decoding, where the drafter does not run: speed-up 1.

    Args:
        acceptances: a_1 .. a_Kmax. A draft of K tokens uses the first K of them.
        draft_cost: cost of drafting K tokens, as a function of K or its values at K = 0, 1, ...;
            `lambda K: K * c` for an autoregressive drafter.
        verify_cost: v(K), in the same form.

    Raises:
        ValueError: as `speed_up`, or a cost has too few values.

    Example:
        >>> best_length([0.5] * 4, lambda K: 0.1 * K, lambda K: 1.0)
        BestPlan(k=2, steps=0, speed_up=1.4583333333333335)
    """
    plans = [BestPlan(0, 0, 1.0)]
    for K in range(1, len(acceptances) + 1):
        costs = cost_at("draft_cost", draft_cost, K), cost_at("verify_cost", verify_cost, K)
        plans.append(BestPlan(K, 0, speed_up(acceptances[:K], *costs)))
    return max(plans, key=lambda plan: plan.speed_up)


def best_plan(
    acceptances: Mapping[int, Sequence[float]],
    draft_cost: Callable[[int, int], float],
    verify_cost: Cost,
) -> BestPlan:
    """The (T, K) with the largest speed-up for a diffusion drafter. Ties go to the least T, then K.

    Args:
        acceptances: a_1 .. a_Kmax for each T.
        draft_cost: a function of (T, K), the cost of all T steps together.
        verify_cost: v(K), as a function of K or its values at K = 0, 1, ...

    Raises:
        ValueError: as `best_length`, or T is below 1.

    Example:
        >>> best_plan({1: [0.5] * 3, 4: [0.9] * 3}, lambda T, K: 0.1 * T, lambda K: 1.0)
        BestPlan(k=3, steps=4, speed_up=2.45642857142857...)
    """
    plans = [BestPlan(0, 0, 1.0)]
    for T in sorted(acceptances):
        check_count("steps", T, 1)
        plan = best_length(acceptances[T], partial(draft_cost, T), verify_cost)
        if plan.k:
            plans.append(plan._replace(steps=T))
    return max(plans, key=lambda plan: plan.speed_up)


def needed_acceptance(
    wanted: float, K: int, draft_cost: float, verify_cost: float = 1.0
) -> float | None:
    """The least constant acceptance alpha with E(K) / (draft_cost + verify_cost) >= wanted.

    It is found by bisection, since E(K) grows with alpha. The returned alpha reaches `wanted`. None
    means that `wanted` is unreachable even at alpha = 1.

    Raises:
        ValueError: K is below 0, or as `speed_up`.

    Example:
        >>> round(needed_acceptance(1.4, 2, draft_cost=0.25), 9)
        0.5
        >>> needed_acceptance(3, 2, draft_cost=0.25) is None
        True
    """
    check_count("K", K, 0)
    enough = lambda alpha: speed_up([alpha] * K, draft_cost, verify_cost) >= wanted
    return least(enough, 0.0, 1.0)


def needed_draft_cost(
    wanted: float, acceptances: Sequence[float], verify_cost: float = 1.0
) -> float | None:
    """The largest draft cost of a round with a speed-up of `wanted`: E(K) / wanted - v(K).

    Divide it by K for an autoregressive drafter's c, and by T for a diffusion drafter's c_d. None
    means that `wanted` is unreachable even with drafts that cost nothing.

    Raises:
        ValueError: an acceptance is outside [0, 1], or `wanted` is not positive.

    Example:
        >>> needed_draft_cost(1.4, [0.5, 0.5]), needed_draft_cost(2, [0.5, 0.5])
        (0.25, None)
    """
    if not wanted > 0:
        raise ValueError(f"wanted: expected a positive speed-up, got {wanted}")
    cost = tokens_per_round(acceptances) / wanted - verify_cost
    return cost if cost >= 0 else None


def least(enough: Callable[[float], bool], low: float, high: float) -> float | None:
    """The smallest float in [low, high] that meets a monotone condition; None: there is none.

    Example:
        >>> least(lambda x: x * x >= 0.25, 0.0, 1.0), least(lambda x: x > 1, 0.0, 1.0)
        (0.5, None)
    """
    if not enough(high):
        return None
    if enough(low):
        return low
    while low < (middle := (low + high) / 2) < high:
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def cost_at(name: str, cost: Cost, K: int) -> float:
    """The cost at K, given as a function or as a list of values."""
    if callable(cost):
        return float(cost(K))
    if len(cost) <= K:
        raise ValueError(f"{name}: expected a value for each K up to {K}, got {len(cost)} values")
    return float(cost[K])


def check_acceptances(acceptances: Sequence[float]) -> None:
    for i, a in enumerate(acceptances):
        if not 0 <= a <= 1:
            raise ValueError(f"acceptances[{i}]: expected a probability in [0, 1], got {a}")


def check_count(name: str, value: int, fewest: int) -> None:
    if value < fewest:
        raise ValueError(f"{name}: expected at least {fewest}, got {value}")
