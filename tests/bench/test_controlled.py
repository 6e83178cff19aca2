"""Controlled acceptance: the text stays plain decoding's, what stands is what was set, and the
drafter works for it."""

from __future__ import annotations

import math
from itertools import accumulate
from operator import mul

import pytest
import torch

from specdiff import AdaptiveK, Decoder, Sampling, Target
from specdiff.bench.controlled import Controlled, chance_for_share
from specdiff.drafters import Autoregressive, BlockDiffusion, PromptLookup
from specdiff.drafters.ddit import DDiT, DDiTConfig
from specdiff.drafters.sedd import SEDD
from specdiff.loop.chooser import Wanted
from tests.tiny import tiny_model, tiny_network

V, K = 50, 4
CHANCES = [0.9, 0.75, 0.6, 0.45]
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 1, 2, 4, 5], [3], [7, 7]]
DISTRIBUTIONS = {"greedy": (Sampling(), "token"), "coupled": (Sampling(1.0), "coupled")}
RUNS = 8  # of the statistical tests


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(tiny_model("gpt2", vocab=V))


def make(name: str, target: Target):
    """A drafter of each kind, all of them bad ones."""
    torch.manual_seed(0)
    if name == "sedd":
        network = DDiT(DDiTConfig(V, hidden_size=16, blocks=1, heads=2, cond_dim=8, length=24))
        return SEDD(network, block=K, steps=2)
    if name == "block-diffusion":  # of the target's states, and some of its tokens
        return BlockDiffusion(tiny_network("block-diffusion", torch.arange(0, V, 2)), target)
    if name == "autoregressive":
        return Autoregressive(tiny_model("gpt2", vocab=V, seed=1))
    return PromptLookup()


class Case:
    """Prompts decoded by plain decoding, and options to decode them again."""

    def __init__(self, target, distribution="greedy", *, seed=0, prompts=PROMPTS, tokens=40):
        sampling, self.rule = DISTRIBUTIONS[distribution]
        self.target, self.prompts = target, prompts
        self.options = dict(max_new_tokens=tokens, sampling=sampling, seed=seed, stop_tokens=())
        plain = Decoder(target, rule=self.rule).generate(prompts, **self.options)
        self.plain = plain.sequences
        self.texts = {tuple(p): text for p, text in zip(prompts, plain.sequences, strict=True)}

    def run(self, drafter, k=K, **options):
        decoder = Decoder(self.target, drafter, k, self.rule)
        return decoder.generate(self.prompts, **self.options, **options)


@pytest.fixture(scope="module", params=DISTRIBUTIONS)
def cases(request, target):
    if request.param == "greedy":
        return [Case(target)] * RUNS  # whose draws differ by the drafter's seed
    return [Case(target, request.param, seed=seed) for seed in range(RUNS)]


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
@pytest.mark.parametrize("name", ["sedd", "block-diffusion", "autoregressive", "lookup"])
def test_the_text_is_plain_decodings(target, distribution, name):
    case = Case(target, distribution)
    for look_every in (1, 3) if name in ("block-diffusion", "autoregressive") else (1,):
        run = case.run(Controlled(make(name, target), case.texts, 0.7), look_every=look_every)
        assert run.sequences == case.plain
        assert 0 < run.stats.accepted < run.stats.drafted


def within(examined: list[int], accepted: list[int], chances: list[float]) -> None:
    """Each position's count is within 4.5 standard deviations of a binomial distribution's mean."""
    for n, a, c in zip(examined, accepted, chances, strict=True):
        assert abs(a - n * c) <= 4.5 * math.sqrt(n * c * (1 - c)), (examined, accepted)
    assert min(examined) > 100


def counts(cases, controlled=Controlled, chance=CHANCES, name="autoregressive"):
    """By position, how often a token was examined and accepted."""
    examined, accepted = [0] * K, [0] * K
    for number, case in enumerate(cases):
        drafter = controlled(make(name, case.target), case.texts, chance, seed=number)
        stats = case.run(drafter).stats
        for total, more in ((examined, stats.examined_at), (accepted, stats.accepted_at)):
            for i, n in enumerate(more):
                total[i] += n
    return examined, accepted


