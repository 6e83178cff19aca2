"""Exact expectations of speculative decoding for a pair of distributions over few states.

p is the target's distribution of the next token, q the drafter's. Texts are followed by their
chance of
being in each state, one token at a time, in float64: no sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

Prefix = tuple[int, ...]
TOLERANCE = 1e-5  # what a distribution's sum may differ from 1 by: that of float32 rows does


@dataclass(frozen=True, eq=False)
class Pair:
    """Next-token distributions of a target and a drafter that depend on the text through a state
    alone.

    A text begins in state 0. `markov` makes a pair whose state is the last token, `tree` one whose
    state is the whole text so far.

    Args:
        p: the target's distribution in each state, [S, V].
        q: the drafter's, [S, V].
        next: the state behind each token, int64 [S, V]; -1: no text is followed beyond it.
        length: how many tokens of a text can be followed; None: any number.

    Raises:
        ValueError: shapes that do not match, a row that is no distribution, a state that does not
            exist.

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
        """Two Markov chains: the distribution of the first token [V], and behind each token [V, V].

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
        """Any two distributions, of texts of at most `length` tokens: called with each shorter
        prefix.

        Example:
            >>> distribution = lambda prefix: [1.0, 0.0] if prefix else [0.5, 0.5]
            >>> Pair.tree(distribution, lambda prefix: [0.25, 0.75], V=2, length=2).p.shape
            torch.Size([3, 2])
        """
        if V < 1 or length < 1:
            raise ValueError(f"V and length: expected at least 1, got {V} and {length}")
        prefixes: list[Prefix] = [()]
        for prefix in prefixes:  # grows on the way
            if len(prefix) < length - 1:
                prefixes += [(*prefix, v) for v in range(V)]
        p_rows, q_rows = (
            torch.stack([as_distributions(name, distribution(x)) for x in prefixes])
            for name, distribution in (("p", p), ("q", q))
        )
        behind = torch.arange(1, len(prefixes) * V + 1).view(-1, V)
        return cls(p_rows, q_rows, behind.where(behind < len(prefixes), -1), length)

    def start(self) -> Tensor:
        """The empty text: all chance in state 0. [S]"""
        return torch.eye(len(self.p), dtype=torch.float64)[0]

    def moved(self, chance: Tensor, emission: Tensor) -> Tensor:
        """One token on: chance [S] of each state, times emission [S, V] of each token. -> [S]"""
        behind = chance.new_zeros(len(chance) + 1)  # the last entry: not followed
        return behind.index_add(0, self.next.flatten() % len(behind),
                                (chance[:, None] * emission).flatten())[:-1]  # fmt: skip

    def check_length(self, N: int) -> None:
        if N < 0 or (self.length is not None and self.length < N):
            most = "" if self.length is None else f" and at most {self.length}, as this pair has"
            raise ValueError(f"number of tokens: expected at least 0{most}, got {N}")


def as_distributions(name: str, rows: Any) -> Tensor:
    """Rows [..., V] as float64, each non-negative and divided by its sum, which has to be near 1.

    Raises:
        ValueError: names the argument.
    """
    distributions = torch.as_tensor(rows, dtype=torch.float64)
    if distributions.ndim == 0 or not (
        (distributions >= 0).all() and ((distributions.sum(-1) - 1).abs() < TOLERANCE).all()
    ):
        raise ValueError(
            f"{name}: expected rows of non-negative numbers that sum to 1, got {rows}: take the "
            "softmax first"
        )
    return distributions / distributions.sum(-1, keepdim=True)


def total_variation(p: Tensor, q: Tensor) -> Tensor:
    """TV = sum (p - q)+ = 1 - sum min(p, q). [..., V] -> [...]

    The chance that the token rule rejects a token drawn from q (Leviathan et al. 2211.17192,
    Theorem 3.5 and Corollary 3.6).

    Example:
        >>> total_variation(torch.tensor([0.5, 0.5]), torch.tensor([1.0, 0.0])).item()
        0.5
    """
    return (p - q).clamp(min=0).sum(-1)


def residual(p: Tensor, q: Tensor) -> Tensor:
    """norm((p - q)+), and p where that is 0 everywhere. [..., V] -> [..., V]

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
        ValueError: a text of N tokens cannot be followed.

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
    """sum_n E_{x<n ~ p} TV(p_n, q_n): rejections of the token rule over N tokens.

    Every one of the N positions is drafted and examined (drafts reach to the end of the text; with
    shorter ones see `run_counts`). Yin et al. 2411.00841, the theorem on expected rejections.

    It is also the least of all unbiased schemes that accept a drafted token x with a probability
    b(x) set by the past, and else draw from a distribution r set by the past (ibid., the lower
    bound). *Proof.* Unbiased means b(x) q(x) + P_rej r(x) = p(x) behind every prefix that occurs.
    So b q <= p, b q <= q, hence P_rej = 1 - sum b q >= 1 - sum min(p, q) = TV, and prefixes follow
    p. b = min(1, p/q), the token rule, attains it. Rules that judge several tokens together, such
    as block verification, are outside of that class and may reject less.

    Raises:
        ValueError: a text of N tokens cannot be followed.

    Example:
        >>> pair = Pair.markov([0.5, 0.5], [[0.5, 0.5]] * 2, [1, 0], [[0.5, 0.5], [0, 1]])
        >>> expected_rejections(pair, 2)
        0.75
    """
    return float(tv_by_position(pair, N).sum())


