"""The Hugging Face door: each option gives the text that transformers gives, or is refused."""

from __future__ import annotations

import inspect
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from scipy.stats import chisquare
from transformers import (
    DynamicCache,
    GenerationMixin,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    TextStreamer,
)

import specdiff.hf
from specdiff import Decoder, Sampling, Target
from specdiff.drafters import Autoregressive, PromptLookup
from specdiff.hf import decoding
from specdiff.hf.processors import Chain
from specdiff.loop.target import cache_argument
from tests.tiny import tiny_model

PROMPT = torch.tensor([[4, 5, 6, 7, 8, 9, 1, 2, 4, 5]])
LEFT_PADDED = torch.tensor(
    [[0, 0, 0, 1, 2, 3, 1, 2], [0, 0, 0, 0, 0, 0, 0, 5], [4, 5, 6, 4, 5, 9, 4, 5]]
)
MASK = torch.tensor([[0] * 3 + [1] * 5, [0] * 7 + [1], [1] * 8])


def drafters():
    return {"lookup": PromptLookup(), "model": Autoregressive(tiny_model("gpt2", seed=5))}


def both(model, ids=PROMPT, drafter="model", **options):
    """Our result, and that of transformers."""
    options = {"max_new_tokens": 24, "do_sample": False, "pad_token_id": 0, **options}
    # transformers' own static cache is no measure: with GPT-Neo its text is another
    want = model.generate(ids, **{**options, "cache_implementation": None})
    got = model.generate(
        ids, custom_generate=specdiff.hf.generate, drafter=drafters()[drafter], k=4, **options
    )
    return got, want


def same(model, *args, **options):
    got, want = both(model, *args, **options)
    assert torch.equal(got, want), f"{got.tolist()} != {want.tolist()}"
    return got


class NoTwice:
    """A processor of the user's own: never the token before last again."""

    def __call__(self, input_ids, scores):
        assert len(input_ids) == len(scores)
        scores = scores.clone()
        for b, row in enumerate(input_ids):
            scores[b, row[-2:]] = -torch.inf
        return scores


class EndsAfter:
    """A criterion of the user's own."""

    def __init__(self, token):
        self.token = token

    def __call__(self, input_ids, scores, **kwargs):
        return input_ids[:, -1] == self.token


def text_of(model, n=24):
    return model.generate(PROMPT, max_new_tokens=n, do_sample=False)[0, PROMPT.shape[1] :].tolist()


OPTIONS = {
    "plain": {},
    "max length": {"max_new_tokens": None, "max_length": 19},
    "repetition penalty": {"repetition_penalty": 1.3},
    "no repeated bigrams": {"no_repeat_ngram_size": 2},
    "no repeated trigrams": {"no_repeat_ngram_size": 3, "repetition_penalty": 1.1},
    "bad words": {"bad_words_ids": [[3], [7, 8], [11, 12, 13]]},
    "sequence bias": {"sequence_bias": [[[5], 2.0], [[1, 2], -5.0]]},
    "suppress": {"suppress_tokens": [1, 2, 3, 4, 5]},
    "begin suppress": {"begin_suppress_tokens": [*range(25)]},
    "own processor": {"logits_processor": LogitsProcessorList([NoTwice()])},
    "allowed tokens": {
        "prefix_allowed_tokens_fn": lambda b, ids: [(int(ids[-1]) + 1) % 50, 3 + b, 40]
    },
    "renormalised": {"renormalize_logits": True},
    "static cache": {"cache_implementation": "static"},
    "no cache": {"use_cache": False},
    "forced end": {"forced_eos_token_id": 17},
}


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("drafter", ["lookup", "model"])
def test_greedy_text_is_that_of_transformers(model, name, drafter):
    same(model, drafter=drafter, **OPTIONS[name])


@pytest.mark.parametrize("name", [n for n in OPTIONS if n not in ("static cache", "max length")])
def test_left_padded_batches(model, name):
    same(model, LEFT_PADDED, attention_mask=MASK, **OPTIONS[name])


