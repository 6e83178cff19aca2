"""Lenient acceptance rules: they accept more than the exact rule, at the price of a bias.

A rule accepts a token x drawn from q with probability b(x), and else draws from norm((p - b q)+).
All rules here have b >= min(1, p/q), the exact rule, and never accept a token with p = 0. Yin et
al. 2411.00841, tradeoff between rejections and bias.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from .chains import Pair, residual, total_variation
from .speed import least


class Outcome(NamedTuple):
    """Result of a rule at one position. Floats [...] for distributions [..., V]."""

    rejection: Tensor  # P_rej = 1 - sum b q
    distribution: Tensor  # [..., V], of the emitted token
    bias: Tensor  # TV(distribution, p)


def outcome(p: Tensor, q: Tensor, accept: Tensor) -> Outcome:
    """P_rej = 1 - sum b q, distribution = b q + P_rej norm((p - b q)+), bias = TV(distribution, p).

    For every b with min(1, p/q) <= b <= 1, bias + P_rej = TV(p, q). *Proof.* Where p >= q, b = 1;
    where p < q, b q >= p. So (p - b q)+ = (p - q)+, whose sum is TV. Where p >= q, the distribution
    is q + (P_rej / TV) (p - q); elsewhere it is b q >= p. Hence bias = sum (p - distribution)+ =
    (1 - P_rej / TV) TV.

    No b and no residual do better. First, TV(p, q) <= TV(p, distribution) + TV(distribution, q).
    Second, TV(distribution, q) <= P_rej, since the emitted token differs from the token drawn from
    q only after a rejection.

    A b <= min(1, p/q) is unbiased and rejects with probability at least TV.

    Args:
        p, q: distributions [..., V].
        accept: b [..., V] in [0, 1].

    Example:
        >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])
        >>> rejection, distribution, bias = outcome(p, q, ensemble(p, q, 0.5))
        >>> rejection.item(), distribution.tolist(), bias.item()
        (0.25, [0.75, 0.25], 0.25)
    """
    kept = accept * q
    rejection = (1 - kept.sum(-1)).clamp(min=0)
    distribution = kept + rejection[..., None] * residual(p, kept)
    return Outcome(rejection, distribution, total_variation(p, distribution))


def lenience(p: Tensor, q: Tensor, l: float) -> Tensor:  # noqa: E741 as in the formula
    """b = min(1, p / (l q)), Leviathan et al. 2211.17192. l = 1 is exact; 0 accepts all p > 0.

    bias <= (1 - l) sum of q where q > p, since b q - p <= (1 - l) q there.

    Raises:
        ValueError: l is outside [0, 1].

    Example:
        >>> lenience(torch.tensor([0.25, 0.75]), torch.tensor([1.0, 0.0]), 0.5).tolist()
        [0.5, 1.0]
    """
    check_unit("l", l)
    return capped(p, p, l * q)


def additive(p: Tensor, q: Tensor, eps: float) -> Tensor:
    """b = min(1, (p + eps) / q). eps = 0 is exact; 1 accepts all tokens with p > 0.

    bias = sum of min(q - p, eps) where q > p > 0, at most eps times the number of such tokens.

    Raises:
        ValueError: eps is outside [0, 1].

    Example:
        >>> additive(torch.tensor([0.25, 0.75]), torch.tensor([1.0, 0.0]), 0.5).tolist()
        [0.75, 1.0]
    """
    check_unit("eps", eps)
    return capped(p, p + eps, q)


def ensemble(p: Tensor, q: Tensor, w: float) -> Tensor:
    """b = min(1, 1 - w + w p / q). w = 1 is exact; 0 accepts all tokens with p > 0.

    P_rej = w TV + (1 - w) s and bias = (1 - w) (TV - s), where s is the sum of q where p = 0.

    Raises:
        ValueError: w is outside [0, 1].

    Example:
        >>> ensemble(torch.tensor([0.25, 0.75]), torch.tensor([1.0, 0.0]), 0.5).tolist()
        [0.625, 1.0]
    """
    check_unit("w", w)
    return capped(p, (1 - w) * q + w * p, q)


Rule = Callable[[Tensor, Tensor, float], Tensor]
# rule, its parameter when exact, its most lenient parameter
LENIENT_RULES: dict[str, tuple[Rule, float, float]] = {
    "lenience": (lenience, 1.0, 0.0),
    "additive": (additive, 0.0, 1.0),
    "ensemble": (ensemble, 1.0, 0.0),
}


class LenientRun(NamedTuple):
    """Expected sums over the positions of N tokens, all of them examined."""

    rejections: float
    bias: float  # upper bound of the total variation between the text's distribution and p


def lenient_run(pair: Pair, N: int, rule: Callable[[Tensor, Tensor], Tensor]) -> LenientRun:
    """Expected rejections and bias over N tokens decoded by a rule.

    The text follows pi, the product of the distributions of `outcome`. The expectations are over
    prefixes of pi, and

        TV(pi over N tokens, p over N tokens) <= sum_n E_{x<n ~ pi} bias_n

    *Proof.* pi(x<=n) - p(x<=n) = pi(x<n) (pi_n - p_n) + (pi(x<n) - p(x<n)) p_n. Half the sum of
    absolute values is at most E_pi bias_n plus the total variation over n - 1 tokens. With pi and p
    exchanged on the right, the same holds for prefixes of p, which are those of an exact run.

    Args:
        rule: (p, q) -> b, [S, V] each, at least min(1, p/q).

    Raises:
        ValueError: a text of N tokens cannot be followed.

    Example:
        >>> pair = Pair.markov([0.5, 0.5], [[0.5, 0.5]] * 2, [0.8, 0.2], [[0.8, 0.2]] * 2)
        >>> run = lenient_run(pair, 2, lambda p, q: ensemble(p, q, 0.5))
        >>> round(run.rejections, 9), round(run.bias, 9)
        (0.3, 0.3)
    """
    pair.check_length(N)
    rejection, distribution, bias = outcome(pair.p, pair.q, rule(pair.p, pair.q))
    chance, rejections, biases = pair.start(), bias.new_zeros(()), bias.new_zeros(())
    for _ in range(N):
        rejections, biases = rejections + chance @ rejection, biases + chance @ bias
        chance = pair.moved(chance, distribution)
    return LenientRun(float(rejections), float(biases))


def ensemble_weight(budget: float, N: int, mean_tv: float) -> float:
    """w = max(0, 1 - budget / (N mean_tv)): the ensemble weight for a bias budget over N tokens.

    Each step's bias is at most (1 - w) TV (`ensemble`). So a text of N tokens is within `budget` of
    the target's distribution in total variation (`lenient_run`). This is an upper bound, not the
    bias itself. It holds if `mean_tv` is at least (1/N) sum_n E TV_n over prefixes of p, which an
    exact run estimates (`RejectionEstimate`), or over prefixes of the ensemble's own text.

    Raises:
        ValueError: budget is negative, N is below 1, or mean_tv is outside [0, 1].

    Example:
        >>> ensemble_weight(budget=2, N=100, mean_tv=0.25)
        0.92
    """
    check_budget(budget, N)
    check_unit("mean_tv", mean_tv)
    total = N * mean_tv
    return 1 - budget / total if budget < total else 0.0


def parameter_for(name: str, budget: float, N: int, p: Tensor, q: Tensor) -> float:
    """The most lenient parameter of a rule whose mean bias over given rows is at most budget / N.

    It is like `ensemble_weight`, but for every rule, and no stricter than necessary. The upper
    bound holds if the rows' mean bias equals that of the N steps. Rows of an exact run estimate it.

    Args:
        name: "lenience", "additive" or "ensemble".
        p, q: f64 [n, V], distributions of target and drafter at examined positions.

    Raises:
        ValueError: the rule is unknown, budget is negative, or N is below 1.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]).double(), torch.tensor([[1.0, 0.0]]).double()
        >>> [round(parameter_for(name, 1, 4, p, q), 9) for name in LENIENT_RULES]
        [0.666666667, 0.25, 0.5]
    """
    if name not in LENIENT_RULES:
        raise ValueError(f"name: expected one of {', '.join(LENIENT_RULES)}, got {name!r}")
    check_budget(budget, N)
    rule, exact, most = LENIENT_RULES[name]
    at = lambda strictness: most + strictness * (exact - most)
    bias = lambda x: float(outcome(p, q, rule(p, q, x)).bias.mean())
    strictness = least(lambda s: bias(at(s)) <= budget / N, 0.0, 1.0)
    return exact if strictness is None else at(strictness)  # None: by rounding of 1e-17


def capped(p: Tensor, numerator: Tensor, denominator: Tensor) -> Tensor:
    """min(1, numerator / denominator); 0 where p = 0, 1 where only the denominator is 0."""
    ratio = torch.where(numerator < denominator, numerator / denominator, 1.0)
    return torch.where(p > 0, ratio, 0.0)


def check_unit(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise ValueError(f"{name}: expected a number in [0, 1], got {value}")


def check_budget(budget: float, N: int) -> None:
    if not budget >= 0:
        raise ValueError(f"budget: expected at least 0, got {budget}")
    if N < 1:
        raise ValueError(f"N: expected at least 1, got {N}")
