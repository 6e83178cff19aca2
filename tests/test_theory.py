"""Each formula of specdiff.theory against enumeration, and against the op.

The enumerations are written for themselves, in plain Python, from what the algorithms do: every
drafted token, every acceptance and every residual draw with its chance, summed by `math.fsum`.

TOLERANCE. All chances are products and sums of non-negative numbers, so that every addition and
multiplication adds a relative error of at most u = 2^-53. On the formulas' side a value is a
sum over N positions, of at most V^N states of total chance 1, each a product of at most 2 N
factors and of sums of V; with M drafts (p^m - q)+ adds M (V + 4) u of absolute error, since the
division by its sum is undone by the product that it stands in. Rows of distributions sum to 1
within V u. Together N (V^N + M (V + 4) + 2 N + N V) u <= 6e-13 for N = 5, V = 4, M = 3: 1e-12 is
enough.
"""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache, partial
from itertools import pairwise, product
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from specdiff import theory
from specdiff.theory import LENIENT_RULES, Pair, RejectionEstimate
from specdiff_kernels import Draft, row_distribution, sample, verify
from specdiff_kernels.reference.numerics import weights
from tests.enumeration import WORDS, first_word, probabilities

TOLERANCE = 1e-12
BENCHMARKS = Path(__file__).parents[1] / "benchmarks"
Distribution = list[float]
Text = tuple[int, ...]


def near(a: float, b: float) -> bool:
    return abs(a - b) < TOLERANCE


# --- worlds ---------------------------------------------------------------------------------------


class World(NamedTuple):
    """Distributions of the next token behind a prefix, and the same as a Pair."""

    V: int
    p: Callable[[Text], Distribution]
    q: Callable[[Text], Distribution]
    pair: Pair


def random_distribution(V: int, key: str, zeros: bool) -> Distribution:
    noise = random.Random(key)
    row = [math.exp(noise.gauss(0, 1.3)) for _ in range(V)]
    if zeros and noise.random() < 0.5:
        row[noise.randrange(V)] = 0.0
    return [x / sum(row) for x in row]


@cache
def world(V: int, N: int, seed: int, kind: str = "markov") -> World:
    """kind "markov": distributions of the last token; "tree": of the whole prefix; "zeros": a tree
    where some tokens have probability 0 under one distribution or the other."""
    zeros = kind == "zeros"
    seen = (lambda x: x[-1:]) if kind == "markov" else (lambda x: x)
    p, q = (
        cache(lambda x, name=name: random_distribution(V, f"{seed} {kind} {name} {seen(x)}", zeros))
        for name in "pq"
    )
    if kind == "markov":
        rows = [
            (distribution(()), [distribution((v,)) for v in range(V)]) for distribution in (p, q)
        ]
        pair = Pair.markov(*rows[0], *rows[1])
    else:
        pair = Pair.tree(p, q, V, N)
    return World(V, p, q, pair)


WORLDS = [(V, N, seed, kind) for kind in ("markov", "tree", "zeros")
          for seed, (V, N) in enumerate([(2, 3), (2, 5), (3, 4), (4, 3)])]  # fmt: skip
worlds = pytest.mark.parametrize("key", WORLDS, ids=lambda key: f"{key[3]}-V{key[0]}-N{key[1]}")


def token_rule(p: Distribution, q: Distribution) -> Distribution:
    return [1.0 if b <= a else a / b for a, b in zip(p, q, strict=True)]


def positive(p: Distribution, q: Distribution) -> Distribution:
    return [max(a - b, 0.0) for a, b in zip(p, q, strict=True)]


def tv_of(p: Distribution, q: Distribution) -> float:
    return math.fsum(positive(p, q))


# --- runs of the token rule, one by one -----------------------------------------------------------


class Run(NamedTuple):
    """One way that N tokens may come about."""

    chance: float
    text: Text
    judged: tuple[int, ...]  # by position, 1: a drafted token was
    rejected: tuple[int, ...]


def runs(
    w: World,
    N: int,
    K: int | Callable[[Run], int],
    rule: Callable[[Distribution, Distribution], Distribution] = token_rule,
) -> Iterator[Run]:
    """Every run of drafts of K: a drafted token, its acceptance, the residual's token. K may be a
    function of what came before the round."""
    length = K if callable(K) else lambda _: K

    def extend(run: Run, left: int) -> Iterator[Run]:
        """left: drafted tokens of this round that are still to be judged."""
        if len(run.text) == N:
            yield run
            return
        p, q = w.p(run.text), w.q(run.text)
        if left == 0:
            for v in range(w.V):
                yield from begin(grown(run, p[v], v, 0, 0))
            return
        b = rule(p, q)
        excess = positive(p, [x * y for x, y in zip(b, q, strict=True)])
        total = math.fsum(excess)
        for x in range(w.V):
            yield from extend(grown(run, q[x] * b[x], x, 1, 0), left - 1)
            for v in range(w.V) if b[x] < 1 and total > 0 else ():
                chance = q[x] * (1 - b[x]) * excess[v] / total
                yield from begin(grown(run, chance, v, 1, 1))

    def begin(run: Run) -> Iterator[Run]:
        return extend(run, length(run))

    for run in begin(Run(1.0, (), (), ())):
        if run.chance > 0:
            yield run


