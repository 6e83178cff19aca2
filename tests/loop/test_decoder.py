"""The loop: greedy text is plain decoding's, sampled text follows the target's exact distribution.

Rows of a batch are checked against each row alone, and the distribution by chi-squared with
mutants.
"""

from __future__ import annotations

import itertools
import random
from collections import Counter
from functools import cache, partial

import pytest
import torch
from scipy.stats import chisquare
from torch._dynamo.testing import CompileCounter

from specdiff import Decoder, Sampling, Target, generate
from specdiff.drafters import Autoregressive, PromptLookup
from specdiff.loop import session as session_module
from specdiff.loop.drafter import Drafter
from specdiff.planning.adaptive import AdaptiveK
from specdiff_kernels import (
    DistributionError,
    Draft,
    RowDistribution,
    row_distribution,
    row_seeds,
    sample,
    verify,
)
from tests.tiny import ALIKE, tiny_model

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 1, 2, 4, 5], [3]]
DRAFTERS = ("prompt-lookup", "autoregressive", "scripted", "scripted-ragged")


def one_hot(proposals: list[list[int]], k: int) -> Draft:
    """A ragged draft without recorded distributions; padding is an id that no model has."""
    return Draft.guesses(
        torch.tensor([row + [10**6] * (k - len(row)) for row in proposals]),
        torch.tensor([len(row) for row in proposals]),
    )


class Scripted(Drafter):
    """Knows each row's text and proposes it, every token right with probability `right`.

    Rows are recognised by their prompts; draft lengths are random up to the one wanted, if ragged.
    """

    needs_hidden = False
    vocab_size = None

    def __init__(self, texts: dict[tuple, list[int]], right: float, vocab: int, ragged=False):
        self.texts, self.right, self.vocab, self.ragged = texts, right, vocab, ragged

    def start(self, batch, capacity, sampling):
        self.random = random.Random(0)
        self.capacity = capacity
        self.rows = [[] for _ in range(batch)]
        self.prompts = None

    def draft(self, news, k, lengths, draws):
        new = [row[:n] for row, n in zip(news.tokens.tolist(), news.counts.tolist(), strict=True)]
        self.rows = [row + more for row, more in zip(self.rows, new, strict=True)]
        self.prompts = self.prompts or [tuple(row) for row in new]
        proposals = []
        for row, prompt, wanted in zip(self.rows, self.prompts, lengths.tolist(), strict=True):
            assert len(row) + wanted < self.capacity or wanted == 0
            assert wanted <= k
            done = len(row) - len(prompt)
            length = self.random.randint(0, wanted) if self.ragged else wanted
            text = (self.texts[prompt] + [0] * k)[done : done + length]
            proposals.append([self.maybe(token) for token in text])
        return one_hot(proposals, k)

    def maybe(self, token: int) -> int:
        return token if self.random.random() < self.right else self.random.randrange(self.vocab)


class Constant(Scripted):
    """Always proposes the same token."""

    def __init__(self, token: int):
        self.token = token

    def draft(self, news, k, lengths, draws):
        return one_hot([[self.token] * n for n in lengths.tolist()], k)


class Letters:
    """Token i is the letter with that index, lower case then upper case; 0 is a special token."""

    def decode(self, token_ids, *, skip_special_tokens):
        letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
        return "".join(letters[t] for t in token_ids if t or not skip_special_tokens)


@pytest.fixture(scope="session")
def plain(target):
    return greedy_texts(target)


def greedy_texts(target: Target) -> dict[tuple, list[int]]:
    """By transformers' own generate, without our cache or loop."""
    texts = {}
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        out = target.model.generate(ids, max_new_tokens=30, do_sample=False)
        texts[tuple(prompt)] = out[0, len(prompt) :].tolist()
    return texts


@pytest.fixture
def drafter(request, plain):
    if request.param == "prompt-lookup":
        return PromptLookup()
    if request.param == "autoregressive":
        return Autoregressive(tiny_model("gpt2", seed=5))
    return Scripted(plain, right=0.8, vocab=50, ragged=request.param == "scripted-ragged")


