"""One reverse step: what it reveals, what it reads, what it records."""

from __future__ import annotations

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from specdiff.drafters.noise import Geometric, LogLinear, ancestral_rate, euler_rate
from specdiff_kernels import (
    Draft,
    Order,
    Reveal,
    Status,
    denoise_step,
    row_distribution,
    sample,
    verify,
)
from specdiff_kernels.reference.numerics import weights
from tests.enumeration import WORDS, first_word, probabilities

from .helpers import assert_same, i64
from .interpreter import sized

pytestmark = pytest.mark.usefixtures("implementation")
NAN, INF = float("nan"), float("inf")
KEY = {"seed": i64(3, 4), "round": i64(0, 1)}


def fresh(B=2, K=4, V=20, seed=0, **fields) -> Draft:
    torch.manual_seed(seed)
    return Draft.masked(B, K, torch.randn(B * K, V) * 2, **fields)


def reveal_chance(draft: Draft, reveal: Reveal) -> list[Fraction]:
    """Exact probability that each position is revealed."""

    def hidden(words):
        both = torch.stack((words, torch.zeros_like(words)), 1).view(*draft.tokens.shape, 2)
        return denoise_step(draft, reveal, 0, words=both).tokens.flatten() < 0

    return [Fraction(edge, WORDS) for edge in first_word(hidden, draft.tokens.numel())]


def token_distribution(draft: Draft, V: int, **options) -> list[list[Fraction]]:
    """Exact distribution of each position's token, given that it is revealed."""

    def drawn(words):
        both = torch.stack((torch.zeros_like(words), words), 1).view(*draft.tokens.shape, 2)
        return denoise_step(draft, Reveal.all(), 0, words=both, **options).tokens.flatten()

    return probabilities(drawn, draft.tokens.numel(), V)


def staggered_score(row: torch.Tensor, sigma: float, dsigma: float) -> torch.Tensor:
    """SEDD's analytic step from a masked position, entry by entry: the staggered score times the
    transposed transition, fp64 [V + 1] with the mask last (2310.16834, Theorem 4.2)."""
    V = len(row)
    score = torch.cat((row.double().exp() / math.expm1(sigma) / V, torch.ones(1).double()))
    staggered = score * math.exp(dsigma)
    staggered[-1] += (1 - math.exp(dsigma)) * score.sum()
    transition = torch.full((V + 1,), -math.expm1(-dsigma), dtype=torch.float64)
    transition[-1] += math.exp(-dsigma)
    return staggered * transition


@pytest.mark.parametrize("noise", [LogLinear(), Geometric()], ids=repr)
def test_sedd_is_staggered_score_times_transition(noise):
    """Random steps: the reveal probability and the token's distribution, to 1e-6."""
    V, N = 7, sized(100, interpreted=6)
    generator = torch.Generator().manual_seed(0)
    times = torch.rand(N, 2, generator=generator, dtype=torch.float64).sort(descending=True)
    steps = times.values.tolist()
    logits = torch.randn(N, V, generator=generator) * 1.5 - 1  # m around 1, and far from it
    draft = Draft.masked(N, 1, logits)
    rate = torch.tensor([ancestral_rate(noise, t, s) for t, s in steps], dtype=torch.float64)
    chances, distributions = reveal_chance(draft, Reveal.sedd(rate)), token_distribution(draft, V)
    for (t, s), row, rho, distribution in zip(steps, logits, chances, distributions, strict=True):
        direct = staggered_score(row, noise.sigma(t), noise.sigma(t) - noise.sigma(s))
        assert direct.sum().item() == pytest.approx(1)
        # a negative chance to stay masked never wins SEDD's draw: then all is revealed
        total = direct[:V].sum().item()
        revealed = min(1.0, total)
        assert float(rho) == pytest.approx(revealed, abs=1e-6)
        joint = [float(rho * q) for q in distribution]
        assert joint == pytest.approx((direct[:V] * revealed / total).tolist(), abs=1e-6)


def test_euler_step():
    """Delta t sigma'(t) score(v), capped."""
    row = torch.tensor([0.3, -1.0, 0.8])
    for noise in (LogLinear(), Geometric()):
        t, s = 0.6, 0.5
        (rho,) = reveal_chance(Draft.masked(1, 1, row[None]), Reveal.sedd(euler_rate(noise, t, s)))
        score = row.double().exp().mean() / math.expm1(noise.sigma(t))
        assert float(rho) == pytest.approx(
            min(1.0, (t - s) * noise.sigma_rate(t) * score.item()), abs=1e-6
        )