def grown(run: Run, chance: float, v: int, judged: int, rejected: int) -> Run:
    return Run(run.chance * chance, (*run.text, v), (*run.judged, judged),
               (*run.rejected, rejected))  # fmt: skip


def mean(every: list[Run], value: Callable[[Run], float]) -> float:
    return math.fsum(run.chance * value(run) for run in every)


def variance(every: list[Run], value: Callable[[Run], float]) -> float:
    return mean(every, lambda run: value(run) ** 2) - mean(every, value) ** 2


def text_distance(w: World, every: list[Run]) -> float:
    """Total variation between the distribution of the runs' texts and the target's."""
    distribution: dict[Text, list[float]] = {}
    for run in every:
        distribution.setdefault(run.text, []).append(run.chance)
    N = len(every[0].text)
    return (
        math.fsum(
            abs(math.fsum(distribution.get(x, [])) - math.prod(w.p(x[:n])[x[n]] for n in range(N)))
            for x in product(range(w.V), repeat=N)
        )
        / 2
    )


def exact_chances(w: World, run: Run) -> list[float]:
    """TV at each judged position, 0 elsewhere."""
    return [a * tv_of(w.p(run.text[:n]), w.q(run.text[:n])) for n, a in enumerate(run.judged)]


def chances_given_tokens(w: World, run: Run) -> list[float]:
    """(1 - q / p)+ of the emitted tokens, where a drafted one was judged."""
    return [
        a * max(0.0, 1 - w.q(run.text[:n])[x] / w.p(run.text[:n])[x])
        for n, (a, x) in enumerate(zip(run.judged, run.text, strict=True))
    ]


# --- rejections -----------------------------------------------------------------------------------


@worlds
def test_expected_rejections(key):
    V, N, *_ = key
    w, every = world(*key), list(runs(world(*key), N, N))
    assert text_distance(w, every) < TOLERANCE
    found = theory.tv_by_position(w.pair, N)
    for n in range(N):
        prefixes = product(range(V), repeat=n)
        of_p = math.fsum(
            math.prod(w.p(x[:i])[x[i]] for i in range(n)) * tv_of(w.p(x), w.q(x)) for x in prefixes
        )
        assert near(found[n], of_p)
        assert near(found[n], mean(every, lambda run: run.rejected[n]))  # noqa: B023
    assert near(theory.expected_rejections(w.pair, N), mean(every, lambda run: sum(run.rejected)))


@worlds
def test_no_unbiased_scheme_rejects_less(key):
    """Any b with b q <= min(p, q) and the residual that makes up for it is unbiased; one that is
    below the token rule's anywhere rejects more."""
    _, N, seed, _ = key
    w, noise = world(*key), random.Random(seed)
    factors = cache(lambda p, x: noise.choice([1.0, noise.random()]))

    def shy(p: Distribution, q: Distribution) -> Distribution:
        return [b * factors(tuple(p), x) for x, b in enumerate(token_rule(p, q))]

    every = list(runs(w, N, N, shy))
    assert text_distance(w, every) < TOLERANCE
    least = theory.expected_rejections(w.pair, N)
    assert mean(every, lambda run: sum(run.rejected)) > least + 1e-3


@worlds
@pytest.mark.parametrize("K", [0, 1, 2])
def test_run_counts(key, K):
    _, N, *_ = key
    w, every = world(*key), list(runs(world(*key), N, K))
    assert text_distance(w, every) < TOLERANCE
    rounds, examined, rejections = theory.run_counts(w.pair, N, K)
    assert near(examined, mean(every, lambda run: sum(run.judged)))
    assert near(rejections, mean(every, lambda run: sum(run.rejected)))

    def begun(run: Run) -> int:
        """Rounds: the first one, and one behind each rejection and each bonus."""
        return 1 + sum(r or not a for a, r in zip(run.judged[:-1], run.rejected[:-1], strict=True))

    assert near(rounds, mean(every, begun))
    if K > 0:
        assert rejections < theory.expected_rejections(w.pair, N) + TOLERANCE


def test_drafts_that_reach_the_end_examine_everything():
    pair = world(3, 4, 2, "tree").pair
    counts = theory.run_counts(pair, 4, 4)
    assert near(counts.examined, 4)
    assert near(counts.rejections, theory.expected_rejections(pair, 4))


# --- several drafts -------------------------------------------------------------------------------


