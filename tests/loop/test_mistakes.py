"""Common mistakes with the loop, and the message that answers each. A new one is one row."""

from __future__ import annotations

import io
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.testing._internal.two_tensor import TwoTensor
from transformers import AutoModel

import specdiff
from specdiff import AdaptiveK, Decoder, Sampling, Target, accelerate, generate
from specdiff.drafters import Autoregressive, PromptLookup
from tests.tiny import tiny_model

TARGET = Target(tiny_model("llama"))
DECODER = Decoder(TARGET, PromptLookup(), 3)
WITH_ADAPTIVE = Decoder(TARGET, PromptLookup(), AdaptiveK())


def opened(**options):
    return DECODER.open(2, 20, **options)


def headless():
    return AutoModel.from_config(tiny_model("llama").config)


def with_head(head):
    model = tiny_model("llama")
    model.lm_head = head
    return model


def offloaded():
    model = tiny_model("llama")
    model.lm_head.to("meta")
    return model


class Wrapper(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = tiny_model("llama")


MISTAKES = {  # message -> call
    # prompts
    "at least one prompt": lambda: DECODER.generate([]),
    "prompt 1 is empty": lambda: DECODER.generate([[1], []]),
    "ids from 1 to 50, outside the target's vocabulary": lambda: DECODER.generate([[1, 50]]),
    "ids from -1 to 1, outside": lambda: DECODER.generate([[1, -1]]),
    "prompt 0 has 64 tokens and leaves no room": lambda: DECODER.generate([[1] * 64]),
    "got text, 'hello': encode it": lambda: DECODER.generate("hello"),
    "got text, ['a', 'b']: encode it": lambda: DECODER.stream(["a", "b"]),
    "got NoneType": lambda: DECODER.generate(None),
    "got float": lambda: DECODER.generate(1.5),
    "1.5 is no token id": lambda: DECODER.generate([[1, 1.5]]),
    "got Tensor of shape [1, 1, 2]": lambda: DECODER.generate(torch.ones(1, 1, 2).long()),
    "got Tensor of shape [2] (": lambda: DECODER.generate(torch.ones(2)),
    "pass `input_ids`": lambda: DECODER.generate({"input_ids": [[1, 2]]}),
    "got text, ['x']: encode": lambda: opened().admit(["x"]),
    # counts
    "max_new_tokens must be at least 1, got 0": lambda: DECODER.generate([1], max_new_tokens=0),
    "max_new_tokens must be an integer, got 2.5": lambda: DECODER.generate([1], max_new_tokens=2.5),
    "max_new_tokens must be an integer, got '9'": lambda: DECODER.stream([1], max_new_tokens="9"),
    "rows must be at least 1, got 0": lambda: DECODER.open(0, 20),
    "rows must be an integer, got True": lambda: DECODER.open(True, 20),
    "capacity must be in [2, 64], the target's context, got 65": lambda: DECODER.open(1, 65),
    "capacity must be an integer, got None": lambda: DECODER.open(1, None),
    "look_every must be at least 1, got 0": lambda: opened(look_every=0),
    "look_every must be an integer, got 1.0": lambda: opened(look_every=1.0),
    "look_every must be 1 with AdaptiveK": lambda: WITH_ADAPTIVE.open(1, 20, look_every=2),
    "block_size must be an integer, got 2.5": lambda: opened(block_size=2.5),
    "block_size must be at least 1, got 0": lambda: opened(block_size=0),
    "blocks must be an integer, got '8'": lambda: opened(block_size=4, blocks="8"),
    "blocks=8 needs a block_size": lambda: opened(blocks=8),
    "one for each of 1 sequences, got 2": lambda: DECODER.generate([1], seed=[1, 2]),
    "for each of 1 prompts, got 2": lambda: opened().admit([[1]], max_new_tokens=[3, 4]),
    "max_new_tokens must be of type Integral": lambda: opened().admit([[1]], max_new_tokens="9"),
    # k
    "k must be an integer, a chooser such as AdaptiveK(), or None, got 2.5": lambda: Decoder(
        TARGET, PromptLookup(), 2.5
    ),
    "or None, got '4'": lambda: DECODER.replace(k="4"),
    "or None, got True": lambda: DECODER.replace(k=True),
    "for plain decoding pass drafter=None": lambda: DECODER.replace(k=0),
    "k must be below the target's context of 64": lambda: DECODER.replace(k=64),
    # what is sampled, and where it ends
    "pass Sampling(temperature=...)": lambda: DECODER.generate([1], sampling=0.7),
    "sampling must be of type Sampling": lambda: opened().admit([[1]], sampling=0.7),
    "temperature must be 0 (greedy) or in": lambda: Sampling(-1),
    "got nan": lambda: Sampling(float("nan")),
    "top_k must be an integer of at least 1, got 0": lambda: Sampling(1.0, top_k=0),
    "top_k must be an integer of at least 1, got 50.0": lambda: Sampling(1.0, top_k=50.0),
    "temperature must be 0 (greedy) or in [2^-95, 2^95], got '0.7'": lambda: Sampling("0.7"),
    "2^95], got None": lambda: Sampling(None),
    "2^95], got True": lambda: Sampling(True),
    "top_k must be an integer of at least 1, got True": lambda: Sampling(1.0, top_k=True),
    "top_k must be an integer of at least 1, got '50'": lambda: Sampling(1.0, top_k="50"),
    "top_p must be in (0, 1], got '0.9'": lambda: Sampling(1.0, top_p="0.9"),
    "top_p must be in (0, 1], got True": lambda: Sampling(1.0, top_p=True),
    "min_p must be in [0, 1], got '0'": lambda: Sampling(1.0, min_p="0"),
    "min_p must be in [0, 1], got False": lambda: Sampling(1.0, min_p=False),
    "top_p must be in (0, 1], got 0.0": lambda: Sampling(1.0, top_p=0.0),
    "min_p must be in [0, 1], got 1.5": lambda: Sampling(1.0, min_p=1.5),
    "stop_tokens must be a sequence of token ids, such as [2], got 2": lambda: DECODER.generate(
        [1], stop_tokens=2
    ),
    "such as [2], got ['.']": lambda: opened(stop_tokens=["."]),
    "stop_strings need a tokenizer": lambda: DECODER.generate([1], stop_strings=["x"]),
    "stop_strings must be strings that are not empty": lambda: DECODER.generate(
        [1], stop_strings=[3]
    ),
    # keywords
    "Decoder.generate() has no 'temperature': pass sampling=Sampling(temp": lambda: (
        DECODER.generate([1], temperature=0.7)
    ),
    "Decoder.stream() has no 'top_p': pass sampling=Sampling(": lambda: DECODER.stream(
        [1], top_p=0.9
    ),
    "generate() has no 'max_length': pass max_new_tokens=": lambda: generate(
        TARGET, None, [1], max_length=9
    ),
    "Decoder.open() has no 'max_new_tokens': it takes rows, capacity": lambda: opened(
        max_new_tokens=9
    ),
    "Decoder.__init__() has no 'drafters': did you mean 'drafter'?": lambda: Decoder(
        TARGET, drafters=PromptLookup()
    ),
    "Decoder.__init__() has no 'num_speculative_tokens': pass k=": lambda: Decoder(
        TARGET, PromptLookup(), num_speculative_tokens=5
    ),
    # target and drafter
    "target is a model: pass specdiff.Target(model)": lambda: Decoder(TARGET.model),
    "got None: Target.load takes a name or a folder": lambda: Decoder(None),
    "got 'smollm2-135m': Target.load takes a name": lambda: Decoder("smollm2-135m"),
    "got 'smollm2': specdiff.Target.load takes a name or a folder": lambda: Target("smollm2"),
    "got 'eagle': specdiff.drafters.load_drafter takes a name": lambda: Decoder(TARGET, "eagle"),
    "drafter is a model: pass specdiff.drafters.Autoregressive(model)": lambda: Decoder(
        TARGET, TARGET.model
    ),
    "the drafter's vocabulary has 51 tokens and the target's 50": lambda: Decoder(
        TARGET, Autoregressive(tiny_model("llama", vocab=51))
    ),
    "the drafter's context holds only 16": lambda: Decoder(
        TARGET, Autoregressive(tiny_model("llama", context=16))
    ).generate([1]),
    "LlamaModel has no lm head: load the model with AutoModelForCausalLM": lambda: Target(
        headless()
    ),
    "the lm head is a Sequential without a weight of its own": lambda: Target(
        with_head(nn.Sequential(nn.Linear(16, 50)))
    ),
    "got a Wrapper; of a wrapper, pass the model inside": lambda: Target(Wrapper()),
    "weights lie on cpu and meta (meta: offloaded)": lambda: Target(offloaded()),
    "module 'specdiff' has no attribute 'Decodr'": lambda: specdiff.Decodr,
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_answered(message):
    with pytest.raises((ValueError, TypeError, AttributeError), match=re.escape(message)):
        MISTAKES[message]()


def test_what_worked_before_still_does():
    """Prompts in other containers, a single id to stop at in a tensor, numbers of NumPy."""
    want = DECODER.generate([3, 5], max_new_tokens=np.int64(5), seed=np.int64(2), stop_tokens=())
    for prompts in (torch.tensor([3, 5]), torch.tensor([[3, 5]]), np.array([[3, 5]]), ((3, 5),)):
        got = DECODER.generate(
            prompts, max_new_tokens=5, seed=2, stop_tokens=torch.tensor([]).long()
        )
        assert got.new_tokens == want.new_tokens


def test_quantised_weights_are_left_to_their_own_layer():
    """A weight of another class than torch's is no memory that could be packed."""
    model = nn.Sequential(nn.Linear(4, 3, bias=False))
    want = model(torch.ones(1, 4))
    weight = model[0].weight.detach()
    model[0].weight = nn.Parameter(TwoTensor(weight, weight.clone()), requires_grad=False)
    assert not specdiff.loop.fast_layers.is_accelerated(accelerate(model))
    torch.testing.assert_close(model(torch.ones(1, 4)).a, want)


def test_a_gpt_neo_that_was_used_can_be_saved_whole():
    target = Target(tiny_model("gpt_neo"))
    want = Decoder(target).generate([1, 2, 3], max_new_tokens=5).new_tokens
    file = io.BytesIO()
    torch.save(target.model, file)
    file.seek(0)
    again = torch.load(file, weights_only=False)
    assert Decoder(Target(again)).generate([1, 2, 3], max_new_tokens=5).new_tokens == want


def test_names_are_listed():
    assert set(specdiff.__all__) <= set(dir(specdiff))
    assert re.match(r"\d+\.\d+", specdiff.__version__)