def test_plain_decoding_is_that_of_transformers(target, plain):
    got = Decoder(target).generate(PROMPTS, max_new_tokens=30)
    assert got.new_tokens == list(plain.values())
    assert got.sequences == [list(p) + text for p, text in plain.items()]
    assert got.stats.tokens_per_forward == 1 and got.stats.target_forwards == 30
    assert got.stats.acceptance == [] and got.texts is None


@pytest.mark.parametrize("drafter", DRAFTERS, indirect=True)
@pytest.mark.parametrize("k", [1, 6])
def test_greedy_text_is_that_of_plain_decoding(target, plain, drafter, k):
    got = Decoder(target, drafter, k).generate(PROMPTS, max_new_tokens=30)
    assert got.new_tokens == list(plain.values())
    assert got.stats.tokens == 90 and got.stats.drafted > 0


@pytest.mark.parametrize("family", ALIKE)
def test_greedy_text_of_other_families_is_that_of_transformers(family):
    """Ragged drafts, of which four fifths are right, behind windows of 5 tokens."""
    target = Target(tiny_model(family))
    plain = greedy_texts(target)
    assert all(len(set(text)) > 3 for text in plain.values())
    got = Decoder(target, Scripted(plain, right=0.8, vocab=50, ragged=True), 6).generate(
        PROMPTS, max_new_tokens=30
    )
    assert got.new_tokens == list(plain.values())
    assert got.stats.tokens_per_forward > 1.5


def test_a_perfect_drafter_gives_k_plus_one_tokens_a_forward(target, plain):
    drafter = Scripted(plain, right=1.0, vocab=50)
    got = Decoder(target, drafter, 5).generate(PROMPTS, max_new_tokens=30)
    assert got.new_tokens == list(plain.values())
    assert got.stats.target_forwards == 5 and got.stats.tokens_per_forward == 6
    assert got.stats.acceptance == [1.0] * 5 and got.stats.accepted_at == [15] * 5


@pytest.mark.parametrize("rule", ["token", "block", "greedy", "coupled"])
def test_every_rule_keeps_the_greedy_text(target, plain, rule):
    drafter = Autoregressive(tiny_model("llama", seed=2))
    got = Decoder(target, drafter, 3, rule).generate(PROMPTS, max_new_tokens=30)
    assert got.new_tokens == list(plain.values())


@pytest.mark.parametrize("drafter", DRAFTERS[:3], indirect=True)
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.9, top_k=30, top_p=0.95)], ids=repr)
def test_a_row_of_a_batch_is_the_row_alone(target, drafter, sampling):
    if isinstance(drafter, Scripted):
        drafter.right = 1.0  # its mistakes come from one stream for all rows
    options = dict(max_new_tokens=15, sampling=sampling)
    seeds = [11, 12, 13]
    decoder = Decoder(target, drafter, 4)
    batch = decoder.generate(PROMPTS, seed=seeds, **options)
    for prompt, seed, row in zip(PROMPTS, seeds, batch.new_tokens, strict=True):
        assert decoder.generate(prompt, seed=[seed], **options).new_tokens == [row]
    other = decoder.generate(PROMPTS, seed=[11, 99, 13], **options)
    assert [other.new_tokens[b] == batch.new_tokens[b] for b in (0, 2)] == [True, True]
    assert (other.new_tokens[1] == batch.new_tokens[1]) == sampling.greedy


COUPLED = [Sampling(temperature=1.0), Sampling(temperature=0.8, top_p=0.95)]


@pytest.fixture(scope="session")
def coupled(target):
    """Plain sampling under the coupled rule, once for each (sampling, seeds)."""

    @cache
    def texts(sampling: Sampling, seeds: tuple[int, ...]) -> list[list[int]]:
        decoder = Decoder(target, None, rule="coupled")
        options = dict(max_new_tokens=15, sampling=sampling, seed=seeds)
        return decoder.generate(PROMPTS, **options).new_tokens

    return texts