def rejections_of_batches(w: World, N: int, M: int) -> float:
    """M whole drafts behind each rejection, all V^(M (N - n)) of them, tried at the root."""

    @cache
    def at_root(text: Text) -> float:
        if len(text) == N:
            return 0.0
        one = [(d, math.prod(w.q(text + d[:i])[d[i]] for i in range(len(d))))
               for d in product(range(w.V), repeat=N - len(text))]  # fmt: skip
        return math.fsum(
            math.prod(chance for _, chance in drafts) * tried(text, [d for d, _ in drafts])
            for drafts in product(one, repeat=M)
        )

    def tried(text: Text, drafts: list[Text]) -> float:
        distribution, q, left, parts = w.p(text), w.q(text), 1.0, []
        for draft in drafts:
            accept = token_rule(distribution, q)[draft[0]]
            parts.append(left * accept * followed(text, draft, 1))
            left *= 1 - accept
            excess = positive(distribution, q)
            if left == 0 or sum(excess) == 0:
                return math.fsum(parts)
            distribution = [x / math.fsum(excess) for x in excess]
        behind = [distribution[v] * at_root((*text, v)) for v in range(w.V)]
        return math.fsum([*parts, left * (1 + math.fsum(behind))])

    def followed(text: Text, draft: Text, i: int) -> float:
        """The draft's first i tokens stand."""
        if i == len(draft):
            return 0.0
        here = text + draft[:i]
        p, q = w.p(here), w.q(here)
        accept, excess = token_rule(p, q)[draft[i]], positive(p, q)
        total = followed(text, draft, i + 1) * accept
        if accept < 1:
            behind = [x / math.fsum(excess) * at_root((*here, v)) for v, x in enumerate(excess)]
            total += (1 - accept) * (1 + math.fsum(behind))
        return total

    return at_root(())


BATCHES = [(2, 3, 1), (2, 3, 2), (2, 3, 3), (2, 4, 2), (3, 3, 2), (4, 2, 3)]


@pytest.mark.parametrize("kind", ["markov", "tree", "zeros"])
@pytest.mark.parametrize(("V", "N", "M"), BATCHES)
def test_batches(V, N, M, kind):
    for seed in range(2):
        w = world(V, N, seed, kind)
        assert near(theory.batch_rejections(w.pair, N, M), rejections_of_batches(w, N, M))


@pytest.mark.parametrize("kind", ["markov", "zeros"])
def test_more_drafts_reject_less(kind):
    pair = world(4, 3, 3, kind).pair
    found = [theory.batch_rejections(pair, 3, M) for M in (1, 2, 3, 8)]
    assert near(found[0], theory.expected_rejections(pair, 3))
    assert found == sorted(found, reverse=True)


# --- estimates ------------------------------------------------------------------------------------


@worlds
@pytest.mark.parametrize("K", [1, 2, 9])
def test_estimates_are_unbiased(key, K):
    """Of the rejections of this way of decoding; of sum E TV if everything is examined."""
    _, N, *_ = key
    w, every = world(*key), list(runs(world(*key), N, K))
    expected = theory.run_counts(w.pair, N, K).rejections
    for chances in (exact_chances, chances_given_tokens):
        assert near(mean(every, lambda run: sum(chances(w, run))), expected)  # noqa: B023
        for n in range(N):  # an expectation given something has less variance
            spread = variance(every, lambda run: run.rejected[n])  # noqa: B023
            assert variance(every, lambda run: chances(w, run)[n]) < spread + TOLERANCE  # noqa: B023
    if N <= K:
        assert near(expected, theory.expected_rejections(w.pair, N))
        spread = variance(every, lambda run: sum(run.rejected))
        assert variance(every, lambda run: sum(chances_given_tokens(w, run))) < spread + TOLERANCE
    else:
        assert expected < theory.expected_rejections(w.pair, N) - 1e-3


@worlds
def test_estimates_with_adaptive_lengths(key):
    """K by the past: longer after each run of acceptances, shorter where tokens were rejected."""
    _, N, *_ = key
    w = world(*key)
    every = list(runs(w, N, lambda run: 1 + sum(run.judged) - sum(run.rejected)))
    assert text_distance(w, every) < TOLERANCE
    expected = mean(every, lambda run: sum(run.rejected))
    for chances in (exact_chances, chances_given_tokens):
        assert near(mean(every, lambda run: sum(chances(w, run))), expected)  # noqa: B023


def test_the_sum_of_tv_may_vary_more_than_the_count():
    """A rejection leads to where none follows, an acceptance to where one does: always one."""
    p, q = lambda x: [0.5, 0.5] if not x else [1.0, 0.0], lambda x: [1.0, 0.0]
    q_tree = lambda x: q(x) if x != (0,) else [0.0, 1.0]
    w = World(2, p, q_tree, Pair.tree(p, q_tree, 2, 2))
    every = list(runs(w, 2, 2))
    assert variance(every, lambda run: sum(run.rejected)) < TOLERANCE
    assert near(variance(every, lambda run: sum(exact_chances(w, run))), 0.25)
    assert variance(every, lambda run: sum(chances_given_tokens(w, run))) < TOLERANCE