def test_reveal_marginals_have_the_closed_form():
    """m = 1: after 1 -> .7 -> .4, (1 - alpha(.4)) / (1 - alpha(1)) of the positions are masked."""
    noise, draft = LogLinear(), fresh(1, 2, V=5)
    masked = Fraction(1)
    for t, s in ((1.0, 0.7), (0.7, 0.4)):
        chances = reveal_chance(draft, Reveal.mdlm(ancestral_rate(noise, t, s)))
        assert chances[0] == chances[1]
        masked *= 1 - chances[0]
    expected = (1 - noise.alpha(0.4)) / (1 - noise.alpha(1.0))
    assert float(masked) == pytest.approx(expected, abs=1e-14)


@pytest.mark.parametrize("shift", [0.0, 60.0, -60.0, 1e30])
def test_extreme_mean_exp(shift):
    """m from 1e-26 to infinity: the probability is min(1, rate m), rate 0 reveals nothing."""
    draft = Draft.masked(1, 1, torch.tensor([[shift, shift - 1, shift - 2]]))
    (rho,) = reveal_chance(draft, Reveal.sedd(0.25))
    m = math.exp(min(shift, 700)) * (1 + math.exp(-1) + math.exp(-2)) / 3
    if shift < 1e30:
        assert float(rho) == pytest.approx(min(1, 0.25 * m), rel=1e-6, abs=2**-53)
    assert reveal_chance(draft, Reveal.sedd(0.0)) == [0]


def test_tokens_follow_the_rows_distribution():
    draft = fresh(2, 2, V=6)
    for options in ({}, {"temperature": 0.5}, {"top_k": 2}, {"top_p": 0.6}):
        distributions = token_distribution(draft, 6, **options)
        e = weights(draft.logits, row_distribution(draft.logits, **options)).double()
        want = e / e.sum(1, keepdim=True)
        for have, row in zip(distributions, want, strict=True):
            assert [float(q) for q in have] == pytest.approx(row.tolist(), abs=1e-14)


def test_what_is_recorded():
    """Tokens by `sample` with the step in the key, tau, rows, the distributions of
    `row_distribution`."""
    draft = fresh()
    first = denoise_step(draft, Reveal.chunk(1, 3), 5, **KEY)
    assert (first.tokens >= 0).tolist() == [[False, True, True, False]] * 2
    assert first.tau.tolist() == [[-1, 5, 5, -1]] * 2
    assert first.rows.tolist() == [[-1, 1, 2, -1], [-1, 5, 6, -1]]
    assert first.final_step is None and not first.value_dependent
    done = denoise_step(first, Reveal.all(), 6, **KEY)
    assert torch.equal(done.tokens[:, 1:3], first.tokens[:, 1:3])
    assert done.tau.tolist() == [[6, 5, 5, 6]] * 2 and done.final_step == 6
    assert_same(done.distribution, row_distribution(draft.logits))
    assert (draft.tokens == -1).all() and (draft.distribution.total == 0).all()  # inputs stay
    zero = denoise_step(fresh(), Reveal.all(), 0, **KEY)
    again = sample(
        draft.logits, zero.distribution, slot=torch.arange(4).repeat(2),
        seed=KEY["seed"].repeat_interleave(4), round=KEY["round"].repeat_interleave(4),
    )  # fmt: skip
    assert torch.equal(zero.tokens.flatten(), again)
    later = denoise_step(fresh(), Reveal.all(), 1, **KEY)
    assert not torch.equal(later.tokens, zero.tokens)  # another step, other words


def test_greedy_drafts_are_bare_guesses():
    draft = fresh()
    done = denoise_step(draft, Reveal.all(), 0, torch.tensor([0.0, 1.0]), **KEY)
    assert done.rows.tolist() == [[-1] * 4, [4, 5, 6, 7]]
    assert torch.equal(done.tokens[0], draft.logits[:4].argmax(-1))


