"""Planner: what it believes and chooses, and a loop whose drafter may be left out of rounds."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

from specdiff import Decoder, Sampling, Target
from specdiff.drafters import Autoregressive, PromptLookup
from specdiff.loop.chooser import Wanted
from specdiff.loop.drafter import Drafter, News, joined
from specdiff.planning.costs import ALIKE, NEAR, PLAIN, PRIOR, Costs, Plan, measure
from specdiff.planning.planner import CURIOSITY, MEMORY, Planner
from specdiff.theory import tokens_per_round
from specdiff_kernels import Lenience
from tests.tiny import DRAFTERS, PROMPTS, tiny_model


@pytest.fixture(scope="module")
def target():
    return Target(tiny_model("llama"))


def costs(
    ks=(0, 1, 2, 4, 8), steps=(1,), draft=0.1, token=0.05, examined=None, accepted=None, batch=1
) -> Costs:
    """A plain round takes a second, each step `draft` and each token more `token`."""
    plans = [PLAIN, *(Plan(k, T) for k in ks if k for T in steps if k >= T)]
    return Costs(
        batch,
        plans,
        [draft * plan.steps for plan in plans],
        [1 + token * plan.k for plan in plans],
        examined or {},
        accepted or {},
    )


def simulate(planner: Planner, acceptance, rounds: int, seed: int = 0) -> list[Plan]:
    """Rounds in which position i of a draft in T steps is accepted with chance acceptance(i, T)."""
    flip, plans = random.Random(seed), []
    planner.start(1)
    for _ in range(rounds):
        planner.want(planner.most)
        k, steps = planner.plan
        passed = 0
        while passed < k and flip.random() < acceptance(passed, steps):
            passed += 1
        planner.update([k], [k], [passed])
        plans.append(planner.plan)
    return plans


def test_expected_speeds_are_those_of_the_theory():
    planner = Planner(costs(steps=(1, 2)))
    simulate(planner, lambda i, steps: 0.6, 50)
    for plan, speed in planner.speeds().items():
        means = [mean for mean, _ in planner.posterior(plan.steps)][: plan.k] if plan.k else []
        assert speed == pytest.approx(tokens_per_round(means) / planner.seconds(plan), rel=1e-12)


def rate(plans, planner, acceptance) -> float:
    """Expected tokens a second of these plans, by the true chances."""
    tokens = sum(tokens_per_round([acceptance(i, p.steps) for i in range(p.k)]) for p in plans)
    return tokens / sum(map(planner.seconds, plans))


def best_rate(planner, acceptance) -> float:
    return max(rate([plan], planner, acceptance) for plan in planner.plans)


# --- alone ---


def test_the_prior_is_what_was_seen_and_counts_for_little():
    seen = costs(examined={1: [40, 10, 0], 2: [8, 0, 0]}, accepted={1: [30, 1, 0], 2: [2, 0, 0]})
    first = (32 + 1) / 50  # under all T
    second = (1 + NEAR * first) / (10 + NEAR)
    own = [(30 + ALIKE * first) / (40 + ALIKE), (1 + ALIKE * second) / (10 + ALIKE)]
    assert seen.acceptances(1, 4) == [
        (pytest.approx(own[0]), PRIOR), (pytest.approx(own[1]), 12.0),
        (pytest.approx(second), 2.0), (pytest.approx(second), 2.0),
    ]  # fmt: skip
    assert seen.acceptances(7, 1) == [(pytest.approx(first), PRIOR)]  # nothing was seen under it
    assert costs().acceptances(7, 2) == [(0.5, 2.0)] * 2


def test_the_best_of_many_steps_is_not_the_luckiest():
    """T does not matter here; tokens of many T, a few each, let some T look good."""
    flip, fooled, naive = random.Random(7), 0, 0
    for _ in range(200):
        examined = {T: [n] for T, n in ((1, 90), (2, 75), (4, 45), (8, 15))}
        accepted = {
            T: [sum(flip.random() < 0.35 for _ in range(n))] for T, (n,) in examined.items()
        }
        seen = costs(ks=(1,), steps=tuple(examined), examined=examined, accepted=accepted)
        highest = max(seen.acceptances(T, 1)[0][0] for T in examined)
        fooled += highest > 0.45
        naive += max(accepted[T][0] / examined[T][0] for T in examined) > 0.45
    assert fooled < 10 and naive > 50


def test_the_posterior_counts_examined_positions_only():
    planner = Planner(costs(ks=(4,)), ks=(4,))
    planner.want(4)
    planner.update([4], [4], [1])
    after_one = planner.posterior(1)
    assert [mean for mean, _ in after_one] == [2 / 3, 1 / 3, 0.5, 0.5]
    assert after_one[0][1] == pytest.approx((2 / 9 / 4) ** 0.5)  # of Beta(2, 1)
    planner.update([4], [4], [4])
    weights = [2 + MEMORY + 1, 2 + MEMORY + 1, 3, 3]
    heads = [1 + MEMORY + 1, 1 + 1, 2, 2]
    assert [m for m, _ in planner.posterior(1)] == [
        pytest.approx(h / w) for h, w in zip(heads, weights, strict=True)
    ]


@pytest.mark.parametrize("alpha", [0.2, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("token", [0.01, 0.2])
def test_it_comes_within_five_percent_of_the_best_plan(alpha, token):
    """Over 400 rounds, from a prior that knows nothing."""
    planner = Planner(costs(token=token))
    chance = lambda i, steps: alpha
    plans = simulate(planner, chance, 400)
    assert rate(plans, planner, chance) > 0.95 * best_rate(planner, chance)


def test_more_steps_where_they_pay_and_only_there():
    """At 4 steps tokens are accepted nearly always; whether that pays is a matter of their cost."""
    chance = lambda i, steps: 0.9 if steps == 4 else 0.3
    for draft, wanted in ((0.02, 4), (2.0, 1)):
        planner = Planner(costs(steps=(1, 4), draft=draft))
        plans = simulate(planner, chance, 600)
        assert sum(plan.steps == wanted or plan == PLAIN for plan in plans[300:]) > 250
        assert rate(plans[100:], planner, chance) > 0.95 * best_rate(planner, chance)


@pytest.mark.parametrize("examined", [20, 0])
def test_a_useless_drafter_costs_at_most_three_percent(examined):
    """The measurement of costs has seen it, or has not looked."""
    never = lambda i, steps: 0.0
    planner = Planner(costs(examined={1: [examined]}, accepted={1: [0]}))
    plans = simulate(planner, never, 300)
    assert (plans[:10] == [PLAIN] * 10) == (examined > 0)
    assert rate(plans, planner, never) > 0.97 * best_rate(planner, never)
    assert planner.lost <= CURIOSITY * planner.spent


def test_a_drafter_that_became_good_is_found_out():
    """Plain decoding looks best by what was seen, yet drafts are tried now and then."""
    planner = Planner(costs(draft=0.3, examined={1: [10]}, accepted={1: [1]}))
    plans = simulate(planner, lambda i, steps: 0.9, 1500)
    assert plans[:10] == [PLAIN] * 10 and plans[-1].k == 8


def test_without_curiosity_it_is_not(monkeypatch):
    """The mutant of the test before."""
    monkeypatch.setattr("specdiff.planning.planner.CURIOSITY", -1.0)
    planner = Planner(costs(draft=0.3, examined={1: [10]}, accepted={1: [1]}))
    assert set(simulate(planner, lambda i, steps: 0.9, 1500)) == {PLAIN}


def test_a_failure_under_one_t_counts_against_others():
    seen = costs(steps=(1, 2), examined={1: [80], 2: [80]}, accepted={1: [64], 2: [68]})
    planner = Planner(seen)
    before = planner.posterior(2)[0][0]
    for _ in range(200):
        planner.plan = Plan(1, 1)
        planner.update([1], [1], [0])
    assert planner.posterior(2)[0][0] < 0.1 * before


@pytest.mark.parametrize("shared", [True, False])
def test_texts_that_are_harder_than_foretold(shared, monkeypatch):
    """120 rounds, 40 times. Were each T judged by itself, the mutant, one after another would be
    tried for what was foretold of it."""
    if not shared:
        monkeypatch.setattr("specdiff.planning.planner.SURE", 1e9)
    examined = {T: [60, 30, 10] for T in (1, 2, 4)}
    accepted = {1: [27, 9, 3], 2: [30, 10, 4], 4: [32, 12, 5]}
    planner = Planner(costs(steps=(1, 2, 4), examined=examined, accepted=accepted))
    chance = lambda i, steps: 0.3 if i == 0 else 0.1
    best = best_rate(planner, chance)
    runs = [simulate(planner, chance, 120, seed) for seed in range(40)]
    reached = sum(rate(plans, planner, chance) for plans in runs) / len(runs) / best
    assert (reached > 0.955) == shared


def test_the_first_draft_costs_more():
    """The drafter has to read the prompt, so plain decoding goes on until that is a small thing."""
    doubtful = costs(draft=0.3, examined={1: [10]}, accepted={1: [1]})
    tried = []
    for first in (0.0, 5.0):
        planner = Planner(replace(doubtful, first=first))
        plans = simulate(planner, lambda i, steps: 0.0, 900)
        tried.append(next(n for n, plan in enumerate(plans) if plan != PLAIN))
        assert planner.lost <= CURIOSITY * planner.spent
    assert tried[0] < 100 and 500 <= tried[1] < 600


def test_it_chooses_from_what_it_is_told():
    planner = Planner(costs(steps=(1, 2)), ks=(4,), steps=(2,))
    assert planner.plans == [Plan(4, 2)] and planner.most == 4
    assert planner.want(8) == Wanted([4], 4, 2)
    assert Planner(costs(steps=(0,), draft=0.0), ks=(2,)).want(8) == Wanted([2], 2, None)
    assert all(plan.k <= 2 for plan in simulate(Planner(costs(ks=(0, 1, 2))), lambda i, T: 1, 50))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Planner(costs(), ks=(5,)), r"^nothing to choose from .* K of 0, 1, 2, 4, 8 were"),
        (lambda: Planner(costs()).start(3), r"with 1 rows and the session has 3: call measure\("),
    ],
)
def test_bad_arguments_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_costs_are_kept_in_a_file(tmp_path):
    before = costs(steps=(1, 2), examined={1: [3, 2], 2: [1]}, accepted={1: [2, 0], 2: [1]})
    before = replace(before, share={1: 0.5, 2: 1.0})
    before.save(tmp_path / "folder" / "costs.json")
    assert Costs.load(tmp_path / "folder" / "costs.json") == before
    (tmp_path / "broken.json").write_text('{"batch": 1}')
    with pytest.raises(ValueError, match=r"broken.json holds no costs \(.*plans.*\): remove it"):
        Costs.load(tmp_path / "broken.json")


def test_tokens_that_were_not_drafted_were_not_accepted_and_cost_nothing():
    """As where prompt lookup finds no match."""
    seen = costs(ks=(0, 4), steps=(0,), draft=0.0, token=0.25, examined={0: [8]}, accepted={0: [4]})
    planner = Planner(replace(seen, share={0: 0.25}))
    assert planner.seconds(Plan(4, 0)) == 1.25 and planner.seconds(PLAIN) == 1.0
    planner.want(4)
    planner.plan = Plan(4, 0)
    planner.update([4], [0], [0])
    planner.update([4], [2], [2])
    (first, _), (second, _), (third, _) = planner.posterior(0)[:3]
    ((mean, weight),) = seen.acceptances(0, 1)
    assert weight == 10  # then missed once, accepted once
    assert first == pytest.approx((weight * mean + 1) / (weight + MEMORY + 1))
    assert second == pytest.approx((2 * 0.5 + 1) / (2 + 1))
    assert third == pytest.approx(2 * 0.5 / (2 + 1))  # wanted, not drafted
    share = ((PRIOR / 4 * MEMORY + 0) * MEMORY + 2) / ((PRIOR * MEMORY + 4) * MEMORY + 4)
    assert planner.seconds(Plan(4, 0)) == pytest.approx(1 + share)


# --- in the loop ---


class Turns:
    """Drafts in some rounds and not in others."""

    def __init__(self, *widths: int) -> None:
        self.widths, self.most = widths, max(widths)

    def start(self, batch):
        self.batch, self.round = batch, 0

    def forget(self, rows):
        pass

    def want(self, most):
        width = self.widths[self.round % len(self.widths)]
        self.round += 1
        return Wanted([width] * self.batch, width)

    def update(self, wanted, drafted, accepted):
        pass

    def withhold(self, draft):
        return draft


@pytest.mark.parametrize("name", DRAFTERS)
@pytest.mark.parametrize("widths", [(0, 3), (3, 0, 0, 0, 2), (0, 0, 0, 0, 0, 4)])
def test_a_drafter_is_told_what_it_missed(target, name, widths):
    """Drafts are those of a drafter that reads the text so far in one piece."""
    seen: list[tuple[list[list[int]], torch.Tensor]] = []
    drafter = DRAFTERS[name](target)
    inner = drafter.draft

    def watched(news, k, lengths, draws):
        draft = inner(news, k, lengths, draws)
        seen.append(([list(text) for text in session.texts], draft.tokens))
        return draft

    drafter.draft = watched
    decoder = Decoder(target, drafter, Turns(*widths))
    session = decoder.open(2, 60, stop_tokens=())
    session.admit(PROMPTS[:2], max_new_tokens=24)
    while not all(session.done):
        session.step()
    want = Decoder(target).generate(PROMPTS[:2], max_new_tokens=24, stop_tokens=()).new_tokens
    assert [text[p:] for text, p in zip(session.texts, session.prompts, strict=True)] == want
    assert len(seen) >= 2
    for texts, tokens in seen:
        fresh = DRAFTERS[name](target)
        first: list[torch.Tensor] = []
        inner_fresh = fresh.draft

        def noted(*arguments, call=inner_fresh, first=first):
            draft = call(*arguments)
            first.append(draft.tokens)
            return draft

        fresh.draft = noted
        again = Decoder(target, fresh, Turns(tokens.shape[1])).open(2, 60, stop_tokens=())
        again.admit(texts, max_new_tokens=9)
        again.step()
        drafted = tokens >= 0  # near its end a row has room for fewer
        assert drafted[:, 0].any() and torch.equal(first[0][drafted], tokens[drafted])


def test_a_drafter_that_is_never_called(target):
    class Never(Drafter):
        needs_hidden, vocab_size, block = False, None, 4

        def start(self, *_):
            pass

        def draft(self, *_):
            raise AssertionError("called")

    decoder = Decoder(target, Never(), Planner(costs(ks=(0, 4), batch=3), ks=(0,)))
    want = Decoder(target).generate(PROMPTS, max_new_tokens=9).new_tokens
    assert decoder.generate(PROMPTS, max_new_tokens=9).new_tokens == want


def test_places_that_are_filled_again_bring_no_old_news(target):
    """Another prompt takes a place between rounds without a draft."""
    drafter = Autoregressive(target.model)
    session = Decoder(target, drafter, Turns(0, 0, 0, 0, 3)).open(2, 60, stop_tokens=())
    session.admit([[1, 2, 3], [4, 5]], max_new_tokens=[30, 3][0])
    for _ in range(3):
        session.step()
    session.abort(1)
    session.admit([[7, 8, 9, 10]], first=1, max_new_tokens=30)
    session.step()
    step = session.step()
    assert step.drafted == [3, 3] == step.accepted  # by itself, greedily


def test_news_are_joined_row_by_row():
    old = News(torch.tensor([[1, 2, 99], [3, 98, 97]]), torch.tensor([2, 1]), torch.ones(2, 3, 1))
    new = News(torch.tensor([[4, 96], [5, 6]]), torch.tensor([1, 2]), 2 * torch.ones(2, 2, 1), 9)
    both = joined([old, new])
    assert both.counts.tolist() == [3, 3] and both.longest == 9
    assert both.tokens[:, :3].tolist() == [[1, 2, 4], [3, 5, 6]]
    assert both.hidden[:, :3, 0].tolist() == [[1, 1, 2], [1, 2, 2]]


def test_costs_of_a_real_pair(target):
    """Every plan is measured; longer drafts and more steps never cost less; what was accepted is
    counted."""
    drafter = DRAFTERS["block-diffusion"](target)
    drafter.steps = 2
    found = measure(Decoder(target, drafter), ks=(1, 2, 4), batch=2)
    assert found.plans == [PLAIN, (1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]
    assert drafter.steps == 2
    by_plan = dict(zip(found.plans, zip(found.draft, found.verify, strict=True), strict=True))
    for p in found.plans:
        for q in found.plans:
            if q.k >= p.k and q.steps >= p.steps:
                assert by_plan[p][0] <= by_plan[q][0] and by_plan[p][1] <= by_plan[q][1]
    for T in (1, 2, 4):
        examined, accepted = found.examined[T], found.accepted[T]
        assert examined[0] > 0
        assert all(n <= a for a, n in pairwise([examined[0], *examined]))
        assert all(
            later <= a <= n for n, a, later in zip(examined, accepted, examined[1:], strict=False)
        )


def test_a_drafter_that_is_the_target_is_always_accepted(target):
    greedy = Sampling()
    found = measure(Decoder(target, Autoregressive(target.model)), ks=(3,), sampling=greedy)
    assert found.plans == [PLAIN, (3, 0)] and found.examined == found.accepted


def test_leniency_is_measured_as_such(target):
    """With everything accepted that the target allows at all."""
    drafter = DRAFTERS["autoregressive"](target)
    lenient = Decoder(target, drafter, rule="lenient", lenience=Lenience("ensemble", 0.0))
    found = measure(lenient, ks=(2,))
    assert found.examined == found.accepted and found.examined[0][1] > 0


def test_a_drafter_that_never_finds_anything(target):
    """Rounds of every width are measured all the same, with guesses; nothing was accepted."""

    class Nothing(PromptLookup):
        def draft(self, news, k, lengths, draws):
            return super().draft(news, k, lengths, draws)._replace(lengths=lengths * 0)

    found = measure(Decoder(target, Nothing()), ks=(1, 8))
    assert found.share == {0: 0.0} and found.accepted == {0: [0] * 8}
    assert found.examined[0][0] > 0 == sum(found.examined[0][1:])
    assert all(0 < seconds < 60 for seconds in found.verify)
    planner = Planner(found)
    assert planner.speeds()[PLAIN] == 1 / found.verify[0]


def test_drafts_longer_than_a_measured_text():
    """A text is as long as the longest draft needs, and a round of it costs something finite."""
    target = Target(tiny_model("llama", context=512))
    decoder = Decoder(target, PromptLookup())
    costs = measure(decoder, [[1, 2, 3]], ks=(64,))
    costs.check()
    text = Decoder(target, PromptLookup(), Planner(costs)).generate([1, 2], max_new_tokens=5)
    assert text.new_tokens == Decoder(target).generate([1, 2], max_new_tokens=5).new_tokens
    with pytest.raises(ValueError, match=r"^prompts must hold at least one"):
        measure(decoder, [])


def test_there_has_to_be_something_to_measure(target):
    with pytest.raises(ValueError, match=r"^decoder: expected one with a drafter"):
        measure(Decoder(target))
    with pytest.raises(ValueError, match=r"^nothing to measure: .* 1 to 16 tokens, .* ks=\[99\]"):
        measure(Decoder(target, PromptLookup()), ks=(99,))


@pytest.mark.parametrize("name", ["block-diffusion", "itself", "prompt-lookup"])
def test_text_under_a_planner(target, name):
    """Greedy text is plain decoding's; sampled text is the same again, as plans depend on nothing
    but the costs and what was accepted."""
    drafter = DRAFTERS[name](target)
    steps = (1, 2) if name == "block-diffusion" else (0,)
    planner = Planner(costs(ks=(0, 1, 2, 4), steps=steps, batch=3))
    want = Decoder(target).generate(PROMPTS, max_new_tokens=30).new_tokens
    assert Decoder(target, drafter, planner).generate(PROMPTS, max_new_tokens=30).new_tokens == want
    hot = {"max_new_tokens": 30, "sampling": Sampling(1.0), "seed": 5}
    first = Decoder(target, drafter, planner).generate(PROMPTS, **hot).new_tokens
    assert Decoder(target, drafter, planner).generate(PROMPTS, **hot).new_tokens == first