def test_rejected_given_token_averages_to_tv():
    p, q = (
        torch.tensor(random_distribution(4, key, True), dtype=torch.float64) for key in ("a", "bb")
    )
    likely = p.nonzero()[:, 0]
    chance = theory.rejected_given_token(p.expand(len(likely), 4), q.expand(len(likely), 4), likely)
    assert near(p[likely] @ chance, theory.total_variation(p, q))


# --- the op ---------------------------------------------------------------------------------------


class Tables(NamedTuple):
    """A Markov world as logits f32 [V + 1, V], row 0 for the first token, and its Pair."""

    target: Tensor
    draft: Tensor
    pair: Pair


def tables(V: int, seed: int, spread: float = 1.5) -> Tables:
    noise = torch.Generator().manual_seed(seed)
    target, draft = (spread * torch.randn(V + 1, V, generator=noise) for _ in range(2))
    # the op's own distributions, e / Z
    e = [weights(rows, row_distribution(rows)).double() for rows in (target, draft)]
    p, q = (x / x.sum(-1, keepdim=True) for x in e)
    return Tables(target, draft, Pair.markov(p[0], p[1:], q[0], q[1:]))


@pytest.mark.parametrize("V", [2, 3, 4])
def test_the_op_rejects_as_often_as_the_formula_says(V):
    """Its chances of acceptance and its residuals by bisection over the words, then N tokens."""
    N, t = 4, tables(V, seed=V)
    state, token = (x.flatten() for x in torch.meshgrid(*map(torch.arange, (V + 1, V)),
                                                        indexing="ij"))  # fmt: skip
    draft = Draft(token[:, None], torch.zeros_like(token)[:, None].int(), state[:, None],
                  t.draft, row_distribution(t.draft))  # fmt: skip
    logits = torch.stack((t.target[state], torch.zeros(len(state), V)), 1)

    def emitted(accept: Tensor, last: Tensor):
        return verify(logits, draft, words=torch.stack((accept, last), 1))

    highest = torch.full_like(token, -1)  # the word of the largest u
    edges = first_word(lambda word: emitted(word, highest).accepted == 0, len(state))
    accept = torch.tensor([edge / WORDS for edge in edges], dtype=torch.float64)
    behind = probabilities(lambda word: emitted(highest, word).emitted[:, 0], len(state), V)
    behind = torch.tensor([list(map(float, row)) for row in behind], dtype=torch.float64)

    q = t.pair.q.flatten()
    rejected = (q * (1 - accept)).view(V + 1, V).sum(1)
    residuals = (q * (1 - accept))[:, None] * behind
    distribution = (q * accept).view(V + 1, V) + residuals.view(V + 1, V, V).sum(1)
    assert (distribution - t.pair.p).abs().max() < TOLERANCE
    assert (rejected - theory.total_variation(t.pair.p, t.pair.q)).abs().max() < TOLERANCE
    chance, total = t.pair.start(), 0.0
    for _ in range(N):
        total += float(chance @ rejected)
        chance = t.pair.moved(chance, distribution)
    assert near(total, theory.expected_rejections(t.pair, N))


class Seen(NamedTuple):
    """Of every drafted position of a run over B sequences: [B, rounds, K]."""

    tv: Tensor
    judged: Tensor
    drafted: Tensor
    rejected: Tensor


def decode(t: Tables, B: int, N: int, K: int) -> tuple[Seen, RejectionEstimate]:
    """N tokens of each of B sequences, through `sample` and `verify`."""
    tv, draft_distribution = theory.total_variation(t.pair.p, t.pair.q), row_distribution(t.draft)
    seed, length, last = torch.arange(B), torch.zeros(B).long(), torch.zeros(B).long()
    estimate, seen = RejectionEstimate(), []
    for n in range(N):
        round = torch.full_like(seed, n)
        states = [last]  # of each position; a token v leads to state v + 1
        for i in range(K):
            rows = type(draft_distribution)(*(field[states[-1]] for field in draft_distribution))
            drawn = sample(t.draft[states[-1]], rows, seed=seed, round=round,
                           slot=torch.full_like(seed, i))  # fmt: skip
            states.append(drawn + 1)
        at = torch.stack(states, 1)  # [B, K + 1]
        drafted = (N - length).clamp(max=K)
        draft = Draft(at[:, 1:] - 1, torch.arange(K).int().expand(B, K).contiguous(), at[:, :K],
                      t.draft, draft_distribution, lengths=drafted)  # fmt: skip
        accepted, emitted, *_ = verify(t.target[at], draft, seed=seed, round=round)
        estimate.count(tv[at[:, :K]], accepted, drafted)
        judged = theory.examined(accepted, K, drafted)
        rejected = judged & (torch.arange(K) == accepted[:, None])
        seen.append(Seen(tv[at[:, :K]], judged, torch.arange(K) < drafted[:, None], rejected))
        last = emitted.gather(1, accepted[:, None])[:, 0] + 1
        length = (length + accepted + 1).clamp(max=N)
    return Seen(*(torch.stack(field, 1) for field in zip(*seen, strict=True))), estimate