def test_revealed_rows_and_rows_out_of_turn_are_not_read():
    draft = denoise_step(fresh(1), Reveal.chunk(0, 2), 0, seed=i64(0), round=i64(0))
    draft.logits[:2] = NAN  # of revealed positions
    draft.logits[3] = NAN
    key = {"seed": i64(0), "round": i64(1)}
    before = draft.distribution.total.clone()
    done = denoise_step(draft, Reveal.chunk(2, 3), 1, **key)
    assert done.tokens[0, 2] >= 0 and (done.distribution.status == 0).all()
    assert torch.equal(done.distribution.total[:2], before[:2])
    never = denoise_step(draft, Reveal.mdlm(0.0), 1, **key)
    assert (never.distribution.status == 0).all() and torch.equal(never.tokens, draft.tokens)
    short = draft._replace(lengths=i64(3))
    assert denoise_step(short, Reveal.all(), 1, **key).tokens[0].tolist()[3] == -1


@pytest.mark.parametrize("value", [INF, NAN])
def test_columns_that_are_no_tokens_get_no_weight(value):
    """The pool holds the mask's and padding columns; the draft looks at the tokens' alone."""
    torch.manual_seed(1)
    pool = torch.randn(8, 25)
    expected = denoise_step(Draft.masked(2, 4, pool[:, :20].clone()), Reveal.sedd(0.5), 0, **KEY)
    pool[:, 20:] = value
    done = denoise_step(Draft.masked(2, 4, pool[:, :20]), Reveal.sedd(0.5), 0, **KEY)
    assert torch.equal(done.tokens, expected.tokens)
    assert_same(done.distribution, expected.distribution)
    target = torch.randn(2, 5, 20)
    whole = denoise_step(done, Reveal.all(), 1, **KEY)
    assert (verify(target, whole, **KEY).status == 0).all()
    with pytest.raises(ValueError, match=r"draft.logits: expected shape \[R=8, Vd=20\]"):
        verify(target, whole._replace(logits=pool), **KEY)


def test_first_hitting_takes_one_masked_position_uniformly():
    draft = denoise_step(fresh(1, 5), Reveal.chunk(1, 2), 0, seed=i64(0), round=i64(0))

    def which(words):
        both = words[:, None, None].expand(-1, 5, 2)
        done = denoise_step(draft, Reveal.first_hitting(), 1, words=both)
        fresh_ones = (done.tokens >= 0) & (draft.tokens < 0)
        assert (fresh_ones.sum(1) == 1).all()
        return fresh_ones.long().argmax(1)

    quarter = Fraction(1, 4)
    distribution = probabilities(which, 1, 5)[0]
    assert distribution == [quarter, 0, quarter, quarter, quarter]


def test_lowest_entropy():
    """Of the model's own distribution, whatever the draft's temperature; ties go to the left."""
    torch.manual_seed(2)
    logits = torch.randn(6, 30) * torch.tensor([1.0, 3.0, 0.2, 3.0, 2.0, 5.0])[:, None]
    logits[3] = logits[1]
    draft = Draft.masked(1, 6, logits)
    key = {"seed": i64(0), "round": i64(0)}
    exact = torch.distributions.Categorical(logits=logits.double()).entropy()
    for temperature in (0.0, 1.0, 0.3):
        done = denoise_step(draft, Reveal.lowest_entropy(2), 0, temperature, entropies=True, **key)
        torch.testing.assert_close(done.entropy[0], exact, atol=2e-3, rtol=0)
        order = exact.sort(stable=True).indices[:2].sort().values
        assert (done.tokens[0] >= 0).nonzero()[:, 0].tolist() == order.tolist()
    assert not done.value_dependent
    tied = Draft.masked(1, 3, torch.zeros(3, 30))
    one = denoise_step(tied, Reveal.lowest_entropy(1), 0, **key)
    assert (one.tokens[0] >= 0).tolist() == [True, False, False]


def test_highest_confidence():
    """The tokens are drawn first, all of them; the likeliest stay."""
    draft = fresh(2, 6, V=9)
    everything = denoise_step(draft, Reveal.all(), 0, **KEY)
    done = denoise_step(draft, Reveal.highest_confidence(2), 0, **KEY)
    assert done.value_dependent
    chance = draft.logits.softmax(-1).gather(1, everything.tokens.view(-1, 1)).view(2, 6)
    kept = chance.topk(2).indices.sort().values
    for b in range(2):
        assert (done.tokens[b] >= 0).nonzero()[:, 0].tolist() == kept[b].tolist()
        assert torch.equal(done.tokens[b, kept[b]], everything.tokens[b, kept[b]])


