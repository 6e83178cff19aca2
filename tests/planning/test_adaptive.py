"""AdaptiveK: what it learns, what it withholds, and a loop whose text it leaves alone."""

from __future__ import annotations

import math
import random

import pytest
import torch

from specdiff import Decoder, Sampling
from specdiff.drafters import Autoregressive, PromptLookup
from specdiff.loop.drafter import Drafter
from specdiff.planning.adaptive import MEMORY, AdaptiveK, reach
from specdiff_kernels import Draft
from tests.tiny import DRAFTERS, PROMPTS, block_diffusion, tiny_model

NAN = float("nan")


class Constant(Drafter):
    """Drafts one token over and over; `fields` are of its Draft."""

    needs_hidden = False
    vocab_size = None
    block = 6

    def __init__(self, token: int, **fields) -> None:
        self.token, self.fields = token, fields

    def start(self, batch, capacity, sampling):
        pass

    def draft(self, news, k, lengths, draws):
        B = len(lengths)
        tau = torch.zeros(B, k, dtype=torch.int32)
        tokens, rows = torch.full((B, k), self.token), torch.full((B, k), -1)
        return Draft(tokens, tau, rows, lengths=lengths, **self.fields)


# --- alone ---


def learnt(adaptive: AdaptiveK, outcomes: list[tuple[int, int]]) -> AdaptiveK:
    """After a run of one row, a pair (drafted, accepted) a round."""
    adaptive.start(1)
    for drafted, accepted in outcomes:
        adaptive.update([drafted], [drafted], [accepted])
    return adaptive


def test_reach_is_the_most_tokens_that_have_the_chance():
    for acceptance in (0.02, 0.1, 0.3, 0.5, 0.9, 0.99):
        for least in (0.01, 0.1, 0.5, 0.9):
            k = reach(acceptance, least)
            assert acceptance ** (k + 1) < least and (k == 0 or acceptance**k >= least)
    assert reach(0.5, 0.125) == 3  # the bound itself is enough
    assert reach(0.0, 0.1) == 0
    assert reach(1.0, 0.1) >= 100  # and it ends


def test_acceptance_is_a_mean_that_forgets_slowly():
    """One of two to begin with; each examined token weighs MEMORY more than the one before it.

    Of 3 drafted and 1 accepted, 2 were examined; of 2 and 2, both; of 2 and 0, one.
    """
    adaptive = learnt(AdaptiveK(least_chance=0.01), [(3, 1), (2, 2), (0, 0), (2, 0)])
    outcomes = [1, 0, 1, 1, 0]
    ages = [MEMORY**age for age in reversed(range(len(outcomes)))]
    accepted = MEMORY ** len(ages) + sum(w * x for w, x in zip(ages, outcomes, strict=True))
    examined = 2 * MEMORY ** len(ages) + sum(ages)
    assert adaptive.accepted == [pytest.approx(accepted)]
    assert adaptive.examined == [pytest.approx(examined)]
    assert adaptive.choose(100) == [math.floor(math.log(0.01) / math.log(accepted / examined))]


def test_recent_rounds_weigh_more():
    good, bad = [(2, 2)] * 10, [(2, 0)] * 20
    late, early = learnt(AdaptiveK(), bad + good), learnt(AdaptiveK(), good + bad)
    assert late.choose(99) > early.choose(99) == [1]


def test_rounds_without_a_draft_teach_nothing():
    adaptive = learnt(AdaptiveK(), [(0, 0)] * 50)
    assert adaptive.choose(99) == [3]  # 1/8 >= 0.1 > 1/16


def test_k_stays_between_1_and_most():
    best, worst = learnt(AdaptiveK(), [(9, 9)] * 50), learnt(AdaptiveK(), [(9, 0)] * 50)
    for most in (1, 2, 7, 99):
        assert best.choose(most) == [min(most, reach(best.accepted[0] / best.examined[0], 0.1))]
        assert worst.choose(most) == [1]
    assert best.choose(7) == [7]


def test_a_smaller_chance_drafts_more():
    chosen = [
        learnt(AdaptiveK(least_chance=c), [(4, 3)] * 9).choose(999)[0]
        for c in (0.999, 0.5, 0.1, 1e-3)
    ]
    assert chosen[0] == 1 and chosen == sorted(set(chosen))


def test_start_forgets():
    adaptive = learnt(AdaptiveK(), [(5, 5)] * 30)
    assert adaptive.choose(99) > [3]
    adaptive.start(2)
    assert adaptive.choose(99) == [3, 3]


def test_rows_learn_independently():
    chance = random.Random(0)
    rounds = []
    for _ in range(30):
        drafted = [chance.randint(0, 6) for _ in range(4)]
        rounds.append([(n, chance.randint(0, min(n, 2 * b))) for b, n in enumerate(drafted)])
    batch = AdaptiveK()
    batch.start(4)
    for outcomes in rounds:
        drafted, accepted = zip(*outcomes, strict=True)
        batch.update(drafted, drafted, accepted)
    alone = [learnt(AdaptiveK(), [outcomes[b] for outcomes in rounds]) for b in range(4)]
    chosen = batch.choose(99)
    assert chosen == [one.choose(99)[0] for one in alone]
    assert len(set(chosen)) > 1


def measured(*entropies: list[float], lengths: list[int]) -> Draft:
    entropy = torch.tensor(entropies, dtype=torch.float64)
    return Constant(1, entropy=entropy).draft(None, len(entropies[0]), torch.tensor(lengths), None)


