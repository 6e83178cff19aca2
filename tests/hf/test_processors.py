"""Logits processors: those with a state, and the tokens that top-p keeps."""

from __future__ import annotations

import json
import threading

import pytest
import torch
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
    TopPLogitsWarper,
)

import specdiff.hf
from specdiff.drafters import Autoregressive, PromptLookup
from specdiff.hf import processors
from specdiff.hf.processors import History, TopP
from tests.tiny import tiny_model

PROMPT = torch.tensor([[4, 5, 6, 7, 8, 9, 1, 2, 4, 5]])
PADDED = torch.tensor([[0, 0, 0, 1, 2, 3, 1, 2], [4, 5, 6, 4, 5, 9, 4, 5]])
MASK = torch.tensor([[0] * 3 + [1] * 5, [1] * 8])


def decode(processor, ids=PROMPT, **options):
    """Texts by transformers, and by us with a drafter that is right now and then."""
    options = {"max_new_tokens": 20, "do_sample": False, "pad_token_id": 0, **options}
    model = tiny_model("llama")
    want = model.generate(ids, logits_processor=LogitsProcessorList([processor()]), **options)
    got = model.generate(
        ids, logits_processor=LogitsProcessorList([processor()]),
        custom_generate=specdiff.hf.generate, drafter=Autoregressive(tiny_model("llama")), k=4,
        **options,
    )  # fmt: skip
    return got, want


# --- processors with a state ---


class Counting(LogitsProcessor):
    """Bans another token in each call."""

    def __init__(self):
        self.calls, self.seen = 0, []

    def __call__(self, input_ids, scores):
        self.calls += 1
        self.seen.append(input_ids.shape[1])
        scores = scores.clone()
        scores[:, self.calls % 50] = -torch.inf
        scores[:, [7 * self.calls % 50, 3 * self.calls % 50]] += 9
        return scores


def closure():
    calls = []

    def process(input_ids, scores):
        calls.append(1)
        scores = scores.clone()
        scores[:, [7 * len(calls) % 50, 3 * len(calls) % 50]] += 9
        return scores

    return process


class Random(LogitsProcessor):
    """Its noise comes from a generator of its own."""

    def __init__(self):
        self.generator = torch.Generator().manual_seed(5)

    def __call__(self, input_ids, scores):
        return scores + 3 * torch.randn(scores.shape[1], generator=self.generator)


class Nested(LogitsProcessor):
    """Keeps its state in another object, and the processors of a list."""

    def __init__(self):
        self.inner = [Counting(), closure()]

    def __call__(self, input_ids, scores):
        for one in self.inner:
            scores = one(input_ids, scores)
        return scores


class Locked(Counting):
    """Cannot be copied."""

    def __init__(self):
        super().__init__()
        self.lock = threading.Lock()


STATEFUL = {"class": Counting, "closure": closure, "generator": Random, "nested": Nested}


@pytest.mark.parametrize("name", STATEFUL)
def test_a_state_is_that_of_one_call_for_each_emitted_token(name):
    got, want = decode(STATEFUL[name])
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["class", "closure", "nested"])
def test_each_row_of_a_batch_has_a_state_of_its_own(name):
    got, want = decode(STATEFUL[name], PADDED, attention_mask=MASK)
    assert torch.equal(got, want)


def test_rows_end_one_by_one():
    first = decode(Counting, PADDED, attention_mask=MASK)[1][0, PADDED.shape[1] + 3]
    got, want = decode(Counting, PADDED, attention_mask=MASK, eos_token_id=int(first))
    assert torch.equal(got, want)


def test_a_single_text_leaves_the_processor_as_generate_does():
    used = []

    def kept():
        used.append(Counting())
        return used[-1]

    decode(kept)
    theirs, ours = used
    assert ours.calls == theirs.calls == 20 and ours.seen == theirs.seen


def test_drafts_are_made_beside_a_state():
    model = tiny_model("llama")
    out = model.generate(
        PROMPT, logits_processor=LogitsProcessorList([Idle()]), max_new_tokens=20, do_sample=False,
        custom_generate=specdiff.hf.generate, drafter=Autoregressive(tiny_model("llama")), k=4,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert out.stats.target_forwards == 4  # of 4 + 1 tokens


class Idle(LogitsProcessor):
    def __init__(self):
        self.calls = 0

    def __call__(self, input_ids, scores):
        self.calls += 1
        return scores


def test_what_cannot_be_copied_decodes_without_drafts():
    with pytest.warns(UserWarning, match=r"Locked keeps what cannot be copied, .* without drafts"):
        got, want = decode(Locked)
    assert torch.equal(got, want)
    with pytest.raises(ValueError, match="Locked keeps what cannot be copied, which a batch needs"):
        decode(Locked, PADDED, attention_mask=MASK)


def test_a_state_of_rejected_tokens_is_caught(monkeypatch):
    """The mutant keeps the state of all calls, also those of tokens that were rejected."""

    def all_calls(self, length):
        grown, self.length = length > self.length, length
        self.states = self.states[-1:]
        return grown

    monkeypatch.setattr(History, "follow", all_calls)
    got, want = decode(Counting)
    assert not torch.equal(got, want)


# --- a grammar ---


@pytest.fixture(scope="module")
def spelling():
    """A tokenizer of single characters and a few words."""
    from tokenizers import Tokenizer, decoders, models

    words = [*map(chr, range(32, 127)), "<eos>", "true", '{"', '":', "}}"]
    tokenizer = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, []))
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>"), words