def batch_rejections(pair: Pair, N: int, drafts: int) -> float:
    """Expected rejections over N tokens with M drafts behind each rejection.

    Where a round begins (the *root*), the first tokens of M independent drafts are tried in turn:
    number m is accepted with probability min(1, p^m / q), where p^1 = p, p^(m+1) = norm((p^m -
    q)+). The first to be accepted is the draft that is followed by the token rule, up to its first
    rejection; drafts reach to the end of the text. That all M are rejected at the root counts as
    one rejection, after which the token comes from p^(M+1). With P(x<n) the chance of a prefix
    under p and f(x<n) that of the prefix with a root behind it,

        E = sum_n sum_{x<n} (P - f) TV(p, q) + f prod_{m<=M} TV(p^m, q),    f(empty) = 1
        f(x<=n) = (P - f)(x<n) (p - q)+(x_n) + f(x<n) prod_{m<=M} TV(p^m, q) p^(M+1)(x_n)

    Yin et al. 2411.00841, the theorem on batches. The first summand of f is the chance of a
    rejection times the residual's, TV norm((p - q)+); M = 1 gives `expected_rejections`.

    Args:
        drafts: M, at least 1.

    Raises:
        ValueError: M below 1, or a text of N tokens cannot be followed.

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
    """P(drafted token i is accepted | all before it are), i = 1 .. K, behind one state. -> f64 [K]

    The chance that a draft's first k tokens are accepted is sum over x of prod_{i<=k} min(p_i,
    q_i)(x_i), whose ratios these are; 0 once nothing is left. They are not 1 - E TV: a prefix that
    was accepted follows prod min(p, q), made to sum to 1, and not p.

    Raises:
        ValueError: a draft of K tokens cannot be followed.

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
    """Expected counts of a run of N tokens."""

    rounds: float  # target forwards begun: positions that a round begins with
    examined: float  # positions where a drafted token was judged
    rejections: float  # of those; rounds = 1 + rejections and bonus tokens before the last token


def run_counts(pair: Pair, N: int, K: int) -> RunCounts:
    """Rounds, examined positions and rejections of N tokens by drafts of K, token rule.

    A round examines its tokens in turn. At the first rejection the residual's token ends it; if
    all K are accepted, one token more, drawn from p and not examined, does. So fewer rejections
    than `expected_rejections`, and N / rounds tokens a target forward.

    Raises:
        ValueError: K below 0, or a text of N tokens cannot be followed.

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
    at = [pair.start(), *(torch.zeros_like(tv) for _ in range(K))]  # by tokens accepted so far
    rounds, examined, rejections = torch.zeros(3, dtype=torch.float64)
    for _ in range(N):
        drafted = torch.stack(at[:K]).sum(0) if K else torch.zeros_like(tv)
        rounds, examined = rounds + at[0].sum(), examined + drafted.sum()
        rejections = rejections + drafted @ tv
        ended = pair.moved(drafted, excess) + pair.moved(at[K], pair.p)
        at = [ended, *(pair.moved(chance, both) for chance in at[:K])]
    return RunCounts(float(rounds), float(examined), float(rejections))