def test_positions_from_the_first_uncertain_one_on_are_withheld():
    draft = measured(
        [0.1, 0.2, 1.5, 0.1],
        [1.6, 0.1, 0.1, 0.1],
        [0.1, 0.1, 0.1, 0.1],
        [0.1, 0.1, 0.1, 9.0],
        [1.0, 1.0, 1.0 + 1e-9, 0.0],  # the limit itself is allowed
        lengths=[4, 4, 4, 2, 4],
    )
    cut = AdaptiveK(max_entropy=1.0).withhold(draft)
    assert cut.lengths.tolist() == [2, 0, 4, 2, 2]
    assert cut._replace(lengths=draft.lengths) == draft  # all else is untouched


def test_what_was_not_measured_is_not_withheld():
    draft = measured([NAN, 0.1, NAN, 2.0], [NAN] * 4, lengths=[4, 4])
    assert AdaptiveK(max_entropy=1.0).withhold(draft).lengths.tolist() == [3, 4]
    bare = draft._replace(entropy=None)
    assert AdaptiveK(max_entropy=1.0).withhold(bare) is bare


def test_nothing_is_withheld_unless_asked_for():
    draft = measured([99.0, 99.0], lengths=[2])
    assert AdaptiveK().withhold(draft) is draft


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"most": 0}, "most must be at least 1, got 0"),
        ({"least_chance": 0.0}, r"least_chance must be in \(0, 1\), got 0.0"),
        ({"least_chance": 1.0}, r"least_chance must be in \(0, 1\), got 1.0"),
        ({"least_chance": NAN}, r"least_chance must be in \(0, 1\), got nan"),
        ({"max_entropy": -0.5}, "max_entropy must be at least 0, got -0.5"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveK(**arguments)


# --- in the loop ---


def lengths(decoder: Decoder, prompts, **options) -> list[list[int]]:
    """How many tokens each row drafted in each of its rounds."""
    rows: list[list[int]] = [[] for _ in prompts]
    for step in decoder.stream(prompts, **options):
        for row, drafted, tokens in zip(rows, step.drafted, step.tokens, strict=True):
            row += [drafted] if tokens else []
    return rows


@pytest.mark.parametrize("name", DRAFTERS)
def test_greedy_text_is_that_of_plain_decoding(target, name):
    want = Decoder(target).generate(PROMPTS, max_new_tokens=25).new_tokens
    decoder = Decoder(target, DRAFTERS[name](target), AdaptiveK(4, 0.05, max_entropy=0.5))
    got = decoder.generate(PROMPTS, max_new_tokens=25)
    assert got.new_tokens == want
    assert got.stats.drafted > 0


@pytest.mark.parametrize("most", [None, 9])
def test_a_perfect_drafter_gets_to_draft_the_most(target, most):
    """None is the drafter's own block; near its end a row has room for fewer."""
    decoder = Decoder(target, Autoregressive(target.model), AdaptiveK(most))
    [drafted] = lengths(decoder, [[1, 2]], max_new_tokens=50)
    most = most or Autoregressive.block
    assert drafted[:3] == [3, most, most] and max(drafted) == most


def test_a_useless_drafter_soon_drafts_one_token(target):
    text = Decoder(target).generate([1, 2], max_new_tokens=20).new_tokens[0]
    never = next(token for token in range(50) if token not in text)
    decoder = Decoder(target, Constant(never), AdaptiveK())
    [drafted] = lengths(decoder, [[1, 2]], max_new_tokens=20)
    assert drafted == [3, 2] + [1] * 17 + [0]  # the last token needs no draft


def test_a_row_of_a_batch_drafts_what_it_drafts_alone(target):
    decoder = Decoder(target, Autoregressive(tiny_model("gpt2", seed=5)), AdaptiveK(6))
    options = {"max_new_tokens": 20, "sampling": Sampling(temperature=2.0)}
    seeds = [11, 12, 13]
    batch = lengths(decoder, PROMPTS, seed=seeds, **options)
    texts = decoder.generate(PROMPTS, seed=seeds, **options).new_tokens
    for prompt, seed, drafted, text in zip(PROMPTS, seeds, batch, texts, strict=True):
        assert lengths(decoder, [prompt], seed=[seed], **options) == [drafted]
        assert decoder.generate(prompt, seed=[seed], **options).new_tokens == [text]
    assert len(set(map(tuple, batch))) == 3


def test_uncertain_positions_are_not_drafted(target):
    """Without any certainty nothing is drafted, and sampled text is plain decoding's own."""
    drafter = block_diffusion(target)
    options = {"max_new_tokens": 15, "sampling": Sampling(temperature=1.0), "seed": 3}
    none, some, free = (
        Decoder(target, drafter, AdaptiveK(max_entropy=limit)).generate(PROMPTS, **options)
        for limit in (0.0, 0.3, None)
    )
    assert 0 == none.stats.drafted < some.stats.drafted < free.stats.drafted
    assert none.new_tokens == Decoder(target).generate(PROMPTS, **options).new_tokens


def test_entangled_tokens_are_refused(target):
    drafter = Constant(1, entangled=True)
    with pytest.raises(ValueError, match=r"k must be a number .* entangled tokens: they have"):
        Decoder(target, drafter, AdaptiveK()).generate([1, 2])
    assert Decoder(target, drafter, 2).generate([1, 2], max_new_tokens=4).new_tokens


def test_the_most_is_checked_as_k_is(target):
    with pytest.raises(ValueError, match="k must be below the target's context of 64 tokens"):
        Decoder(target, PromptLookup(), AdaptiveK(64))


def test_without_a_drafter_there_is_nothing_to_choose(target):
    plain = Decoder(target).generate([1, 2], max_new_tokens=5).new_tokens
    assert Decoder(target, None, AdaptiveK()).generate([1, 2], max_new_tokens=5).new_tokens == plain