@pytest.mark.parametrize("drafter", DRAFTERS, indirect=True)
@pytest.mark.parametrize("sampling", COUPLED, ids=repr)
@pytest.mark.parametrize("k", [1, 4])
def test_coupled_text_is_that_of_coupled_plain_sampling(target, coupled, drafter, sampling, k):
    """Token for token, in a batch and for a row alone; another seed has another text."""
    seeds = (11, 12, 13)
    want = coupled(sampling, seeds)
    if isinstance(drafter, Scripted):
        drafter.texts = dict(zip(map(tuple, PROMPTS), want, strict=True))
    options = dict(max_new_tokens=15, sampling=sampling)
    decoder = Decoder(target, drafter, k, "coupled")
    batch = decoder.generate(PROMPTS, seed=seeds, **options)
    assert batch.new_tokens == want and batch.stats.drafted > 0
    for prompt, seed, text in zip(PROMPTS, seeds, want, strict=True):
        assert decoder.generate(prompt, seed=[seed], **options).new_tokens == [text]
    assert all(a != b for a, b in zip(coupled(sampling, (21, 22, 23)), want, strict=True))


@pytest.mark.parametrize("sampling", COUPLED, ids=repr)
def test_a_coupled_model_accepts_its_own_drafts(target, coupled, sampling):
    """It draws with the noise that judges it."""
    options = dict(max_new_tokens=15, sampling=sampling, seed=(1, 2, 3))
    got = Decoder(target, Autoregressive(target.model), 4, "coupled").generate(PROMPTS, **options)
    assert got.stats.acceptance == [1.0] * 4 and got.stats.tokens_per_forward == 5
    assert got.new_tokens == coupled(sampling, (1, 2, 3))


def test_an_int_seed_gives_each_row_its_own(target):
    decoder = Decoder(target)
    options = dict(max_new_tokens=20, sampling=Sampling(temperature=1.0))
    a, b = decoder.generate([[1, 2], [1, 2]], seed=7, **options).new_tokens
    assert a != b
    assert decoder.generate([[1, 2], [1, 2]], seed=row_seeds(7, 2), **options).new_tokens == [a, b]
    assert decoder.generate([1, 2], seed=7, **options).new_tokens == [a]


@pytest.mark.parametrize("drafter", DRAFTERS, indirect=True)
def test_stop_tokens_end_a_row_and_are_kept(target, plain, drafter):
    texts = list(plain.values())
    stop = texts[0][12]
    want = [text[: text.index(stop) + 1] if stop in text else text for text in texts]
    got = Decoder(target, drafter, 6).generate(PROMPTS, max_new_tokens=30, stop_tokens=[stop, 49])
    want = [row[: row.index(49) + 1] if 49 in row else row for row in want]
    assert got.new_tokens == want and len(want[0]) <= 13


def test_the_models_end_of_sequence_is_the_default_stop():
    model = tiny_model("llama")
    free = Decoder(Target(model)).generate([1, 2, 3], max_new_tokens=20).new_tokens[0]
    model.generation_config.eos_token_id = free[7]
    end = free.index(free[7]) + 1
    decoder = Decoder(Target(model), PromptLookup(), 4)
    assert decoder.generate([1, 2, 3], max_new_tokens=20).new_tokens == [free[:end]]
    got = decoder.generate([1, 2, 3], max_new_tokens=20, stop_tokens=()).new_tokens
    assert got == [free]


def test_one_stop_string_is_not_its_letters(target):
    decoder = Decoder(target, tokenizer=Letters())
    text = decoder.generate([1, 2, 3], max_new_tokens=20).texts[0]
    got = decoder.generate([1, 2, 3], max_new_tokens=20, stop_strings=text[9:12])
    assert got.texts == [text.split(text[9:12])[0]]
    assert decoder.generate([1, 2, 3], max_new_tokens=20, stop_strings=None).texts == [text]
    for strings in ("", [""], [5]):
        with pytest.raises(ValueError, match="stop_strings must be strings that are not empty"):
            decoder.generate([1, 2, 3], stop_strings=strings)
    with pytest.raises(ValueError, match="ends cannot be given beside stop_strings"):
        decoder.generate([1, 2, 3], stop_strings="x", ends=lambda row, tokens: False)