def test_ends_of_sequence(model):
    text = text_of(model)
    for eos in (text[4], [49, text[9], text[6]]):
        got = same(model, eos_token_id=eos)
        assert got.shape[1] < PROMPT.shape[1] + 24
        same(model, LEFT_PADDED, attention_mask=MASK, eos_token_id=eos)
    same(model, eos_token_id=text[4], min_new_tokens=9)
    same(model, eos_token_id=text[4], min_length=PROMPT.shape[1] + 7)
    same(model, eos_token_id=text[4], exponential_decay_length_penalty=(5, 1.5))


def test_criteria(model):
    text = text_of(model)
    short = StoppingCriteriaList([MaxLengthCriteria(PROMPT.shape[1] + 5)])
    assert same(model, stopping_criteria=short).shape[1] == PROMPT.shape[1] + 5
    own = StoppingCriteriaList([EndsAfter(text[7])])
    assert same(model, stopping_criteria=own)[0, -1] == text[7]
    got = both(model, stopping_criteria=StoppingCriteriaList([MaxTimeCriteria(0.0)]))[0]
    assert got.shape[1] == PROMPT.shape[1] + 1


def test_stop_strings_and_streams(tiny_tokenizer, capsys):
    model = tiny_model("llama", vocab=len(tiny_tokenizer))
    ids = tiny_tokenizer("the quick brown", return_tensors="pt").input_ids
    plain = model.generate(ids, max_new_tokens=24, do_sample=False)
    tail = tiny_tokenizer.decode(plain[0, ids.shape[1] + 5 : ids.shape[1] + 7])
    got = same(model, ids, "lookup", stop_strings=[tail], tokenizer=tiny_tokenizer)
    assert ids.shape[1] < got.shape[1] < plain.shape[1]
    same(model, ids, "lookup", stop_strings=tail, tokenizer=tiny_tokenizer)
    capsys.readouterr()
    streams = []
    for options in ({}, {"custom_generate": specdiff.hf.generate, "drafter": "prompt-lookup"}):
        model.generate(ids, max_new_tokens=24, do_sample=False, **options,
                       streamer=TextStreamer(tiny_tokenizer))  # fmt: skip
        streams.append(capsys.readouterr().out)
    assert streams[0] == streams[1] and len(streams[0]) > 20
    with pytest.raises(ValueError, match="pass tokenizer"):
        model.generate(ids, custom_generate=specdiff.hf.generate, stop_strings=["x"])


def test_a_drafter_by_name_is_read_once(model):
    assert torch.equal(same_named(model), same_named(model))
    known = decoding._loaded[model]
    assert list(known) == ["prompt-lookup"]
    with pytest.raises(ValueError, match="unknown drafter 'nothing'"):
        model.generate(PROMPT, custom_generate=specdiff.hf.generate, drafter="nothing")


def same_named(model):
    return model.generate(
        PROMPT, max_new_tokens=9, do_sample=False, custom_generate=specdiff.hf.generate,
        drafter="prompt-lookup", rule="block",
    )  # fmt: skip


# --- sampling ---