@pytest.mark.parametrize("drafter", ["model", "prompt-lookup"])
@pytest.mark.parametrize("sample", [False, True])
def test_json_under_a_grammar(spelling, drafter, sample):
    xgrammar = pytest.importorskip("xgrammar", reason="needs xgrammar")
    from xgrammar.contrib.hf import LogitsProcessor as Grammar

    tokenizer, words = spelling
    model = tiny_model("llama", vocab=len(words), context=256)
    eos = tokenizer.eos_token_id
    info = xgrammar.TokenizerInfo(words, vocab_size=len(words), stop_token_ids=[eos])
    schema = json.dumps({
        "type": "object",
        "properties": {"a": {"type": "boolean"}, "b": {"type": "integer"}},
        "required": ["a", "b"],
    })  # fmt: skip
    compiled = xgrammar.GrammarCompiler(info).compile_json_schema(schema)
    drafters = {
        "model": Autoregressive(tiny_model("llama", vocab=len(words), context=256)),
        "prompt-lookup": PromptLookup(),
    }
    ids = torch.tensor([[words.index(c) for c in '{"a": true} {"']])
    options = {"max_new_tokens": 60, "eos_token_id": eos, "pad_token_id": eos, "do_sample": False}
    if sample:
        options |= {"do_sample": True, "temperature": 1.5, "top_k": 0}
    ours = {"custom_generate": specdiff.hf.generate, "drafter": drafters[drafter], "k": 3}
    texts = []
    for more in ({}, ours):
        grammar = LogitsProcessorList([Grammar(compiled)])
        out = model.generate(ids, logits_processor=grammar, **options, **more)
        texts.append(out[0, ids.shape[1] :].tolist())
    assert sample or texts[0] == texts[1]
    text = "".join(words[token] for token in texts[-1] if token != eos)
    assert texts[-1][-1] != eos or {"a", "b"} <= json.loads(text).keys()
    assert text.lstrip().startswith("{")


# --- top-p ---


def rows(dtype, V=50257, N=64, scale=3.0, seed=0):
    torch.manual_seed(seed)
    return (scale * torch.randn(N, V)).to(dtype).float()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("top_p", [0.0, 0.1, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("V", [7, 1000, 50257])
def test_top_p_keeps_the_tokens_that_transformers_keeps(dtype, top_p, V):
    """Also of tokens that are equally likely at the border, of which bf16 has many."""
    warper = TopPLogitsWarper(top_p)
    scores = torch.cat([rows(dtype, V, 16, scale) for scale in (0.3, 1.0, 3.0)])
    assert torch.equal(TopP(warper)(None, scores), warper(None, scores))


def test_some_rows_have_ties_at_the_border_and_most_need_no_sort():
    """Keeping all ties, as `specdiff.Sampling` does, is another set in the first kind of rows."""
    warper = TopPLogitsWarper(0.5)
    scores, sorted_rows = rows(torch.bfloat16, 5000), []
    want = warper(None, scores)
    lowest = want.masked_fill(want.isneginf(), torch.inf).amin(-1, keepdim=True)
    tied = ((scores == lowest) & want.isneginf()).any(-1)
    assert 8 < tied.sum() < 32

    class Watched(TopPLogitsWarper):
        def __call__(self, input_ids, scores):
            sorted_rows.append(len(scores))
            return super().__call__(input_ids, scores)

    TopP(Watched(0.5))(None, scores)
    assert tied.sum() <= sum(sorted_rows) < tied.sum() + 8


def test_top_p_is_not_left_to_verify_and_min_p_is():
    listed = [
        processors.processors.TemperatureLogitsWarper(0.7),
        TopPLogitsWarper(0.9),
        processors.processors.MinPLogitsWarper(0.1),
    ]
    sampling, first = processors.split(listed, True)
    assert [type(one).__name__ for one in first] == ["TemperatureLogitsWarper", "TopP"]
    assert (sampling.temperature, sampling.top_p, sampling.min_p) == (1.0, None, 0.1)


def test_top_p_of_zero_is_greedy():
    model = tiny_model("llama")
    options = {"max_new_tokens": 12, "pad_token_id": 0, "top_k": 0}
    greedy = model.generate(PROMPT, do_sample=False, **options)
    got = model.generate(
        PROMPT, do_sample=True, top_p=0.0, custom_generate=specdiff.hf.generate,
        drafter=PromptLookup(), **options,
    )  # fmt: skip
    assert torch.equal(got, greedy)