def test_options_of_a_session(target, plain):
    """`ends` ends a row, and log-probabilities are handed on."""
    decoder = Decoder(target, PromptLookup(), 3)
    ends = lambda row, tokens: len(tokens) == 5 + row
    got = decoder.generate([[1, 2], [3]], max_new_tokens=9, ends=ends, logprobs=True)
    assert [len(row) for row in got.new_tokens] == [5, 6] == [len(row) for row in got.logprobs]
    assert all(p <= 0 for row in got.logprobs for p in row)
    assert decoder.generate([1, 2], max_new_tokens=9).logprobs is None


@pytest.mark.parametrize("drafter", DRAFTERS, indirect=True)
def test_stop_strings_cut_the_text(target, plain, drafter):
    decoder = Decoder(target, drafter, 6, tokenizer=Letters())
    texts = [Letters().decode(row, skip_special_tokens=True) for row in plain.values()]
    stop = texts[1][9:12]
    got = decoder.generate(PROMPTS, max_new_tokens=30, stop_strings=[stop, "never"])
    assert got.texts == [text.split(stop)[0] for text in texts]
    for row, text in zip(got.new_tokens, texts, strict=True):
        spelt = Letters().decode(row, skip_special_tokens=True)
        assert text.startswith(spelt) and stop not in spelt[:-1]
        assert spelt.endswith(stop) == (stop in text)


@pytest.mark.parametrize("drafter", DRAFTERS, indirect=True)
@pytest.mark.parametrize("max_new_tokens", [1, 2, 7])
def test_max_new_tokens_is_met_exactly(target, plain, drafter, max_new_tokens):
    got = Decoder(target, drafter, 5).generate(PROMPTS, max_new_tokens=max_new_tokens)
    assert got.new_tokens == [text[:max_new_tokens] for text in plain.values()]


@pytest.mark.parametrize("name", ["prompt-lookup", "autoregressive"])
def test_the_context_is_filled_and_not_exceeded(target, name):
    limit = target.context_limit
    prompts = [[1, 2, 3] * 20, [4, 5], [6] * (limit - 1)]
    drafter = PromptLookup() if name == "prompt-lookup" else Autoregressive(tiny_model("llama"))
    want = Decoder(target).generate(prompts, max_new_tokens=limit * 2)
    got = Decoder(target, drafter, 10).generate(prompts, max_new_tokens=limit * 2)
    assert [len(row) for row in want.sequences] == [limit] * 3
    assert got.sequences == want.sequences


def test_a_stream_adds_up_to_the_generation(target, plain):
    decoder = Decoder(target, Scripted(plain, 0.7, 50, ragged=True), 6)
    options = dict(max_new_tokens=30, stop_tokens=[next(iter(plain.values()))[9]])
    whole = decoder.generate(PROMPTS, **options)
    rows = [[] for _ in PROMPTS]
    accepted, finished = 0, [False] * 3
    for step in decoder.stream(PROMPTS, **options):
        for b, tokens in enumerate(step.tokens):
            assert step.drafted[b] >= step.accepted[b] <= len(tokens) <= step.drafted[b] + 1
            assert bool(tokens) != finished[b]
            rows[b] += tokens
        accepted, finished = accepted + sum(step.accepted), step.finished
    assert rows == whole.new_tokens and all(step.finished)
    assert step.stats.tokens == sum(map(len, rows)) == whole.stats.tokens
    assert accepted <= step.stats.accepted == sum(step.stats.accepted_at)
    assert step.stats.examined_at[0] <= step.stats.row_forwards
    assert all(ms > 0 for ms in step.stats.stage_ms.values())


def test_conditional_acceptance_counts_what_was_examined(target, plain):
    class WrongAtTwo(Scripted):
        def draft(self, news, k, lengths, draws):
            draft = super().draft(news, k, lengths, draws)
            draft.tokens[:, 2:3] = (draft.tokens[:, 2:3] + 1) % 50
            return draft

    drafter = WrongAtTwo(plain, right=1.0, vocab=50)
    stats = Decoder(target, drafter, 5).generate(PROMPTS, max_new_tokens=30).stats
    assert stats.acceptance == [1.0, 1.0, 0.0]
    assert stats.examined_at == [30, 30, 27]  # the last of 10 rounds has room for 2 drafts
    assert stats.tokens_per_forward == 3