def test_estimates_of_a_run_of_the_op():
    """Means over B independent sequences against their expectations. Values x lie in [-N, N], so
    that by Bernstein's inequality a mean is off by t with a chance of at most
    2 exp(-B t^2 / (2 var + 4 N t / 3)); var is enumerated, not estimated."""
    V, N, K, B = 3, 6, 3, 20000
    t = tables(V, seed=11, spread=2.0)
    rows = [[row.tolist() for row in distribution] for distribution in (t.pair.p, t.pair.q)]
    p, q = (
        lambda x, distribution=distribution: distribution[x[-1] + 1 if x else 0]
        for distribution in rows
    )
    w = World(V, p, q, t.pair)
    every = list(runs(w, N, K))
    counts = theory.run_counts(t.pair, N, K)
    ratio = counts.rejections / counts.examined  # E[sum A TV - ratio sum A] = 0

    def plausible(values: Tensor, exact: float, value: Callable[[Run], float]) -> bool:
        off = abs(float(values.double().mean()) - exact)
        return 2 * math.exp(-B * off**2 / (2 * variance(every, value) + 4 * N * off / 3)) > 1e-6

    of_tv, of_rejected = lambda run: sum(exact_chances(w, run)), lambda run: sum(run.rejected)
    of_mean = lambda run: of_tv(run) - ratio * sum(run.judged)
    of_both = lambda run: of_rejected(run) - of_tv(run)  # a martingale: 0 on average
    seen, estimate = decode(t, B, N, K)
    judged, rejected = seen.judged.sum((1, 2)), seen.rejected.sum((1, 2))
    sums = (seen.tv * seen.judged).sum((1, 2))
    assert plausible(sums, counts.rejections, of_tv)
    assert plausible(rejected, counts.rejections, of_rejected)
    assert plausible(sums - ratio * judged, 0.0, of_mean)
    assert plausible(rejected - sums, 0.0, of_both)
    assert (estimate.rejected, estimate.examined) == (int(rejected.sum()), int(judged.sum()))
    assert math.isclose(estimate.expected, float(sums.sum()), rel_tol=1e-9)
    spread = (seen.tv * (1 - seen.tv) * seen.judged).sum()
    assert math.isclose(estimate.variance, float(spread), rel_tol=1e-9)
    assert abs(estimate.deviation) < 5

    # mutants: all drafted positions, also those behind a rejection, whose prefixes follow q
    wrong = (seen.tv * seen.drafted).sum((1, 2))
    assert not plausible(wrong, counts.rejections, of_tv)
    assert not plausible(wrong - ratio * seen.drafted.sum((1, 2)), 0.0, of_mean)
    # and a verifier that accepts one token in twenty that it should reject
    lax = seen.rejected & (torch.arange(B) % 20 > 0)[:, None, None]
    assert not plausible(lax.sum((1, 2)) - sums, 0.0, of_both)
    fewer = RejectionEstimate(estimate.examined, int(lax.sum()), estimate.expected,
                              estimate.variance)  # fmt: skip
    assert abs(fewer.deviation) > 5


def test_tv_under_prefixes_of_q_is_another_number():
    """The mutant that is not in a run: E_{x<n ~ q} TV."""
    w = world(3, 4, 2, "markov")
    swapped = Pair(w.pair.q, w.pair.p, w.pair.next)  # TV is symmetric, prefixes follow q
    right, wrong = (theory.expected_rejections(pair, 4) for pair in (w.pair, swapped))
    assert abs(right - wrong) > 1e-2


# --- tokens per round -----------------------------------------------------------------------------


@worlds
def test_tokens_per_round(key):
    """E(K) of the chain's acceptances is the mean length of a first round of K drafted tokens."""
    V, N, *_ = key
    w, K = world(*key), N - 1
    drafts = [(d, math.prod(w.q(d[:i])[d[i]] for i in range(K)))
              for d in product(range(V), repeat=K)]  # fmt: skip

    def round_length(d: Text) -> float:
        stands = [token_rule(w.p(d[:i]), w.q(d[:i]))[d[i]] for i in range(K)]
        return 1 + math.fsum(math.prod(stands[: i + 1]) for i in range(K))

    exact = math.fsum(chance * round_length(d) for d, chance in drafts)
    acceptances = theory.conditional_acceptances(w.pair, K)
    assert near(theory.tokens_per_round(acceptances.tolist()), exact)
    for k in range(1, K + 1):
        stands = math.fsum(c * math.prod(token_rule(w.p(d[:i]), w.q(d[:i]))[d[i]] for i in range(k))
                           for d, c in drafts)  # fmt: skip
        assert near(acceptances[:k].prod(), stands)