@pytest.mark.parametrize("name", ["sedd", "autoregressive"])
def test_acceptance_by_position_is_what_was_set(cases, name):
    within(*counts(cases, name=name), CHANCES)


def test_one_chance_is_that_of_all_positions(cases):
    within(*counts(cases, chance=0.7), [0.7] * K)


class NotReplaced(Controlled):
    """Leaves the drafter's own tokens."""

    def draft(self, news, k, lengths, draws):
        return self.drafter.draft(news, k, lengths, draws)


class Shifted(Controlled):
    """Takes each position's chance for the next one."""

    def _chances(self, K):
        return super()._chances(K).roll(1)


class OffByOne(Controlled):
    """Takes the draft's place for one that is a token further on."""

    def draft(self, news, k, lengths, draws):
        draft = super().draft(news, k, lengths, draws)
        return draft._replace(tokens=draft.tokens.roll(-1, 1))


class Tied(Controlled):
    """Draws once for all positions."""

    def _open(self, b, prompt, seed):
        super()._open(b, prompt, seed)
        self.coins[b] = self.coins[b, 0]


@pytest.mark.parametrize("mutant", [NotReplaced, Shifted, OffByOne, Tied])
def test_drafters_that_do_otherwise_are_noticed(target, mutant):
    cases = [Case(target)] * RUNS
    with pytest.raises(AssertionError):
        within(*counts(cases, mutant), CHANCES)


