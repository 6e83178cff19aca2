"""States of layers: what `Target` records, and that a drafter is told every one of them."""

from __future__ import annotations

import gc
import threading
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from specdiff import Decoder, Sampling, Target
from specdiff.drafters import News
from specdiff.loop.chooser import Wanted
from specdiff.loop.drafter import Drafter
from specdiff.loop.recorder import Recorder
from specdiff.loop.session import pad
from specdiff_kernels import Draft
from tests.tiny import ALIKE, FAMILIES, tiny_model

PROMPTS = [[*range(1, 20)], [7], [*range(30, 39)]]
LAYERS = (1, 2)


def streams(model, tokens: list[int]) -> torch.Tensor:
    """States behind layers 1 and 2 and the lm head's input, by a forward of their own. [S, 3 d]"""
    kept = {}
    hooks = [
        layer.register_forward_hook(partial(remember, kept, i))
        for i, layer in enumerate(Recorder(model).layers)
    ]
    with torch.inference_mode():
        last = model.base_model(torch.tensor([tokens]), use_cache=False).last_hidden_state
    for hook in hooks:
        hook.remove()
    return torch.cat((kept[0], kept[1], last), -1)[0]


def remember(kept, i, module, args, output):
    kept[i] = output if isinstance(output, torch.Tensor) else output[0]