@pytest.mark.parametrize("order", list(Order), ids=lambda order: order.name)
def test_a_row_without_a_distribution_stays_masked_and_says_so(order):
    reveal = {
        Order.ALL: Reveal.all(), Order.CHUNK: Reveal.chunk(0, 4), Order.MDLM: Reveal.mdlm(1.0),
        Order.SEDD: Reveal.sedd(1e9), Order.FIRST_HITTING: Reveal.first_hitting(),
        Order.ENTROPY: Reveal.lowest_entropy(4), Order.CONFIDENCE: Reveal.highest_confidence(4),
    }[order]  # fmt: skip
    draft = fresh(1)
    draft.logits[0, 3], draft.logits[1], draft.logits[2, 1] = NAN, -INF, INF
    if order is Order.FIRST_HITTING:
        draft.logits[3, 0] = NAN
    done = denoise_step(draft, reveal, 0, seed=i64(0), round=i64(0))
    assert (done.tokens[0, :3] == -1).all()
    if order is Order.FIRST_HITTING:
        assert (done.tokens == -1).all() and (done.distribution.status != 0).sum() == 1
    else:
        assert done.tokens[0, 3] >= 0
        assert done.distribution.status.tolist() == [Status.NAN, Status.EMPTY, Status.POS_INF, 0]


def test_coupled_draws_are_those_of_sample():
    draft = fresh(2, 3, V=50)
    position = i64(10, 200)
    done = denoise_step(draft, Reveal.all(), 0, position=position, **KEY)
    at = (position[:, None] + torch.arange(3)).flatten()
    drawn = sample(
        draft.logits, done.distribution, seed=KEY["seed"].repeat_interleave(3), position=at
    )
    assert torch.equal(done.tokens.flatten(), drawn)
    assert done.coupled and not denoise_step(draft, Reveal.all(), 0, **KEY).coupled
    # another round of the drafter draws the same
    later = denoise_step(
        draft, Reveal.all(), 7, position=position, seed=KEY["seed"], round=i64(5, 5)
    )
    assert torch.equal(later.tokens, done.tokens)


def test_an_order_by_its_number_is_that_order():
    draft = fresh()
    for reveal in (Reveal.all(), Reveal.lowest_entropy(2), Reveal.highest_confidence(2)):
        by_number = reveal._replace(order=int(reveal.order))
        have, want = (denoise_step(draft, r, 0, **KEY) for r in (by_number, reveal))
        assert torch.equal(have.tokens, want.tokens) and have.final_step == want.final_step
        assert have.value_dependent == want.value_dependent
    assert want.entropy is None  # measured for the order's sake alone


def test_in_place_and_other_pool_rows():
    draft = fresh()
    rows = torch.tensor([[7, 6, 5, 4], [3, 2, 1, 0]])
    expected = denoise_step(draft, Reveal.mdlm(0.5), 0, pool_rows=rows, entropies=True, **KEY)
    read = expected.tokens >= 0
    assert torch.equal(expected.rows[read], rows[read])
    own = Draft.masked(2, 4, draft.logits)._replace(entropy=torch.zeros(2, 4).double())
    done = denoise_step(own, Reveal.mdlm(0.5), 0, pool_rows=rows, entropies=True, out=own, **KEY)
    found, wanted = ((each.tokens, each.rows, *each.distribution) for each in (done, own))
    for a, b in zip(found, wanted, strict=True):
        assert a.data_ptr() == b.data_ptr()
    assert torch.equal(done.tokens, expected.tokens) and torch.equal(done.rows, expected.rows)
    assert_same(done.distribution, expected.distribution)
    assert torch.equal(done.entropy.isnan(), ~read)