def test_generate_takes_a_model_and_tensors(target, plain):
    text = next(iter(plain.values()))
    one, batch = torch.tensor(PROMPTS[0]), torch.tensor([PROMPTS[0]])
    got = generate(target.model, PromptLookup(), batch, k=3, max_new_tokens=9)
    assert got.new_tokens == [text[:9]]
    assert generate(target, None, one, max_new_tokens=9).new_tokens == [text[:9]]


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_compiled_target_gives_the_same_text(family, monkeypatch):
    """And is compiled a few times, whatever the lengths and widths."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    target, compiled = Target(tiny_model(family)), Target(tiny_model(family), compile=True)
    drafter = Autoregressive(tiny_model("llama", seed=5))
    options = dict(max_new_tokens=25, sampling=Sampling(0.9), look_every=2)
    want = Decoder(target, drafter, 4).generate(PROMPTS, **options)
    assert Decoder(compiled, drafter, 4).generate(PROMPTS, **options).new_tokens == want.new_tokens
    assert 1 <= counter.frame_count <= 4 < want.stats.target_forwards


# --- the exact distribution ---

SAMPLES, LENGTH = 3000, 3


def exact_distribution(target: Target, prompt: list[int], sampling: Sampling) -> dict[tuple, float]:
    """Probability of every continuation of LENGTH tokens, in fp64, from the model's own logits."""
    V = target.vocab_size
    distribution = {(): 1.0}
    for _ in range(LENGTH):
        prefixes = list(distribution)
        with torch.inference_mode():
            logits = target.model(torch.tensor([prompt + list(p) for p in prefixes])).logits[:, -1]
        logits = logits.double() / sampling.temperature
        if sampling.top_k:
            logits[logits < logits.topk(sampling.top_k).values[:, -1:]] = -torch.inf
        rows = logits.softmax(-1).tolist()
        distribution = {
            (*p, v): distribution[p] * row[v]
            for p, row in zip(prefixes, rows, strict=True)
            for v in range(V)
        }
    return distribution


def p_value(target, drafter, sampling, rule="token", k=3, seed=0) -> float:
    """Of chi-squared between sampled continuations and the exact distribution."""
    prompt = [1, 2]
    distribution = exact_distribution(target, prompt, sampling)
    decoder = Decoder(target, drafter, k, rule)
    prompts = [prompt] * SAMPLES
    rows = decoder.generate(prompts, max_new_tokens=LENGTH, sampling=sampling, seed=seed).new_tokens
    counts = Counter(map(tuple, rows))
    if any(distribution[row] == 0 for row in counts):
        return 0.0
    cells = sorted((p, counts[row]) for row, p in distribution.items() if p > 0)
    rare = list(itertools.takewhile(lambda c: c[0] * SAMPLES < 5, cells))
    cells = cells[len(rare) :]
    rest = sum(p for p, _ in rare)
    if rest * SAMPLES >= 5:
        cells.append((rest, sum(n for _, n in rare)))
    else:
        p, n = cells[0]
        cells[0] = (p + rest, n + sum(n for _, n in rare))
    return chisquare([n for _, n in cells], [p * SAMPLES for p, _ in cells]).pvalue


def random_words(B: int, positions: int) -> torch.Tensor:
    low, high = torch.iinfo(torch.int64).min, torch.iinfo(torch.int64).max
    return torch.randint(low, high, (B, positions))


def with_words(change):
    """`verify` drawing from words of our own, which `change(words)` may tamper with."""

    def tampered(logits, draft, *parameters, seed, round, **options):
        words = random_words(*logits.shape[:2])
        words[:, :-1] = change(words[:, :-1])
        return verify(logits, draft, *parameters, words=words, **options)

    return tampered


def without_residual(logits, draft, *parameters, **options):
    """Emits a rejected position's token from p instead of (p - q)+."""
    verified = verify(logits, draft, *parameters, **options)
    at = verified.accepted[:, None]
    rejected = logits.gather(1, at[:, :, None].expand(-1, 1, logits.shape[-1]))[:, 0]
    token = sample(
        rejected, row_distribution(rejected, *parameters), words=random_words(len(at), 1)[:, 0]
    )
    return verified._replace(emitted=verified.emitted.scatter(1, at, token[:, None]))


