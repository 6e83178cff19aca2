"""The lenient rule, enumerated through the op: the bias that it returns is the one that it has."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from torch import Tensor

from specdiff.theory import LENIENT_RULES, outcome
from specdiff_kernels import Draft, Lenience, Reveal, row_distribution, use_backend, verify
from specdiff_kernels.reference import verify as reference
from specdiff_kernels.reference.numerics import weights
from tests.enumeration import WORDS, first_word, probabilities
from tests.worlds import Way, World

KINDS = [
    Lenience("lenience", 0.6), Lenience("lenience", 1e-3), Lenience("additive", 0.03),
    Lenience("additive", 2.0), Lenience("ensemble", 0.7), Lenience("ensemble", 0.0),
]  # fmt: skip
SEEDS = range(3)
CLOSE = 1e-12
V = 5


def distribution_of(logits: Tensor) -> list[Fraction]:
    """Of one row, exactly."""
    distribution = row_distribution(logits[None])
    return [
        Fraction(e, distribution.total.item())
        for e in weights(logits[None], distribution)[0].tolist()
    ]


class Step:
    """One drafted position, its token drawn from a recorded distribution or guessed: P(accept) of
    each token, the distribution of what replaces it, and the bias returned, all from the outside of
    the op."""

    def __init__(
        self, seed: int, lenience: Lenience, *, one_hot: bool = False, full: bool = False
    ) -> None:
        noise = torch.Generator().manual_seed(seed)
        self.target = torch.randn(1, 2, V, generator=noise) * 1.5
        self.pool = torch.randn(1, V, generator=noise) * 1.5
        if not full:
            self.target[0, 0, seed % V] = -torch.inf
        self.lenience, self.one_hot = lenience, one_hot
        self.p, self.q = distribution_of(self.target[0, 0]), distribution_of(self.pool[0])
        self.distribution = row_distribution(self.pool)
        tokens = range(V)
        # v is drafted in row v
        accept = first_word(lambda words: self.run(words, words * 0).accepted < 1, V)
        self.accept = [Fraction(edge, WORDS) for edge in accept]
        worst = torch.full((V,), -1)
        self.behind = probabilities(lambda words: self.run(worst, words).emitted[:, 0], V, V)
        self.bias = self.run(worst, worst).bias.tolist()
        self.out = [
            [self.accept[x] * (v == x) + (1 - self.accept[x]) * self.behind[x][v] for v in tokens]
            for x in tokens
        ]
        self.rejected = 1 - sum(q * a for q, a in zip(self.q, self.accept, strict=True))

    def run(self, accept: Tensor, last: Tensor):
        tokens = torch.arange(V)[:, None]
        rows = torch.full_like(tokens, -1 if self.one_hot else 0)
        draft = Draft(tokens, torch.zeros(V, 1).int(), rows, self.pool, self.distribution)
        return verify(self.target.expand(V, 2, V), draft, rule="lenient", lenience=self.lenience,
                      words=torch.stack((accept, last), 1))  # fmt: skip

    def distribution_by(self, q: list[Fraction]) -> list[Fraction]:
        """Of the emitted token, x drawn from q."""
        return [sum(q[x] * self.out[x][v] for x in range(V)) for v in range(V)]


def distance(a: list[Fraction], b: list[Fraction]) -> Fraction:
    return sum((abs(x - y) for x, y in zip(a, b, strict=True)), Fraction(0)) / 2


def check(step: Step) -> None:
    """Yin et al., 2411.00841: the output's distance is the bias, and bias + P_rej = TV. Each drawn
    token has its probability to within 2^-64, p and q are rounded to within 2^-52."""
    out = step.distribution_by(step.q)
    assert len(set(step.bias)) == 1
    assert abs(distance(out, step.p) - Fraction(step.bias[0])) < CLOSE
    assert abs(step.rejected + Fraction(step.bias[0]) - distance(step.p, step.q)) < CLOSE
    assert not any(share for share, p in zip(out, step.p, strict=True) if p == 0)


@pytest.mark.parametrize("lenience", KINDS, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_bias_of_a_step_is_the_one_returned(seed, lenience):
    check(Step(seed, lenience))


@pytest.mark.parametrize("lenience", KINDS, ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_bias_of_a_bare_guess(seed, lenience):
    """For each token that may be guessed."""
    step = Step(seed, lenience, one_hot=True)
    for x in range(V):
        guess = [Fraction(v == x) for v in range(V)]
        assert abs(distance(step.out[x], step.p) - Fraction(step.bias[x])) < CLOSE
        left = distance(step.p, guess) - (1 - step.accept[x])
        assert abs(left - Fraction(step.bias[x])) < CLOSE
        assert step.p[x] > 0 or step.out[x][x] == 0


@pytest.mark.parametrize("lenience", [k for k in KINDS if k.amount <= 1], ids=str)
@pytest.mark.parametrize("seed", SEEDS)
def test_the_op_and_the_theory_agree(seed, lenience):
    """`specdiff.theory` in fp64, the op by its random words: the same chances, rejections, bias."""
    step = Step(seed, lenience)
    p, q = (
        torch.tensor([float(x) for x in distribution], dtype=torch.float64)
        for distribution in (step.p, step.q)
    )
    rule, _, _ = LENIENT_RULES[lenience.kind]
    accept = rule(p, q, lenience.amount)
    chances = torch.tensor([float(x) for x in step.accept], dtype=torch.float64)
    assert (chances - accept).abs().max() < CLOSE
    expected = outcome(p, q, accept)
    assert abs(expected.rejection.item() - float(step.rejected)) < CLOSE
    assert abs(expected.bias.item() - step.bias[0]) < CLOSE
    emitted = torch.tensor([float(x) for x in step.distribution_by(step.q)], dtype=torch.float64)
    assert (emitted - expected.distribution).abs().max() < CLOSE


@pytest.mark.parametrize("w", [0.0, 0.25, 0.7, 1.0])
def test_closed_forms_of_the_ensemble(w):
    """For a target with full support: P_rej = w TV and bias = (1 - w) TV."""
    step = Step(3, Lenience("ensemble", w), full=True)
    tv = distance(step.p, step.q)
    assert step.bias[0] == pytest.approx((1 - w) * float(tv), abs=CLOSE)
    assert float(step.rejected) == pytest.approx(w * float(tv), abs=CLOSE)


MUTANTS = {
    "a draw from p in place of the residual": ("or_else", lambda real: lambda e, other: other),
    "no guard where p is 0": ("raised", lambda real: lambda p, q, how: p + how.amount[:, None]),
    "accepting more than is counted": ("unit", lambda real: lambda word: 0.99 * real(word)),
}


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_rejected(mutant, monkeypatch):
    name, change = MUTANTS[mutant]
    lenience = Lenience("additive", 0.03)
    with use_backend("reference"):
        for seed in SEEDS:
            check(Step(seed, lenience))
        monkeypatch.setattr(reference, name, change(getattr(reference, name)))
        with pytest.raises(AssertionError):
            for seed in SEEDS:
                check(Step(seed, lenience))


# --- whole runs ---


@pytest.mark.parametrize("lenience", KINDS[::2], ids=str)
@pytest.mark.parametrize("schedule", ["one step", "chunks", "random", "right first"])
def test_a_runs_bias_is_within_what_was_returned(schedule, lenience):
    """TV of the text's distribution <= the mean sum of the returned biases: changing from the
    output's distribution to the target's one token after another, the token at t adds what it has
    given its prefix."""
    way = Way(rule="lenient", lenience=lenience)
    for seed in SEEDS:
        world = World(2, schedule, seed)
        spent = world.expected_bias(way)
        assert 1e-3 < world.distance(way) <= spent + CLOSE


def test_entangled_records_are_refused_as_their_bias_is_not_the_one_returned():
    """A later token follows its record only if what is emitted before it follows p."""
    world = World(2, [Reveal.chunk(1, 2), Reveal.all()], seed=48, length=2)
    way = Way(rule="lenient", lenience=Lenience("ensemble", 0.0), hot_start="entangled")
    assert world.distance(way) <= world.expected_bias(way) + CLOSE
    with pytest.raises(ValueError, match="would bias the output: the lenient rule ties"):
        world.distance(way._replace(record="entangled"))
    forced = way._replace(record="forced")
    assert world.distance(forced) > world.expected_bias(forced) + 0.01


def test_a_runs_bias_is_all_that_was_returned():
    """One token of text: nothing can cancel."""
    for lenience in KINDS:
        way = Way(rule="lenient", lenience=lenience)
        world = World(3, "one step", seed=2, length=1)
        assert world.distance(way) == pytest.approx(world.expected_bias(way), abs=CLOSE)


@pytest.mark.parametrize("schedule", ["chunks", "random", "confidence"])
@pytest.mark.parametrize(
    "lenience",
    [Lenience("lenience", 1.0), Lenience("additive", 0.0), Lenience("ensemble", 1.0)],
    ids=str,
)
def test_runs_at_the_exact_amounts(schedule, lenience):
    way = Way(rule="lenient", lenience=lenience)
    world = World(2, schedule, seed=1)
    assert world.distance(way) < CLOSE
    assert world.expected_bias(way) == 0