def test_constant_acceptance():
    """Against the fraction; alpha = 1 has none."""
    for alpha in (0.0, 0.3, 0.9, 1 - 2**-40):
        for K in (0, 1, 7, 40):
            a = Fraction(alpha)
            exact = float((1 - a ** (K + 1)) / (1 - a))
            assert math.isclose(theory.tokens_per_round_at(alpha, K), exact, rel_tol=1e-14)
            assert math.isclose(theory.tokens_per_round([alpha] * K), exact, rel_tol=1e-14)
    assert theory.tokens_per_round_at(1, 40) == 41


def test_rounds_per_token_are_convex_in_the_acceptance():
    """Differences of 1 / E(K) grow with alpha, to within the rounding of numbers up to 1."""
    for K in (1, 2, 5, 15, 40):
        rounds = [1 / theory.tokens_per_round_at(i / 64, K) for i in range(65)]
        steps = [b - a for a, b in pairwise(rounds)]
        assert all(b > a - 1e-15 for a, b in pairwise(steps))
        assert steps[-1] > steps[0] + 1e-3


def test_a_chain_whose_tv_is_the_same_everywhere():
    """There the formula for constant alpha is exact, and N tokens take N / E(K) rounds at last."""
    p, q = random_distribution(4, "p", False), random_distribution(4, "q", False)
    pair, alpha = Pair.markov(p, [p] * 4, q, [q] * 4), 1 - tv_of(p, q)
    assert near(theory.tokens_per_round(theory.conditional_acceptances(pair, 3).tolist()),
                theory.tokens_per_round_at(alpha, 3))  # fmt: skip
    # rounds begin at renewals of mean E(K), lengths at most K + 1 = 4: off by less than 4 rounds
    rounds = theory.run_counts(pair, 4000, 3).rounds
    assert abs(rounds - 4000 / theory.tokens_per_round_at(alpha, 3)) < 4


# --- plans ----------------------------------------------------------------------------------------


def test_speed_up_is_that_of_the_papers():
    alpha, K, c = 0.8, 5, 0.1
    by_hand = (1 - alpha ** (K + 1)) / ((1 - alpha) * (K * c + 1))
    assert math.isclose(theory.speed_up([alpha] * K, K * c), by_hand, rel_tol=1e-14)
    a, T, c_d, v = [0.9, 0.7, 0.4], 2, 0.05, 1.2
    by_hand = (1 + 0.9 + 0.9 * 0.7 + 0.9 * 0.7 * 0.4) / (T * c_d + v)
    assert math.isclose(theory.speed_up(a, T * c_d, v), by_hand, rel_tol=1e-14)


def test_plans_are_the_best_of_all():
    noise = random.Random(3)
    for _ in range(50):
        a = {T: [min(1, noise.random() * T / 2) for _ in range(6)] for T in (1, 2, 3)}
        c_d, slope = noise.random() / 4, noise.random() / 8
        drafting, verifying = lambda T, K: T * (c_d + 0.01 * K), lambda K: 1 + slope * K  # noqa: B023
        every = {(0, 0): 1.0}
        for T, K in product((1, 2, 3), range(1, 7)):
            E = 1 + sum(math.prod(a[T][:k]) for k in range(1, K + 1))
            every[T, K] = E / (drafting(T, K) + verifying(K))
        K, T, found = theory.best_plan(a, drafting, verifying)
        assert math.isclose(found, max(every.values()), rel_tol=1e-14)
        assert math.isclose(every[T, K], found, rel_tol=1e-14)
        values = [verifying(K) for K in range(7)]
        assert theory.best_plan(a, drafting, values) == (K, T, found)
        k, _, fastest = theory.best_length(a[2], partial(drafting, 2), verifying)
        assert math.isclose(fastest, max(1.0, *(every[2, K] for K in range(1, 7))), rel_tol=1e-14)
        assert k == 0 or math.isclose(every[2, k], fastest, rel_tol=1e-14)


def test_nothing_is_drafted_where_that_is_slower():
    assert theory.best_length([0.1] * 4, lambda K: 1.0, lambda K: 1.0) == (0, 0, 1.0)


def test_what_a_speed_up_needs():
    for K, cost, wanted in product((1, 4, 8), (0.0, 0.3), (0.5, 1.2, 2.0, 3.5)):
        alpha = theory.needed_acceptance(wanted, K, cost)
        if alpha is None:
            assert theory.speed_up([1.0] * K, cost) < wanted
            continue
        assert theory.speed_up([alpha] * K, cost) >= wanted
        if alpha > 0:
            assert theory.speed_up([alpha * (1 - 1e-12)] * K, cost) < wanted
        affordable = theory.needed_draft_cost(wanted, [alpha] * K)
        if alpha > 0:
            assert math.isclose(affordable, cost, abs_tol=1e-12)
    assert theory.needed_acceptance(3.0, 2, 0.01) is None
    assert theory.needed_draft_cost(2.0, [0.5]) is None


