"""A model's own forward is run where it may be more than its body and its lm head."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import wraps

import pytest
import torch
from torch.nn.modules.module import register_module_forward_hook
from transformers import LlamaForCausalLM

import specdiff.hf
from specdiff import Decoder, Sampling, Target
from specdiff.drafters import Autoregressive, PromptLookup
from tests.tiny import FAMILIES, tiny_model

PROMPT = [4, 5, 6, 7, 8, 9, 1, 2, 4, 5]
BANNED = range(0, 50, 2)


class Masked(LlamaForCausalLM):
    """Never gives a token of BANNED."""

    def forward(self, *args, **options):
        out = super().forward(*args, **options)
        out.logits[..., BANNED] = -torch.inf
        return out


class Same(LlamaForCausalLM):
    """Of another name, but of the same forward."""


def of_class(kind):
    model = kind(tiny_model("llama").config).eval()
    model.load_state_dict(tiny_model("llama").state_dict())
    return model


def subclass():
    return of_class(Masked)


def hooked():
    model = tiny_model("llama")

    def ban(module, args, out):
        out.logits[..., BANNED] = -torch.inf

    model.register_forward_hook(ban)
    return model


def replaced():
    model = tiny_model("llama")
    own = model.forward

    def forward(*args, **options):
        out = own(*args, **options)
        out.logits[..., BANNED] = -torch.inf
        return out

    model.forward = forward
    return model


def prepared():
    """A hook before the forward changes what it is given: each token is read as another one."""
    model = tiny_model("llama")

    def shift(module, args, options):
        return args, {**options, "input_ids": (options["input_ids"] + 1) % 50}

    model.register_forward_pre_hook(shift, with_kwargs=True)
    return model


def no_drafter():
    return None


def small_drafter():
    return Autoregressive(tiny_model("llama"))


def text_of_generate(model, **options) -> list[int]:
    ids = torch.tensor([PROMPT])
    done = model.generate(ids, max_new_tokens=12, do_sample=False, eos_token_id=None, **options)
    return done[0, len(PROMPT) :].tolist()


class Wrapped(LlamaForCausalLM):
    """Its forward bears the name of transformers' own."""

    @wraps(LlamaForCausalLM.forward)
    def forward(self, *args, **options):
        out = LlamaForCausalLM.forward(self, *args, **options)
        out.logits[..., BANNED] = -torch.inf
        return out


class Called(LlamaForCausalLM):
    def __call__(self, *args, **options):
        out = super().__call__(*args, **options)
        out.logits[..., BANNED] = -torch.inf
        return out


class Last(LlamaForCausalLM):
    """Gives the last token's logits unless asked for more, as a tuple."""

    def forward(self, *args, logits_to_keep=1, **options):
        out = super().forward(*args, logits_to_keep=logits_to_keep, **options)
        out.logits[..., BANNED] = -torch.inf
        return out


def wrapped():
    return of_class(Wrapped)


def called():
    return of_class(Called)


def last():
    return of_class(Last)


@pytest.mark.parametrize("make", [subclass, hooked, replaced, prepared, wrapped, called, last])
@pytest.mark.parametrize("drafts", [no_drafter, PromptLookup, small_drafter])
def test_text_is_that_of_the_models_own_forward(make: Callable, drafts: Callable) -> None:
    want = text_of_generate(make())
    assert want != text_of_generate(tiny_model("llama"))
    decoder = Decoder(Target(make()), drafts(), 3 if drafts() else None)
    assert decoder.generate(PROMPT, max_new_tokens=12, stop_tokens=()).new_tokens == [want]
    got = text_of_generate(make(), custom_generate=specdiff.hf.generate, drafter=drafts())
    assert got == want


def test_a_hook_is_seen_that_comes_after_the_target() -> None:
    target = Target(tiny_model("llama"))
    decoder = Decoder(target, PromptLookup(), 3)
    before = decoder.generate(PROMPT, max_new_tokens=12, stop_tokens=()).new_tokens

    def ban(module, args, out):
        out.logits[..., BANNED] = -torch.inf

    handle = target.model.register_forward_hook(ban)
    got = decoder.generate(PROMPT, max_new_tokens=12, sampling=Sampling(1.0), stop_tokens=())
    assert not {*got.new_tokens[0]} & {*BANNED} and {*before[0]} & {*BANNED}
    handle.remove()
    assert decoder.generate(PROMPT, max_new_tokens=12, stop_tokens=()).new_tokens == before


def test_a_global_hook_is_seen() -> None:
    def ban(module, args, out):
        if isinstance(module, LlamaForCausalLM):
            out.logits[..., BANNED] = -torch.inf

    target = Target(tiny_model("llama"))
    handle = register_module_forward_hook(ban)
    try:
        got = Decoder(target, PromptLookup(), 3).generate(PROMPT, max_new_tokens=12)
    finally:
        handle.remove()
    assert not {*got.new_tokens[0]} & {*BANNED}


def test_another_head_is_used_at_once() -> None:
    target = Target(tiny_model("llama"))
    decoder = Decoder(target, PromptLookup(), 3)
    other = tiny_model("llama", seed=9).lm_head
    before = decoder.generate(PROMPT, max_new_tokens=12).new_tokens
    target.model.set_output_embeddings(other)
    want = text_of_generate(target.model)
    assert decoder.generate(PROMPT, max_new_tokens=12, stop_tokens=()).new_tokens == [want]
    assert [want] != before


def test_threads_share_a_model_with_hooks() -> None:
    model = hooked()
    want = text_of_generate(model)

    def decode(_) -> list[list[int]]:
        decoder = Decoder(Target(model), PromptLookup(), 3)
        return decoder.generate(PROMPT, max_new_tokens=12, stop_tokens=()).new_tokens

    with ThreadPoolExecutor(4) as pool:
        assert all(texts == [want] for texts in pool.map(decode, range(24)))


def test_states_of_layers_are_read_beside_the_models_own_forward() -> None:
    tokens = torch.tensor([PROMPT])
    found = []
    for model in (tiny_model("llama"), hooked()):
        target = Target(model)
        cache = target.new_cache(1, 20)
        found.append(target.forward(tokens, cache, layers=[1, 2]))
    (logits, states), (banned, same) = found
    assert torch.equal(states, same)
    assert torch.equal(banned[..., 1::2], logits[..., 1::2])
    assert banned[..., BANNED].isneginf().all()


def test_a_known_forward_is_not_run_whole(monkeypatch) -> None:
    """Body and head alone skip the logits of prompts."""
    monkeypatch.setattr(Target, "_whole", lambda *_: pytest.fail("run whole"))
    for model in (Same(tiny_model("llama").config).eval(), *map(tiny_model, FAMILIES)):
        Decoder(Target(model)).generate(PROMPT, max_new_tokens=2)


def test_a_forward_that_does_not_use_its_head_is_refused() -> None:
    model = tiny_model("llama")
    own = tiny_model("llama")
    model.forward = own.forward
    with pytest.raises(ValueError, match=r"must call its lm head once .* got 0 calls"):
        Decoder(Target(model)).generate(PROMPT)