@pytest.mark.parametrize("alias", ["draft", "entropy", "view"])
@pytest.mark.parametrize("reveal", [Reveal.chunk(2, 4), Reveal.lowest_entropy(1)], ids=repr)
def test_a_step_in_place_keeps_what_an_earlier_one_measured(reveal, alias):
    first = denoise_step(fresh(), Reveal.chunk(0, 2), 0, entropies=True, **KEY)
    measured = first.entropy.clone()
    want = denoise_step(first, reveal, 1, **KEY)
    out = first
    if alias != "draft":
        out = fresh(seed=1)._replace(entropy=first.entropy if alias == "entropy" else None)
    if alias == "view":
        out = out._replace(entropy=first.entropy.view_as(first.entropy))
    done = denoise_step(first, reveal, 1, out=out, **KEY)
    for entropy in (done.entropy, out.entropy, want.entropy):
        assert torch.equal(entropy.nan_to_num(), measured.nan_to_num())
    assert measured.isfinite().any() and torch.equal(done.tokens, want.tokens)
    again = denoise_step(done, Reveal.all(), 2, entropies=True, out=out, **KEY)
    assert not torch.equal(again.entropy.nan_to_num(), measured.nan_to_num())


def test_a_step_may_be_numbered_by_numpy():
    done, want = (denoise_step(fresh(), Reveal.all(), n, **KEY) for n in (np.int64(3), 3))
    assert torch.equal(done.tau, want.tau) and torch.equal(done.tokens, want.tokens)
    assert type(done.final_step) is int


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step": -1}, r"step: expected an integer in \[0, 2\^31\), got -1"),
        ({"step": 1.5}, r"step: expected an integer in \[0, 2\^31\), got 1.5"),
        (
            {"draft": fresh()._replace(tau=torch.full((2, 4), 3).int()), "step": 3},
            "step: expected more than 3, the draft's latest reverse step, got 3",
        ),
        ({"pool_rows": torch.zeros(2, 4).long()}, "pool_rows: expected a row for each position"),
        ({"pool_rows": torch.full((2, 4), 8)}, r"pool_rows: expected rows in \[0, 8\), got 8 to 8"),
        ({"seed": None}, r"seed: expected an integer, or a tensor \[2\] int64, got None"),
        ({"words": torch.zeros(2, 4, dtype=torch.int64)}, "words: expected shape"),
        ({"reveal": Reveal.mdlm(torch.ones(3).double())}, r"rate: expected shape \[B=2\]"),
        ({"words": torch.zeros(2, 4, 2).long(), "seed": [3, 4]}, "seed: expected an integer"),
        ({"out": fresh()}, "out: expected a Draft with distribution and entropy, got None"),
        (
            {
                "out": (out := fresh()._replace(entropy=torch.zeros(2, 4).double()))._replace(
                    distribution=out.distribution._replace(max=torch.zeros(3))
                )
            },
            r"^out\.distribution\.max: expected shape \[R=8\], got \[3\]",
        ),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"draft": fresh(), "reveal": Reveal.all(), "step": 0, **KEY} | change
    with pytest.raises((ValueError, TypeError), match=message):
        denoise_step(**arguments)


def test_bad_reveals_are_named():
    for chunk in ((3, 2), (0, 1.5)):
        with pytest.raises(ValueError, match="chunk: expected integers 0 <= lo <= hi"):
            Reveal.chunk(*chunk)
    with pytest.raises(ValueError, match=r"rate: expected a probability, in \[0, 1\], got 7"):
        Reveal.mdlm(7)
    with pytest.raises(
        TypeError, match=r"reveal: expected a Reveal such as Reveal.all\(\), got 'all'"
    ):
        denoise_step(fresh(), "all", 0, **KEY)
    with pytest.raises(TypeError, match="draft: expected a Draft, got tuple"):
        denoise_step(tuple(fresh()), Reveal.all(), 0, **KEY)
    with pytest.raises(ValueError, match="rate: expected a number >= 0"):
        Reveal.sedd(-0.5)
    with pytest.raises(ValueError, match="number: expected how many positions"):
        Reveal.lowest_entropy(-1)
    with pytest.raises(
        ValueError, match=r"expected at least B K = 8 rows, got 7; or pass pool_rows"
    ):
        denoise_step(Draft.masked(2, 4, torch.zeros(7, 5)), Reveal.all(), 0, **KEY)
    with pytest.raises(ValueError, match=r"draft\.logits: expected the pool"):
        nothing = fresh()._replace(logits=None, distribution=None)
        denoise_step(nothing, Reveal.all(), 0, **KEY)