# --- lenient rules --------------------------------------------------------------------------------

PARAMETERS = {"lenience": (1.0, 0.6, 0.1, 0.0), "additive": (0.0, 0.03, 0.3, 1.0),
              "ensemble": (1.0, 0.7, 0.2, 0.0)}  # fmt: skip
FORMULAS = {  # for p > 0
    "lenience": lambda p, q, low: min(1, p / (low * q)) if low else 1,
    "additive": lambda p, q, eps: min(1, (p + eps) / q),
    "ensemble": lambda p, q, w: min(1, 1 - w + w * p / q),
}


def lenient_rule(
    name: str, parameter: float
) -> Callable[[Distribution, Distribution], Distribution]:
    """In plain Python; a token of p = 0 is never accepted."""
    formula = FORMULAS[name]
    return lambda p, q: [
        0.0 if a == 0 else 1.0 if b == 0 else formula(a, b, parameter)
        for a, b in zip(p, q, strict=True)
    ]


@pytest.mark.parametrize("name", PARAMETERS)
@worlds
def test_lenient_rules(key, name):
    """Every run under the rule: rejections, the bias of each step, and that of the whole text."""
    _, N, _, kind = key
    w = world(*key)
    tv = theory.total_variation(w.pair.p, w.pair.q)
    rule, exact, _ = LENIENT_RULES[name]
    for parameter in PARAMETERS[name]:
        accept = lambda p, q: rule(p, q, parameter)  # noqa: B023
        b = accept(w.pair.p, w.pair.q)
        for row, p, q in zip(b.tolist(), w.pair.p.tolist(), w.pair.q.tolist(), strict=True):
            assert all(map(near, row, lenient_rule(name, parameter)(p, q)))
            least = [x > 0 and y for x, y in zip(p, token_rule(p, q), strict=True)]
            assert all(x >= y - TOLERANCE for x, y in zip(row, least, strict=True))
        rejection, distribution, bias = theory.outcome(w.pair.p, w.pair.q, b)
        assert ((bias + rejection - tv).abs() < TOLERANCE).all()
        assert ((distribution.sum(-1) - 1).abs() < TOLERANCE).all()
        impossible = (w.pair.q * (w.pair.p == 0)).sum(-1)
        if name == "ensemble":
            by_hand = (1 - parameter) * (tv - impossible)
            assert ((bias - by_hand).abs() < TOLERANCE).all()
        every = list(runs(w, N, N, lenient_rule(name, parameter)))
        run = theory.lenient_run(w.pair, N, accept)
        assert near(run.rejections, mean(every, lambda run: sum(run.rejected)))
        distance = text_distance(w, every)
        assert distance <= run.bias + TOLERANCE
        # the other bound: prefixes of p
        of_p, chance = 0.0, w.pair.start()
        for _ in range(N):
            of_p, chance = of_p + float(chance @ bias), w.pair.moved(chance, w.pair.p)
        assert distance <= of_p + TOLERANCE
        if parameter == exact:
            assert distance < TOLERANCE and run.bias < TOLERANCE
        elif kind != "zeros":
            assert distance > 1e-4


def test_nothing_is_below_the_line():
    """Any acceptance with any residual: bias + P_rej >= TV. On it: any b >= min(1, p / q) with the
    standard residual."""
    noise = torch.Generator().manual_seed(1)
    p, q, other = torch.rand(3, 500, 3, generator=noise).double().softmax(-1)
    accept = torch.rand(500, 3, generator=noise).double()
    rejection = 1 - (accept * q).sum(-1)
    bias = theory.total_variation(accept * q + rejection[:, None] * other, p)
    tv = theory.total_variation(p, q)
    assert (bias + rejection > tv - TOLERANCE).all()
    more = torch.maximum(accept, (p / q).clamp(max=1))
    rejection, _, bias = theory.outcome(p, q, more)
    assert ((bias + rejection - tv).abs() < TOLERANCE).all()
    assert (bias > 1e-6).any() and (rejection > 1e-6).any()
    # and what accepts less is unbiased, but above the line
    rejection, _, bias = theory.outcome(p, q, accept * (p / q).clamp(max=1))
    assert (bias < TOLERANCE).all() and (rejection > tv).all()


@worlds
@pytest.mark.parametrize("budget", [0.01, 0.1, 9.0])
def test_a_budget_is_kept(key, budget):
    _, N, *_ = key
    w = world(*key)
    mean_tv = theory.expected_rejections(w.pair, N) / N
    weight = theory.ensemble_weight(budget, N, mean_tv)
    every = list(runs(w, N, N, lenient_rule("ensemble", weight)))
    assert text_distance(w, every) <= budget + TOLERANCE
    assert weight == 0 or near((1 - weight) * N * mean_tv, budget)