@pytest.mark.parametrize("family", FAMILIES + ALIKE)
def test_states_are_the_model_s_hidden_states(family):
    model = tiny_model(family)
    target, tokens = Target(model), torch.arange(12)[None]
    with torch.inference_mode():
        logits, states = target.forward(tokens, target.new_cache(1, 16), layers=LAYERS)
        plain = target.forward(tokens, target.new_cache(1, 16))
        want = model.base_model(tokens, output_hidden_states=True).hidden_states
        one, two, final = states.split(model.config.hidden_size, -1)
        norm = model.base_model.ln_f if family.startswith("gpt") else model.base_model.norm
        normed = norm(two)
    assert torch.equal(logits, plain[0]) and torch.equal(final, plain[1])
    torch.testing.assert_close(one, want[1], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(normed, final, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(one, two, atol=0.1)


class Listener(Drafter):
    """Keeps all that it is told; drafts the target's greedy text, every third token wrong."""

    needs_hidden = True
    target_layers = LAYERS
    vocab_size = None
    block = 4

    def __init__(self, texts: dict[int, list[int]]):
        self.texts = texts  # by the first token of the prompt

    def start(self, batch, capacity, sampling):
        self.tokens = [[] for _ in range(batch)]
        self.heard = [[] for _ in range(batch)]
        self.widest = 0

    def forget(self, rows):
        for b in rows:
            self.tokens[b], self.heard[b] = [], []

    def read(self, rows, news: News):
        assert news.longest is None or news.longest >= max(map(len, self.tokens[rows]))
        self.widest = max(self.widest, news.tokens.shape[1])
        for b, n in enumerate(news.counts.tolist(), rows.start):
            self.tokens[b] += news.tokens[b - rows.start, :n].tolist()
            self.heard[b] += news.hidden[b - rows.start, :n].clone()

    def draft(self, news, k, lengths, draws):
        self.read(slice(0, len(lengths)), news)
        rows = []
        for row in self.tokens:
            text = self.texts.get(row[0], []) if row else []
            ahead = (text[len(row) :] + [0] * k)[:k]
            rows.append([(t + 1) % 50 if (len(row) + i) % 3 == 0 else t
                         for i, t in enumerate(ahead)])  # fmt: skip
        tokens = torch.tensor(rows)
        return Draft(tokens, tokens.int() * 0, tokens * 0 - 1, lengths=lengths)


class NowAndThen:
    """Calls the drafter in every eighth round."""

    most = None

    def start(self, batch):
        self.rounds, self.batch = 0, batch

    def forget(self, rows):
        pass

    def want(self, most):
        self.rounds += 1
        width = most if self.rounds % 8 == 1 else 0
        return Wanted([width] * self.batch, width)

    def update(self, wanted, drafted, accepted):
        pass

    def withhold(self, draft):
        return draft


WAYS = {  # K, options; a chooser of K looks at every round
    "dense": (lambda: 4, {}),
    "paged": (lambda: 4, {"block_size": 4}),
    "looking seldom": (lambda: 4, {"look_every": 3}),
    "looking seldom, paged": (lambda: 4, {"look_every": 3, "block_size": 4}),
    "now and then": (NowAndThen, {}),
    "now and then, paged": (NowAndThen, {"block_size": 4}),
}


def by_chunks(model, size: int) -> Target:
    """A target that reads prompts by so many tokens."""
    target = Target(model)
    target.prefill_chunk = size
    return target


@pytest.mark.parametrize(("k", "options"), WAYS.values(), ids=WAYS)
@pytest.mark.parametrize("family", FAMILIES + ALIKE)
def test_a_drafter_is_told_every_token_and_the_states_before_it(family, k, options):
    """In chunks: of prompts, and of rounds without a draft."""
    model = tiny_model(family)
    plain = Decoder(Target(model)).generate(PROMPTS, max_new_tokens=24, stop_tokens=[])
    drafter = Listener({row[0]: row for row in plain.sequences})
    decoder = Decoder(by_chunks(model, 5), drafter, k())
    got = decoder.generate(PROMPTS, max_new_tokens=24, stop_tokens=[], **options)
    assert got.sequences == plain.sequences
    assert drafter.widest <= 9  # less than a chunk that was missed, and a round
    for row, tokens, heard in zip(got.sequences, drafter.tokens, drafter.heard, strict=True):
        assert row[: len(tokens)] == tokens and len(tokens) > len(row) - 9
        assert not heard[0].any()
        want = streams(model, tokens)
        torch.testing.assert_close(torch.stack(heard)[1:], want[:-1], atol=1e-4, rtol=1e-4)


def test_a_place_is_told_its_new_prompt_alone():
    model = tiny_model("llama")
    drafter = Listener({})
    session = Decoder(by_chunks(model, 5), drafter, 2).open(2, 60, stop_tokens=[])
    session.admit([PROMPTS[0]], max_new_tokens=40)
    session.step()
    session.admit([PROMPTS[1]], first=1, max_new_tokens=2)
    while not session.done[1]:
        session.step()
    session.admit([PROMPTS[2]], first=1, max_new_tokens=20)
    for _ in range(5):
        session.step()
    for b, prompt in enumerate((PROMPTS[0], PROMPTS[2])):
        tokens = drafter.tokens[b]
        assert tokens[: len(prompt)] == prompt and session.texts[b][: len(tokens)] == tokens
        want = streams(model, tokens)
        torch.testing.assert_close(
            torch.stack(drafter.heard[b])[1:], want[:-1], atol=1e-4, rtol=1e-4
        )


def test_the_memory_of_a_long_prompt_is_a_chunk_of_states():
    """News of 30 chunks never hold more than one of them."""
    model = tiny_model("llama", context=2000)
    drafter = Listener({})
    chunk = Target.prefill_chunk
    prompt = [i % 50 for i in range(3 * chunk + 7)]
    Decoder(Target(model), drafter, 2).generate(prompt, max_new_tokens=4)
    assert drafter.widest == chunk
    assert drafter.tokens[0][: len(prompt)] == prompt


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_compiled_target_records_the_same(family, monkeypatch):
    """Whichever layers are asked for, and after forwards that asked for others."""
    counter = CompileCounter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    model = tiny_model(family)
    compiled, tokens = Target(model, compile=True), torch.arange(12)
    want = streams(model, tokens.tolist()).split(32, -1)
    for layers in ((), (2,), (1, 2), (1,), (2,)):
        with torch.inference_mode():
            _, states = compiled.forward(tokens[None], compiled.new_cache(1, 16), layers=layers)
        expected = torch.cat([want[i - 1] for i in (*layers, 3)], -1)
        torch.testing.assert_close(states[0], expected, atol=1e-4, rtol=1e-4)
    assert 1 <= counter.frame_count <= 5


def test_hooks_go_with_the_target_and_slow_nobody_else_down():
    model = tiny_model("llama")
    target = Target(model)
    layers = Recorder(model).layers
    assert not any(layer._forward_hooks for layer in layers)  # nothing was asked for
    with torch.inference_mode():
        target.forward(torch.arange(3)[None], target.new_cache(1, 8), layers=[2])
    assert [len(layer._forward_hooks) for layer in layers] == [0, 1]
    del target
    gc.collect()
    assert not any(layer._forward_hooks for layer in layers)


def test_layers_that_do_not_exist_are_named():
    target = Target(tiny_model("llama"))
    with pytest.raises(ValueError, match=r"from 1 to 2, which the target has, got 3"):
        target.forward(torch.arange(3)[None], target.new_cache(1, 8), layers=[3])


def test_prefill_tells_chunks_of_ragged_prompts():
    model = tiny_model("gpt2")
    target, told = by_chunks(model, 7), {}
    tokens, counts = pad([[*range(20)], [*range(20, 31)]], target.device)

    def heard(start, before):
        told.update({start + i: before[:, i] for i in range(before.shape[1])})

    with torch.inference_mode():
        target.prefill(tokens, counts, target.new_cache(2, 30), layers=LAYERS, heard=heard)
    assert sorted(told) == list(range(21)) and not told[0].any()
    for b, count in enumerate(counts.tolist()):
        want = streams(model, tokens[b, :count].tolist())
        have = torch.stack([told[i + 1][b] for i in range(count)])
        torch.testing.assert_close(have, want, atol=1e-4, rtol=1e-4)


def test_sampled_text_with_states_is_that_without():
    """Recording changes nothing of what is decoded."""
    model = tiny_model("qwen2")
    texts = []
    for layers in ((), LAYERS):
        drafter = Listener({})
        drafter.target_layers = layers
        decoder = Decoder(Target(model), drafter, 3)
        texts.append(decoder.generate(PROMPTS, max_new_tokens=20, sampling=Sampling(0.8)).sequences)
    assert texts[0] == texts[1]


def test_forwards_of_other_threads_are_left_alone() -> None:
    model = tiny_model("llama")
    recorder, other = Recorder(model), torch.tensor([[7, 8]])
    recorder.want([1])
    mine = torch.tensor([[1, 2, 3]])
    model(mine)
    thread = threading.Thread(target=model, args=(other,))
    thread.start()
    thread.join()
    (stream,) = recorder.take()
    assert stream.shape[1] == mine.shape[1]