def test_fused_parameters_are_the_loops_own(model):
    options = {"temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.01}
    got = model.generate(
        PROMPT, custom_generate=specdiff.hf.generate, drafter=PromptLookup(), do_sample=True,
        max_new_tokens=20, num_return_sequences=3, seed=5, **options,
    )  # fmt: skip
    decoder = Decoder(Target(model), PromptLookup())
    want = decoder.generate(PROMPT.tolist() * 3, max_new_tokens=20, seed=5,
                            sampling=Sampling(**options))  # fmt: skip
    assert got.tolist() == want.sequences
    assert len({tuple(row) for row in got.tolist()}) == 3


def test_the_seed_comes_from_torch(model):
    sample = lambda: model.generate(
        PROMPT, custom_generate=specdiff.hf.generate, do_sample=True, max_new_tokens=12
    )
    torch.manual_seed(3)
    one, two = sample(), sample()
    torch.manual_seed(3)
    assert torch.equal(sample(), one) and not torch.equal(one, two)


SAMPLED = {
    "fused": {"top_p": 0.8},
    "penalty": {"repetition_penalty": 1.8, "temperature": 0.7},
    "bigrams": {"no_repeat_ngram_size": 2, "top_k": 3},
    "typical": {"typical_p": 0.7, "temperature": 1.5},
    "unusual order": {"epsilon_cutoff": 0.12, "top_p": 0.95},
    "own": {"logits_processor": LogitsProcessorList([NoTwice()])},
}
N, LENGTH = 3000, 3


def exact_distribution(model, prompt, options) -> dict[tuple, float]:
    """Of the next LENGTH tokens, by transformers' own processors over the tree of all texts."""
    distribution = {(): 1.0}
    for _ in range(LENGTH):
        texts = torch.tensor([[*prompt, *text] for text in distribution])
        scores = []
        config = {"do_sample": True, "max_new_tokens": 1, "pad_token_id": 0, "top_k": 0, **options}
        for text in texts[:, None]:
            out = model.generate(
                text, attention_mask=torch.ones_like(text), return_dict_in_generate=True,
                output_scores=True, **config,
            )  # fmt: skip
            scores.append(out.scores[0][0].double().softmax(-1))
        distribution = {
            (*text, v): chance * p
            for (text, chance), row in zip(distribution.items(), scores, strict=True)
            for v, p in enumerate(row.tolist())
            if chance * p > 0
        }
    return distribution


@pytest.fixture(scope="module")
def five():
    return tiny_model("llama", vocab=5), Autoregressive(tiny_model("llama", vocab=5, seed=3))


def p_value(five, options, distribution) -> float:
    model, drafter = five
    got = model.generate(
        torch.tensor([[1, 2]]), custom_generate=specdiff.hf.generate, drafter=drafter, k=3,
        do_sample=True, max_new_tokens=LENGTH, num_return_sequences=N, seed=1, pad_token_id=0,
        **{"top_k": 0, **options},
    )  # fmt: skip
    counts = dict.fromkeys(distribution, 0)
    for row in got[:, 2:].tolist():
        if tuple(row) not in counts:
            return 0.0  # impossible
        counts[tuple(row)] += 1
    likely = [t for t in distribution if N * distribution[t] >= 5]
    rest = sum(distribution.values()) - sum(distribution[t] for t in likely)
    have = [*(counts[t] for t in likely), N - sum(counts[t] for t in likely)]
    want = [*(N * distribution[t] for t in likely), N * rest]
    if want[-1] < 5:
        have, want = [*have[:-2], sum(have[-2:])], [*want[:-2], sum(want[-2:])]
    return chisquare(have, [w * sum(have) / sum(want) for w in want]).pvalue


@pytest.mark.parametrize("name", SAMPLED)
def test_sampled_text_follows_the_distribution_of_transformers(five, name):
    distribution = exact_distribution(five[0], [1, 2], SAMPLED[name])
    assert abs(sum(distribution.values()) - 1) < 1e-9 and len(distribution) > 4
    assert p_value(five, SAMPLED[name], distribution) > 1e-3


def test_history_of_another_row_is_caught(five, monkeypatch):
    """The mutant shows every row of a round the history of the first."""
    distribution = exact_distribution(five[0], [1, 2], SAMPLED["penalty"])
    inner = Chain.__call__

    def stale(self, text, drafted, scores):
        new = [Chain(self.listed, self.padding, self.stops) for _ in scores]
        each = zip(new, scores, strict=True)
        return torch.cat([inner(chain, text, drafted[:0], row[None]) for chain, row in each])

    monkeypatch.setattr(Chain, "__call__", stale)
    assert p_value(five, SAMPLED["penalty"], distribution) < 1e-9


@pytest.mark.parametrize("options", [{}, {"do_sample": True, "top_k": 5, "temperature": 0.7}])
def test_log_probabilities_of_emitted_tokens(model, options):
    options = {"do_sample": False, "max_new_tokens": 15, "pad_token_id": 0, **options}
    out = model.generate(
        LEFT_PADDED, attention_mask=MASK, custom_generate=specdiff.hf.generate,
        drafter=PromptLookup(), return_dict_in_generate=True, output_scores=True, seed=2,
        eos_token_id=text_of(model)[2:9], **options,
    )  # fmt: skip
    assert out.stats.tokens == (out.logprobs < 0).sum()
    new = out.sequences[:, LEFT_PADDED.shape[1] :]
    assert new.shape == out.logprobs.shape and out.logprobs.dtype == torch.float32
    for b, padding in enumerate((3, 7, 0)):
        count = int((out.logprobs[b] < 0).sum())
        row = out.sequences[b, padding : LEFT_PADDED.shape[1] + count]
        logits = model(row[None]).logits[0, -count - 1 : -1]
        if options["do_sample"]:
            logits = logits / 0.7
            kth = logits.topk(5).values[:, -1:]
            logits = logits.masked_fill(logits < kth, -torch.inf)
        want = logits.log_softmax(-1).gather(1, row[-count:, None])[:, 0]
        torch.testing.assert_close(out.logprobs[b, :count], want, atol=1e-4, rtol=1e-4)


def test_what_is_returned(model):
    options = {"custom_generate": specdiff.hf.generate, "max_new_tokens": 4, "do_sample": False}
    out = model.generate(PROMPT, return_dict_in_generate=True, **options)
    assert out.logprobs is None and out.stats.tokens == 4
    assert torch.equal(out.sequences, model.generate(PROMPT, **options))


class Heard:
    """A streamer that keeps what it is told."""

    def __init__(self):
        self.tokens, self.ended = [], False

    def put(self, value):
        self.tokens += value.flatten().tolist()

    def end(self):
        self.ended = True


REFUSED = {
    "num_beams=2": {"num_beams": 2},
    "output_attentions=True": {"output_attentions": True, "return_dict_in_generate": True},
    "position_ids: expected 0": {"position_ids": torch.arange(3, 13)[None]},
    "token_type_ids is not supported": {"token_type_ids": PROMPT},
    "streamer: expected one": {"streamer": Heard(), "inputs": PROMPT.repeat(2, 1)},
    "pass specdiff.drafters.Autoregressive": {"drafter": tiny_model("llama")},
    "UnbatchedClassifierFree": {"guidance_scale": 1.5},
    "assistant_model is not supported": {"assistant_model": tiny_model("llama")},
    "attention_mask: expected zeros on the left": {"attention_mask": torch.tensor([[1] * 9 + [0]])},
    "k must be at least 1": {"drafter": PromptLookup(), "k": 0},
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_cannot_be_honoured_is_refused(message):
    model = tiny_model("gpt2" if "token_type" in message else "llama")
    model.set_attn_implementation("eager")
    options = {"inputs": PROMPT, "max_new_tokens": 3, **REFUSED[message]}
    with pytest.raises(ValueError, match=message):
        model.generate(custom_generate=specdiff.hf.generate, **options)


def test_a_streamer_is_found_wherever_it_stands(model):
    """As a keyword, by its place, and in a call without transformers' decorator."""
    text = text_of(model, 9)
    options = {"custom_generate": specdiff.hf.generate, "max_new_tokens": 9, "do_sample": False}
    plain = inspect.unwrap(type(model).generate)
    heard = [Heard() for _ in range(3)]
    model.generate(PROMPT, streamer=heard[0], **options)
    model.generate(PROMPT, None, None, None, None, None, None, heard[1], **options)
    with torch.no_grad():
        plain(model, PROMPT, streamer=heard[2], **options)
    assert all(h.tokens == PROMPT[0].tolist() + text and h.ended for h in heard)


def test_named_drafters_serve_two_threads_at_once(model):
    options = {"custom_generate": specdiff.hf.generate, "drafter": "prompt-lookup"}
    decode = lambda ids: model.generate(ids, max_new_tokens=40, do_sample=False, **options)
    prompts = [PROMPT, PROMPT[:, 3:], PROMPT[:, 5:]] * 2
    with ThreadPoolExecutor(3) as pool:
        got = list(pool.map(decode, prompts))
    for have, ids in zip(got, prompts, strict=True):
        assert torch.equal(have, model.generate(ids, max_new_tokens=40, do_sample=False))


def test_constraints_are_not_asked_about_texts_that_cannot_be(model):
    """A trie of allowed texts knows no others; drafts that leave it are rejected."""

    def allowed(b, ids):
        new = ids[PROMPT.shape[1] :].tolist()
        assert all(token == 7 + i for i, token in enumerate(new)), "outside of the trie"
        return [7 + len(new)]

    got = same(model, drafter="lookup", prefix_allowed_tokens_fn=allowed, max_new_tokens=12)
    assert got[0, PROMPT.shape[1] :].tolist() == list(range(7, 19))


def test_constraints_are_not_asked_about_what_comes_behind_an_end(model):
    """A trie ends where a text does, and a prompt may hold ends that are drafted."""

    def allowed(b, ids):
        new = ids[6:].tolist()
        assert 2 not in new, "behind the end"
        return [[7], [9], [4], [2]][len(new)]

    ids = torch.tensor([[5, 7, 9, 4, 2, 5]])
    got = same(model, ids, drafter="lookup", prefix_allowed_tokens_fn=allowed, eos_token_id=2)
    assert got[0, 6:].tolist() == [7, 9, 4, 2]


def test_a_model_goes_on_training(model):
    model.train()
    model.get_input_embeddings().eval()
    same_named(model)
    assert model.training and not model.get_input_embeddings().training
    model.eval()


def test_a_drafter_by_name_follows_its_model():
    model = tiny_model("llama")
    target = Target(model)
    first = decoding.named_drafter("prompt-lookup", target)
    known = lambda: decoding._loaded[model]["prompt-lookup"][1]
    before = known()
    decoding.named_drafter("prompt-lookup", target)
    assert known() is before and first is not before
    decoding.named_drafter("prompt-lookup", Target(model.to(torch.bfloat16)))
    assert known() is not before


def test_arguments_that_transformers_passes_on_come_first(model, monkeypatch):
    """As a later version may; then nothing is read from its frames."""
    original = GenerationMixin._extract_generation_mode_kwargs

    def passes(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer):
        found = original(self, custom_generate, kwargs, synced_gpus, assistant_model, streamer)
        return {**found, "streamer": streamer}

    monkeypatch.setattr(GenerationMixin, "_extract_generation_mode_kwargs", passes)
    monkeypatch.setattr(decoding, "kept_by_generate", dict)
    heard = Heard()
    model.generate(
        PROMPT, custom_generate=specdiff.hf.generate, max_new_tokens=9, do_sample=False,
        streamer=heard,
    )  # fmt: skip
    assert heard.tokens == PROMPT[0].tolist() + text_of(model, 9) and heard.ended


def test_threads_share_a_model_in_train_mode():
    """One begins while another decodes, and goes on when that one has ended."""
    model = tiny_model("gpt2", resid_pdrop=0.5, embd_pdrop=0.5).train()
    want = text_of(model.eval(), 9)
    model.train()
    begun, ended = threading.Event(), threading.Event()

    class Second(Heard):
        def put(self, value):
            super().put(value)
            begun.set()
            assert ended.wait(60)

    class First(Heard):
        def put(self, value):
            super().put(value)
            assert begun.wait(60)

    options = {"custom_generate": specdiff.hf.generate, "max_new_tokens": 9, "do_sample": False}

    def decode(streamer) -> list[int]:
        return model.generate(PROMPT, streamer=streamer, **options)[0, PROMPT.shape[1] :].tolist()

    with ThreadPoolExecutor(2) as pool:
        first = pool.submit(decode, First())
        second = pool.submit(decode, Second())
        texts = [first.result(120)]
        ended.set()
        texts.append(second.result(120))
    assert texts == [want, want]
    assert all(module.training for module in model.modules())


def test_what_an_output_lacks_is_said(model):
    out = model.generate(
        PROMPT, custom_generate=specdiff.hf.generate, max_new_tokens=3,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    assert out.logprobs.shape == (1, 3) and not hasattr(out, "nonsense")
    with pytest.raises(AttributeError, match="keeps no scores: `logprobs` has"):
        _ = out.scores
    with pytest.raises(AttributeError, match="keeps no past_key_values: the cache ends"):
        _ = out.past_key_values


def test_the_context_ends_a_text_with_a_warning():
    model = tiny_model("llama", context=16)
    with pytest.warns(UserWarning, match="texts end at the model's 16 positions"):
        got = model.generate(PROMPT, custom_generate=specdiff.hf.generate, max_new_tokens=20)
    assert got.shape == (1, 16)


def test_a_filled_cache_is_refused(model):
    cache = DynamicCache()
    filled = {cache_argument(model): cache}
    model(PROMPT[:, :4], **filled, use_cache=True)
    with pytest.raises(ValueError, match=f"{cache_argument(model)} already holds tokens"):
        model.generate(PROMPT, custom_generate=specdiff.hf.generate, **filled)