@pytest.mark.parametrize("name", LENIENT_RULES)
def test_the_most_lenient_parameter_in_a_budget(name):
    noise = torch.Generator().manual_seed(2)
    p, q = torch.randn(2, 40, 4, generator=noise).double().softmax(-1)
    rule, exact, most = LENIENT_RULES[name]
    mean_tv = float(theory.total_variation(p, q).mean())
    bias = lambda x: float(theory.outcome(p, q, rule(p, q, x)).bias.mean())
    for budget in (0.05, 1.0):
        found = theory.parameter_for(name, budget, 10, p, q)
        assert near(bias(found), budget / 10)
        assert bias(found + 1e-6 * (most - exact)) > budget / 10
    assert near(theory.parameter_for("ensemble", 0.5, 10, p, q),
                theory.ensemble_weight(0.5, 10, mean_tv))  # fmt: skip
    assert theory.parameter_for(name, 100, 10, p, q) == most
    assert near(bias(theory.parameter_for(name, 0, 10, p, q)), 0)


# --- what is refused ------------------------------------------------------------------------------

HALF = torch.tensor([[0.5, 0.5]])
PAIR = Pair.markov([0.5, 0.5], [[0.5, 0.5]] * 2, [1, 0], [[1, 0]] * 2)
REFUSED = {
    "p: expected rows": lambda: Pair(HALF * 2, HALF, torch.zeros(1, 2).long()),
    "q_first: expected rows": lambda: Pair.markov([1, 0], [[1, 0]] * 2, [1, 1], [[1, 0]] * 2),
    "three tensors": lambda: Pair(HALF, HALF, torch.zeros(2, 2).long()),
    "dtype torch.int64": lambda: Pair(HALF, HALF, torch.zeros(1, 2)),
    "states in -1 .. 0": lambda: Pair(HALF, HALF, torch.ones(1, 2).long()),
    "V and length": lambda: Pair.tree(lambda x: [1.0], lambda x: [1.0], 1, 0),
    "at most 4": lambda: theory.expected_rejections(world(3, 4, 2, "tree").pair, 5),
    "number of tokens": lambda: theory.tv_by_position(PAIR, -1),
    "drafts: expected at least 1": lambda: theory.batch_rejections(PAIR, 2, 0),
    "K: expected at least 0": lambda: theory.run_counts(PAIR, 2, -1),
    r"acceptances\[1\]": lambda: theory.tokens_per_round([0.5, 1.5]),
    "finite numbers": lambda: theory.speed_up([0.5], 0.0, 0.0),
    "a value for each K": lambda: theory.best_length([0.5] * 2, [0.0, 0.1], [1.0] * 3),
    "steps: expected": lambda: theory.best_plan({0: [0.5]}, lambda T, K: 1.0, [1.0] * 2),
    "wanted": lambda: theory.needed_draft_cost(0, [0.5]),
    "chance: expected shape": lambda: RejectionEstimate().count(HALF, torch.zeros(2).long()),
    "chance: expected prob": lambda: RejectionEstimate().count(HALF * 3, torch.zeros(1).long()),
    "accepted <= drafted": lambda: theory.examined(torch.tensor([3]), 2),
    "integers": lambda: theory.examined(torch.tensor([[1]]), 2),
    "w: expected": lambda: theory.ensemble(HALF, HALF, 1.5),
    "budget": lambda: theory.ensemble_weight(-1, 10, 0.5),
    "N: expected": lambda: theory.ensemble_weight(1, 0, 0.5),
    "name: expected one of": lambda: theory.parameter_for("token", 1, 10, HALF, HALF),
}  # fmt: skip


@pytest.mark.parametrize("message", REFUSED)
def test_errors_say_what_was_expected(message):
    with pytest.raises(ValueError, match=message):
        REFUSED[message]()


def test_no_tokens():
    assert theory.expected_rejections(PAIR, 0) == 0
    assert theory.conditional_acceptances(PAIR, 0).shape == (0,)
    assert theory.run_counts(PAIR, 0, 2) == (0, 0, 0)
    assert theory.tokens_per_round([]) == 1


# --- pictures -------------------------------------------------------------------------------------


def test_pictures_are_the_same_each_time(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(BENCHMARKS)
    import plot_theory

    for folder in ("first", "second"):
        plot_theory.draw(tmp_path / folder, chains=1)
    names = sorted(path.name for path in (tmp_path / "first").iterdir())
    assert names == [f"{name}.{kind}" for name in ("lenient_rules", "tokens_per_round")
                     for kind in ("png", "svg")]  # fmt: skip
    for name in names:
        first, second = ((tmp_path / folder / name).read_bytes() for folder in ("first", "second"))
        assert first == second


def test_the_theory_needs_no_matplotlib():
    code = "import specdiff, specdiff.theory, sys; sys.exit('matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