@pytest.fixture(scope="module")
def five():
    """A target of 5 tokens and a drafter that often disagrees with it."""
    torch.manual_seed(0)
    target = Target(tiny_model("llama", vocab=5))
    return target, Autoregressive(tiny_model("gpt2", vocab=5, seed=9))


SAMPLINGS = [Sampling(temperature=1.0), Sampling(temperature=1.5, top_k=3)]


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=repr)
@pytest.mark.parametrize(
    ("rule", "name"),
    [
        ("token", "none"),
        ("token", "autoregressive"),
        ("token", "prompt-lookup"),
        ("token", "constant"),
        ("block", "autoregressive"),
        ("block", "constant"),
        ("coupled", "autoregressive"),  # the text of any other drafter is the same
    ],
)
def test_sampled_text_follows_the_exact_distribution(five, sampling, rule, name):
    target, autoregressive = five
    drafters = {"none": None, "autoregressive": autoregressive, "constant": Constant(2)}
    assert p_value(target, drafters.get(name, PromptLookup()), sampling, rule) > 1e-3


@pytest.mark.parametrize("rule", ["token", "block"])
def test_lengths_that_adapt_keep_the_exact_distribution(five, rule):
    target, drafter = five
    assert p_value(target, drafter, Sampling(temperature=1.0), rule, k=AdaptiveK(2, 0.3)) > 1e-3


@pytest.mark.parametrize("sampling", SAMPLINGS, ids=repr)
@pytest.mark.parametrize("rule", ["token", "block"])
def test_mutants_are_caught(five, sampling, rule, monkeypatch):
    target, drafter = five
    for mutant, lives in (
        (with_words(lambda words: words), True),  # the control: honest words
        (with_words(torch.zeros_like), False),  # u = 0: accepts whatever has a probability
        (without_residual, False),
    ):
        torch.manual_seed(1)
        monkeypatch.setattr(session_module, "verify", mutant)
        p = p_value(target, drafter, sampling, rule)
        assert p > 1e-3 if lives else p < 1e-9


def test_coupled_noise_that_ignores_the_position_is_caught(five, monkeypatch):
    """Each round would meet the noise of the round before."""

    def without_position(*arguments, position, **options):
        return verify(*arguments, position=torch.zeros_like(position), **options)

    target, drafter = five
    monkeypatch.setattr(session_module, "verify", without_position)
    assert p_value(target, drafter, Sampling(temperature=1.0), "coupled") < 1e-9


def test_accepting_on_equality_is_caught(monkeypatch):
    """u on a grid of quarters and p = 1/4 exactly: u <= p accepts twice as often as u < p."""
    model = tiny_model("llama", vocab=4)
    model.lm_head.weight.data.zero_()
    target, sampling = Target(model), Sampling(temperature=1.0)

    def grid(words):
        return torch.randint(-2, 2, words.shape) << 62

    def grid_less_one_bit(words):  # u - 2^-53 < p is u <= p, for u > 0
        words = grid(words)
        return torch.where(words == 0, words, words - (1 << 11))

    for change, lives in ((grid, True), (grid_less_one_bit, False)):
        torch.manual_seed(2)
        monkeypatch.setattr(session_module, "verify", with_words(change))
        p = p_value(target, Constant(2), sampling)
        assert p > 1e-3 if lives else p < 1e-9


def test_u_of_zero_never_accepts_the_impossible(five, monkeypatch):
    """With u = 0 everything possible is accepted, and a token outside the top 1 still is not."""
    target, _ = five
    monkeypatch.setattr(session_module, "verify", with_words(torch.zeros_like))
    top = Decoder(target).generate([1, 2], max_new_tokens=1).new_tokens[0][0]
    for token in range(5):
        got = Decoder(target, Constant(token), 1).generate(
            [1, 2], max_new_tokens=2, sampling=Sampling(temperature=1.0, top_k=1)
        )
        assert got.new_tokens[0][0] == top


# --- bad input ---