def test_share_of_drafted_tokens_is_alpha(target):
    """First rounds alone, which all have room for K tokens."""
    alpha, k, drafts = 0.6, 5, 400
    case = Case(target, tokens=k + 1)
    chance = chance_for_share(alpha, k)
    drafted = accepted = 0
    for seed in range(drafts // len(PROMPTS)):
        drafter = Controlled(make("autoregressive", target), case.texts, chance, seed=seed)
        session = Decoder(target, drafter, k).open(len(PROMPTS), 40)
        session.admit(PROMPTS, max_new_tokens=k + 1)
        step = session.step()
        drafted, accepted = drafted + sum(step.drafted), accepted + sum(step.accepted)
    powers = list(accumulate([chance] * k, mul))  # chances of at least i accepted tokens
    mean = sum(powers)
    variance = sum((2 * i + 1) * p for i, p in enumerate(powers)) - mean**2
    assert drafted == drafts * k and mean == pytest.approx(alpha * k)
    assert abs(accepted - drafts * mean) < 4.5 * math.sqrt(drafts * variance)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_chance_one_accepts_everything_and_chance_zero_nothing(target, distribution):
    case = Case(target, distribution)
    drafter = make("autoregressive", target)
    everything = case.run(Controlled(drafter, case.texts, 1)).stats
    assert everything.accepted == everything.drafted > 0
    assert everything.tokens_per_forward == K + 1
    nothing = case.run(Controlled(drafter, case.texts, 0)).stats
    assert nothing.accepted == 0 and nothing.drafted > 0
    assert nothing.tokens_per_forward == 1


@pytest.mark.parametrize("name", ["sedd", "autoregressive"])
def test_the_drafter_works_as_ever(target, name):
    """As many forwards as rounds in which none of its tokens stands ask for."""
    case, calls = Case(target), []
    drafter = make(name, target)
    network = drafter.network if name == "sedd" else drafter.model.body
    hook = network.register_forward_hook(lambda *_: calls.append(1))
    rounds = case.run(Controlled(drafter, case.texts, 0)).stats.target_forwards
    hook.remove()
    assert rounds == 40
    wanted = [min(K, 39 - n) for n in range(39)]  # the last round has no room for a draft
    assert len(calls) == (2 * len(wanted) if name == "sedd" else 1 + sum(wanted))  # 1: the prompt


def test_steps_and_limits_are_the_drafters(target):
    sedd = make("sedd", target)
    drafter = Controlled(sedd, {}, 0.5)
    assert (drafter.steps, drafter.block, drafter.most, drafter.vocab_size) == (2, K, 23, V)
    assert not drafter.needs_hidden and not drafter.capturable
    drafter.steps = 1
    assert sedd.steps == 1 and len(sedd.table) == 1
    drafter = Controlled(make("block-diffusion", target), {}, 0.5)
    assert drafter.needs_hidden and drafter.capturable
    drafter = Controlled(make("autoregressive", target), {}, 0.5)
    assert drafter.capturable and drafter.steps is None and drafter.most is None
    assert Controlled(PromptLookup(), {}, 0.5).vocab_size is None


def stepwise(case, drafter, k=K, **options):
    """Tokens of each round, a list of rounds for each row."""
    decoder = Decoder(case.target, drafter, k, case.rule)
    steps = decoder.stream(case.prompts, **{**case.options, **options})
    rounds = [step.tokens for step in steps]
    return [[row for row in rows if row] for rows in zip(*rounds, strict=True)]


def outcomes(rows, k):
    """Of each row, which tokens were drafted and stood, by their place in the text."""
    result = []
    for rounds in rows:
        ends = list(accumulate(map(len, rounds)))
        known = {}
        for tokens, end in zip(rounds, ends, strict=True):
            if end < 40 - k:  # behind that, drafts are shorter
                known |= dict.fromkeys(range(end - len(tokens), end - 1), True)
                known |= {end - 1: False} if len(tokens) <= k else {}  # else no draft's
        result.append(known)
    return result


def test_draws_belong_to_the_seeds_and_the_prompt(target):
    """Neither batch mates, nor the place, nor K decide where a row stumbles."""
    seeds = [5, 6, 7, 8]
    case = Case(target, seed=seeds)
    inner = make("autoregressive", target)
    rounds = stepwise(case, Controlled(inner, case.texts, 0.6))
    assert rounds == stepwise(case, Controlled(inner, case.texts, 0.6))
    assert rounds != stepwise(case, Controlled(inner, case.texts, 0.6, seed=1))
    other = stepwise(case, Controlled(inner, case.texts, 0.6), seed=[6, 5, 7, 8])
    assert other[0] != rounds[0] and other[2] == rounds[2]
    for b in (1, 3):
        alone = Case(target, seed=[seeds[b]], prompts=[PROMPTS[b]])
        assert stepwise(alone, Controlled(inner, alone.texts, 0.6)) == [rounds[b]]
    short = stepwise(case, Controlled(inner, case.texts, 0.6), k=2)
    for a, b in zip(outcomes(rounds, K), outcomes(short, 2), strict=True):
        shared = a.keys() & b.keys()
        assert len(shared) > 15 and all(a[i] == b[i] for i in shared)


def test_equal_prompts_do_not_stumble_together(target):
    case = Case(target, prompts=[[1, 2, 3]] * 2)
    rounds = stepwise(case, Controlled(make("autoregressive", target), case.texts, 0.6))
    texts = [[token for tokens in row for token in tokens] for row in rounds]
    assert rounds[0] != rounds[1] and texts[0] == texts[1]


class NowAndThen:
    """Drafts K tokens in some rounds, none in others."""

    most = K

    def start(self, batch):
        self.round = 0

    def forget(self, rows):
        pass

    def update(self, wanted, drafted, accepted):
        self.round += 1

    def withhold(self, draft):
        return draft

    def want(self, most):
        width = 0 if self.round % 3 == 0 else most
        return Wanted([width] * len(PROMPTS), width)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_rounds_without_a_draft(target, distribution):
    """Also the first ones, so that the prompts come together with what follows them."""
    case = Case(target, distribution)
    run = case.run(Controlled(make("block-diffusion", target), case.texts, 1), NowAndThen())
    assert run.sequences == case.plain
    assert run.stats.accepted == run.stats.drafted > 0


def test_rows_that_come_and_go(target):
    """Places are taken again, by prompts that are learnt on the way."""
    drafter = Controlled(make("autoregressive", target), {}, [1, 1, 0, 1])
    decoder = Decoder(target, drafter, K)
    session = decoder.open(rows=2, capacity=60, stop_tokens=())
    waiting = [PROMPTS[n % 4][: 3 + n] for n in range(3)] + [PROMPTS[3]]
    expected, finished = {}, []
    while waiting or not all(session.done):
        for b in range(2):
            if waiting and session.done[b]:
                prompt = waiting.pop()
                case = Case(target, prompts=[prompt], tokens=20)
                drafter.learn(prompt, case.plain[0])
                session.admit([prompt], first=b, max_new_tokens=20)
                expected[b] = case.plain[0]
        session.step()
        for b in range(2):
            if session.done[b]:
                finished.append(session.texts[b] == expected[b])
    assert all(finished) and session.stats.acceptance == [1, 1, 0]


def test_adaptive_lengths(target):
    case = Case(target)
    run = case.run(Controlled(make("sedd", target), case.texts, 0.8), AdaptiveK(max_entropy=9.0))
    assert run.sequences == case.plain


def test_a_text_that_ends_early(target):
    """Nothing is drafted behind a stop token, so that acceptance is as set there, too."""
    case = Case(target)
    stop = case.plain[0][15]
    case.options["stop_tokens"] = (stop,)
    plain = Decoder(target).generate(PROMPTS, **case.options).sequences
    assert len(plain[0]) < len(case.plain[0])
    texts = {tuple(p): text for p, text in zip(PROMPTS, plain, strict=True)}
    run = case.run(Controlled(make("autoregressive", target), texts, 1))
    assert run.sequences == plain and run.stats.acceptance == [1.0] * K


def test_what_cannot_be_is_refused(target):
    case = Case(target)
    inner = make("autoregressive", target)
    for chance in (1.5, [0.5, -0.1], math.nan):
        with pytest.raises(ValueError, match=r"chance must be in \[0, 1\], got"):
            Controlled(inner, case.texts, chance)
    with pytest.raises(ValueError, match=r"chance must have a value for each of K = 4 .*2$"):
        case.run(Controlled(inner, case.texts, [0.5, 0.5]))
    with pytest.raises(ValueError, match=r"temperature 0 or rule='coupled', got another rule"):
        case.options["sampling"] = Sampling(0.8)
        case.run(Controlled(inner, case.texts, 0.5))
    case = Case(target)
    with pytest.raises(ValueError, match="texts: row 0's prompt of 3 tokens, beginning with"):
        case.run(Controlled(inner, {(9, 9): [9, 9, 1]}, 0.5))
    short = {prompt: text[:-5] for prompt, text in case.texts.items()}
    with pytest.raises(ValueError, match="a row continues after the end of its known text"):
        case.run(Controlled(inner, short, 0.5))


def test_texts_that_contradict_are_refused(target):
    drafter = Controlled(PromptLookup(), {(1, 2): [1, 2, 3, 4]}, 0.5)
    drafter.learn([1, 2], [1, 2, 3])
    assert drafter.texts[1, 2] == [1, 2, 3, 4]
    drafter.learn([1, 2], [1, 2, 3, 4, 5])
    assert drafter.texts[1, 2] == [1, 2, 3, 4, 5]
    with pytest.raises(ValueError, match="text differs from the known text"):
        drafter.learn([1, 2], [1, 2, 4])
    for text in ([1, 2], [1, 3, 4], [2]):
        with pytest.raises(
            ValueError, match="text must be its prompt of 2 tokens and a continuation"
        ):
            drafter.learn([1, 2], text)


@pytest.mark.parametrize("k", [1, 2, 5, 40, 45])
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.86, 0.92, 1.0])
def test_chance_for_share(alpha, k):
    chance = chance_for_share(alpha, k)
    assert math.fsum(chance**i for i in range(1, k + 1)) == pytest.approx(alpha * k, abs=1e-12)
    assert alpha <= chance <= 1
    assert alpha in (0, 1) or k == 1 or chance > alpha


def test_chance_for_share_out_of_range():
    for alpha in (-0.1, 1.1, math.nan):
        with pytest.raises(ValueError, match=r"alpha must be in \[0, 1\], got"):
            chance_for_share(alpha, 4)
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        chance_for_share(0.5, 0)
