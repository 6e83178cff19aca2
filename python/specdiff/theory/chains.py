"""Exact expectations of speculative decoding for models with few states.

p is the target's next-token distribution, q the drafter's. The probability of each state is
propagated token by token in float64, without sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Prefix = tuple[int, ...]
TOLERANCE = 1e-5  # allowed error of a distribution's sum; float32 rows need it


@dataclass(frozen=True, eq=False)
class Pair:
    """Next-token distributions of a target and a drafter, given a state.

    A text begins in state 0. In a pair from `markov` the state is the last token; in one from
    `tree` it is the whole text so far.

    Args:
        p: the target's distribution in each state, [S, V].
        q: the drafter's distribution in each state, [S, V].
        next: the state after each token, int64 [S, V]; -1: texts are not followed further.
        length: maximum length of a text in tokens; None: unlimited.

    Raises:
        ValueError: shapes do not match, a row is not a distribution, or a state does not exist.

    Example:
        >>> half, sure = torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])
        >>> pair = Pair(half, sure, torch.zeros(1, 2, dtype=torch.int64))
        >>> expected_rejections(pair, 3)
        1.5
    """

    p: Tensor
    q: Tensor
    next: Tensor
    length: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "p", as_distributions("p", self.p))
        object.__setattr__(self, "q", as_distributions("q", self.q))
        shape = tuple(self.p.shape)
        if self.p.ndim != 2 or self.q.shape != shape or self.next.shape != shape:
            raise ValueError(
                f"p, q and next: expected three tensors [S, V], got {list(shape)}, "
                f"{list(self.q.shape)} and {list(self.next.shape)}"
            )
        if self.next.dtype != torch.int64:
            raise ValueError(f"next: expected dtype torch.int64, got {self.next.dtype}")
        if self.next.min() < -1 or self.next.max() >= shape[0]:
            raise ValueError(
                f"next: expected states in -1 .. {shape[0] - 1}, got "
                f"{int(self.next.min())} .. {int(self.next.max())}"
            )

    @classmethod
    def markov(cls, p_first: Any, p: Any, q_first: Any, q: Any) -> Pair:
        """Two Markov chains, each by its first token's distribution [V] and the transitions [V, V].

        Example:
            >>> pair = Pair.markov([1, 0], [[0.5, 0.5]] * 2, [1, 0], [[1, 0]] * 2)
            >>> tv_by_position(pair, 3).tolist()
            [0.0, 0.5, 0.5]
        """
        p_rows, q_rows = (
            torch.cat(
                (as_distributions(name + "_first", first)[None], as_distributions(name, rows))
            )
            for name, first, rows in (("p", p_first, p), ("q", q_first, q))
        )
        S, V = p_rows.shape
        return cls(p_rows, q_rows, torch.arange(1, V + 1).expand(S, V))

    @classmethod
    def tree(
        cls,
        p: Callable[[Prefix], Sequence[float] | Tensor],
        q: Callable[[Prefix], Sequence[float] | Tensor],
        V: int,
        length: int,
    ) -> Pair:
        """Two arbitrary models of texts of at most `length` tokens.

        Each model is a function from a prefix to the next token's distribution.

        Example:
            >>> distribution = lambda prefix: [1.0, 0.0] if prefix else [0.5, 0.5]
            >>> Pair.tree(distribution, lambda prefix: [0.25, 0.75], V=2, length=2).p.shape
            torch.Size([3, 2])
        """
        if V < 1 or length < 1:
            raise ValueError(f"V and length: expected at least 1, got {V} and {length}")
        prefixes: list[Prefix] = [()]
        for prefix in prefixes:  # the list grows during the loop
            if len(prefix) < length - 1:
                prefixes += [(*prefix, v) for v in range(V)]
        p_rows, q_rows = (
            torch.stack([as_distributions(name, distribution(x)) for x in prefixes])
            for name, distribution in (("p", p), ("q", q))
        )
        behind = torch.arange(1, len(prefixes) * V + 1).view(-1, V)
        return cls(p_rows, q_rows, behind.where(behind < len(prefixes), -1), length)

    def start(self) -> Tensor:
        """State probabilities of the empty text: 1 for state 0. [S]"""
        return torch.eye(len(self.p), dtype=torch.float64)[0]

    def moved(self, chance: Tensor, emission: Tensor) -> Tensor:
        """State probabilities one token later, from chance [S] and emission [S, V]. -> [S]"""
        behind = chance.new_zeros(len(chance) + 1)  # the last entry collects state -1
        return behind.index_add(0, self.next.flatten() % len(behind),
                                (chance[:, None] * emission).flatten())[:-1]  # fmt: skip

    def check_length(self, N: int) -> None:
        if N < 0 or (self.length is not None and self.length < N):
            most = "" if self.length is None else f" and at most {self.length}, this pair's length"
            raise ValueError(f"number of tokens: expected at least 0{most}, got {N}")


def as_distributions(name: str, rows: Any) -> Tensor:
    """Rows [..., V] as float64, each divided by its sum, which must be near 1.

    Raises:
        ValueError: a row is not a distribution; the message names the argument.
    """
    distributions = torch.as_tensor(rows, dtype=torch.float64)
    if distributions.ndim == 0 or not (
        (distributions >= 0).all() and ((distributions.sum(-1) - 1).abs() < TOLERANCE).all()
    ):
        raise ValueError(
            f"{name}: expected rows of non-negative numbers that sum to 1, got {rows}: apply "
            "softmax first"
        )
    return distributions / distributions.sum(-1, keepdim=True)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """TV = sum (p - q)+ = 1 - sum min(p, q). [..., V] -> [...]

    It is the probability that the token rule rejects a token drawn from q (Leviathan et al.
    2211.17192, Theorem 3.5 and Corollary 3.6).

    Example:
        >>> total_variation(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])).item()
        0.5
    """
    return (p - q).clamp(min=0).sum(-1)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """Residual norm((p - q)+); p itself if p = q. [..., V] -> [..., V]

    Example:
        >>> residual(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])).tolist()
        [0.0, 1.0]
    """
    excess = (p - q).clamp(min=0)
    total = excess.sum(-1, keepdim=True)
    return torch.where(total > 0, excess / total, p)


def tv_by_position(pair: Pair, N: int) -> Tensor:
    """E_{x<n ~ p} TV(p_n, q_n) for n = 1 .. N. -> f64 [N]

    Raises:
        ValueError: N exceeds the pair's length.

    Example:
        >>> pair = Pair.markov([0.5, 0.5], [[0.5, 0.5]] * 2, [1, 0], [[0.5, 0.5], [0, 1]])
        >>> tv_by_position(pair, 2).tolist()
        [0.5, 0.25]
    """
    pair.check_length(N)
    tv, chance, positions = total_variation(pair.p, pair.q), pair.start(), []
    for _ in range(N):
        positions.append(chance @ tv)
        chance = pair.moved(chance, pair.p)
    return torch.stack(positions) if positions else tv[:0]


def expected_rejections(pair: Pair, N: int) -> float:
    """sum_n E_{x<n ~ p} TV(p_n, q_n): expected rejections of the token rule over N tokens.

    All N positions are drafted and examined: drafts reach to the end of the text. See `run_counts`
    for shorter drafts. Yin et al. 2411.00841, theorem on expected rejections.

    This is the minimum over all unbiased schemes of the following class: a drafted token x is
    accepted with a probability b(x) that the past determines, else the token is drawn from a
    distribution r that the past determines (ibid., lower bound). *Proof.* Unbiased means b(x) q(x)
    + P_rej r(x) = p(x) after every prefix that occurs. So b q <= p and b q <= q, hence P_rej = 1 -
    sum b q >= 1 - sum min(p, q) = TV, and prefixes follow p. The token rule, b = min(1, p/q),
    attains the bound. Rules that judge several tokens together, such as block verification, are
    outside the class and may reject less.

    Raises:
        ValueError: N exceeds the pair's length.

    Example:
        >>> pair = Pair.markov([0.5, 0.5], [[0.5, 0.5]] * 2, [1, 0], [[0.5, 0.5], [0, 1]])
        >>> expected_rejections(pair, 2)
        0.75
    """
    return float(tv_by_position(pair, N).sum())


def batch_rejections(pair: Pair, N: int, drafts: int) -> float:
    """Expected rejections over N tokens with M drafts after each rejection.

    A round begins at its *root*. There the first tokens of M independent drafts are tried in turn.
    Token m is accepted with probability min(1, p^m / q), where p^1 = p and p^(m+1) = norm((p^m -
    q)+). The token rule then judges the rest of the accepted draft up to its first rejection.
    Drafts reach to the end of the text. If all M first tokens are rejected, this counts as one
    rejection, and the token is drawn from p^(M+1). Let P(x<n) be the probability of a prefix under
    p, and f(x<n) the probability of the prefix followed by a root. Then

        E = sum_n sum_{x<n} (P - f) TV(p, q) + f prod_{m<=M} TV(p^m, q),    f(empty) = 1
        f(x<=n) = (P - f)(x<n) (p - q)+(x_n) + f(x<n) prod_{m<=M} TV(p^m, q) p^(M+1)(x_n)

    Yin et al. 2411.00841, theorem on batches. The first summand of f is the probability of a
    rejection times the residual, TV norm((p - q)+). M = 1 gives `expected_rejections`.

    Args:
        drafts: M, at least 1.

    Raises:
        ValueError: M is below 1, or N exceeds the pair's length.

    Example:
        >>> pair = Pair.markov([0.5, 0.5], [[0.5, 0.5]] * 2, [0.8, 0.2], [[0.8, 0.2]] * 2)
        >>> [round(batch_rejections(pair, 2, M), 3) for M in (1, 2, 3)]
        [0.6, 0.526, 0.471]
    """
    pair.check_length(N)
    if drafts < 1:
        raise ValueError(f"drafts: expected at least 1, got {drafts}")
    tv = total_variation(pair.p, pair.q)  # [S]
    all_rejected, last = torch.ones_like(tv), pair.p  # prod TV(p^m, q), p^(M+1)
    for _ in range(drafts):
        all_rejected = all_rejected * total_variation(last, pair.q)
        last = residual(last, pair.q)
    excess = (pair.p - pair.q).clamp(min=0)
    total = tv.new_zeros(())
    P = f = pair.start()
    for _ in range(N):
        total = total + (P - f) @ tv + f @ all_rejected
        f = pair.moved(P - f, excess) + pair.moved(f, all_rejected[:, None] * last)
        P = pair.moved(P, pair.p)
    return float(total)


def conditional_acceptances(pair: Pair, K: int, state: int = 0) -> Tensor:
    """P(drafted token i is accepted | all before it are), i = 1 .. K, from one state. -> f64 [K]

    A draft's first k tokens are accepted with probability A_k = sum over x of prod_{i<=k} min(p_i,
    q_i)(x_i). Returned are A_k / A_(k-1), 0 where A_(k-1) = 0. They differ from 1 - E TV, because
    an accepted prefix follows the normalised prod min(p, q), not p.

    Raises:
        ValueError: K exceeds the pair's length.

    Example:
        >>> pair = Pair.markov([0.5, 0.5], [[0.5, 0.5]] * 2, [0.8, 0.2], [[0.8, 0.2]] * 2)
        >>> [round(a, 9) for a in conditional_acceptances(pair, 2).tolist()]
        [0.7, 0.7]
    """
    pair.check_length(K)
    chance = torch.eye(len(pair.p), dtype=torch.float64)[state]
    both, acceptances = torch.minimum(pair.p, pair.q), []
    for _ in range(K):
        before, accepted = chance.sum(), chance @ both.sum(-1)
        acceptances.append(torch.where(before > 0, accepted / before, before))
        chance = pair.moved(chance, both)
    return torch.stack(acceptances) if acceptances else both[0, :0]


class RunCounts(NamedTuple):
    """Expected counts over a run of N tokens."""

    rounds: float  # rounds begun, each with one target forward
    examined: float  # positions where a drafted token was judged
    rejections: float  # rounds = 1 + rejections and bonus tokens before the last token


def run_counts(pair: Pair, N: int, K: int) -> RunCounts:
    """Rounds, examined positions and rejections over N tokens with drafts of K, token rule.

    A round examines its drafted tokens in turn. A rejection ends it with a token from the residual.
    If all K tokens are accepted, it ends with a bonus token, drawn from p and not examined. So
    rejections are fewer than `expected_rejections`, and a target forward yields N / rounds tokens.

    Raises:
        ValueError: K is below 0, or N exceeds the pair's length.

    Example:
        >>> pair = Pair.markov([0.5, 0.5], [[0.5, 0.5]] * 2, [1, 0], [[1, 0]] * 2)
        >>> run_counts(pair, 3, 1)
        RunCounts(rounds=2.25, examined=2.25, rejections=1.125)
    """
    pair.check_length(N)
    if K < 0:
        raise ValueError(f"K: expected at least 0, got {K}")
    tv, both = total_variation(pair.p, pair.q), torch.minimum(pair.p, pair.q)
    excess = (pair.p - pair.q).clamp(min=0)
    # indexed by the number of tokens accepted so far
    at = [pair.start(), *(torch.zeros_like(tv) for _ in range(K))]
    rounds, examined, rejections = torch.zeros(3, dtype=torch.float64)
    for _ in range(N):
        drafted = torch.stack(at[:K]).sum(0) if K else torch.zeros_like(tv)
        rounds, examined = rounds + at[0].sum(), examined + drafted.sum()
        rejections = rejections + drafted @ tv
        ended = pair.moved(drafted, excess) + pair.moved(at[K], pair.p)
        at = [ended, *(pair.moved(chance, both) for chance in at[:K])]
    return RunCounts(float(rounds), float(examined), float(rejections))