@pytest.mark.parametrize("value, reason", [(float("nan"), "NaN"), (float("inf"), r"\+inf|NaN")])
def test_a_sick_model_is_named_by_row_and_reason(value, reason):
    model = tiny_model("llama")
    model.model.embed_tokens.weight.data[7] = value
    with pytest.raises(DistributionError, match=f"sequence 1 .*({reason})"):
        Decoder(Target(model), PromptLookup()).generate([[1, 2], [3, 7], [4]])
    with pytest.raises(DistributionError, match=f"drafter's logits: sequence 1 .*({reason})"):
        Decoder(Target(tiny_model("gpt2")), Autoregressive(model)).generate([[1, 2], [3, 7]])


def test_a_drafter_out_of_bounds_is_named(target):
    with pytest.raises(DistributionError, match=r"sequence 0 .*out of range"):
        Decoder(target, Constant(50), 3).generate([1, 2])

    class TooLong(Constant):
        def draft(self, news, k, lengths, draws):
            return super().draft(news, k + 1, lengths + 1, draws)

    with pytest.raises(ValueError, match=r"proposed \[4\] tokens where \[3\]"):
        Decoder(target, TooLong(1), 3).generate([1, 2])


def test_a_distribution_that_contradicts_the_draft_is_an_error(target):
    class Liar(Constant):
        """Records a distribution that gives its own token no weight."""

        def draft(self, news, k, lengths, draws):
            draft = super().draft(news, k, lengths, draws)
            logits = torch.zeros(1, 50)
            logits[0, self.token] = -torch.inf
            distribution = RowDistribution(*row_distribution(logits))
            return draft._replace(
                rows=torch.zeros_like(draft.rows), logits=logits, distribution=distribution
            )

    with pytest.raises(DistributionError, match="no weight in the draft distribution"):
        Decoder(target, Liar(3), 2).generate([1, 2])


def test_one_call_takes_names_and_folders(tmp_path, tiny_tokenizer):
    model = tiny_model("llama", vocab=len(tiny_tokenizer))
    model.save_pretrained(tmp_path)
    tiny_tokenizer.save_pretrained(tmp_path)
    want = generate(Target(model), None, PROMPTS, max_new_tokens=9)
    got = generate(tmp_path, "prompt-lookup", PROMPTS, max_new_tokens=9)
    assert got.new_tokens == want.new_tokens and want.texts is None
    assert got.texts == [tiny_tokenizer.decode(row) for row in got.new_tokens]


def test_rows_may_have_limits_and_sampling_of_their_own(target):
    """Beside each other, each row's text is that of the row decoded alone."""
    ways = [Sampling(0.0), Sampling(1.0), Sampling(0.7, top_k=5), Sampling(1.0, top_p=0.8)]
    limits, prompts = [5, 12, 7, 9], [PROMPTS[i % len(PROMPTS)] for i in range(4)]
    decoder = Decoder(target, PromptLookup(), 3)
    session = decoder.open(4, 60, sampling=Sampling(1.0), stop_tokens=[])
    session.admit(prompts, max_new_tokens=limits, seed=[3, 4, 5, 6], sampling=ways)
    while not all(session.done):
        session.step()
    for b, (prompt, way, limit) in enumerate(zip(prompts, ways, limits, strict=True)):
        alone = decoder.generate(
            prompt, max_new_tokens=limit, sampling=way, seed=[3 + b], stop_tokens=[]
        )
        assert session.texts[b] == alone.sequences[0]


def test_a_drafter_with_a_model_reads_a_prompt_in_its_own_row(target):
    """And not over all rows of the batch."""
    drafter = Autoregressive(target.model)
    session = Decoder(target, drafter, 2).open(6, 60, stop_tokens=[])
    seen = []
    hidden = drafter.model.hidden

    def counted(tokens, *arguments, **options):
        seen.append(tuple(tokens.shape))
        return hidden(tokens, *arguments, **options)

    drafter.model.hidden = counted
    prompt = [t % target.vocab_size for t in range(1, 41)]
    session.admit([prompt], first=3, max_new_tokens=8)
    while not session.done[3]:
        session.step()
    assert seen[0] == (1, 39) and max(width for _, width in seen[1:]) <= 3
    alone = Decoder(target).generate(prompt, max_new_tokens=8, stop_tokens=[])
    assert session.texts[3] == alone.sequences[0]
