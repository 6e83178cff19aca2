"""Published shapes have their parameters, and random weights say what rounding cannot change."""

from __future__ import annotations

import pytest
import torch
from transformers import GPTNeoConfig

from specdiff import Decoder, Target
from specdiff.bench import shapes
from specdiff.bench.controlled import Controlled
from specdiff.bench.shapes import DRAFTERS, TARGETS, random_drafter, random_target
from specdiff.drafters import Autoregressive
from specdiff.drafters.sedd import SEDD

PARAMETERS = {
    "gpt2-xl": 1_557_611_200,
    "gpt-neo-2.7b": 2_651_307_520,
    "gpt2": 124_439_808,
    "sedd-small": 169_627_218,
}
PROMPTS = [[5, 6, 7, 8], [50256, 1]]


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    torch.set_num_threads(1)


def random(name="gpt2-xl", dtype=torch.bfloat16, layers=1, seed=0):
    return random_target(name, dtype=dtype, device="cpu", layers=layers, seed=seed)


@pytest.fixture(scope="module")
def model():
    return random()


def test_shapes_have_as_many_parameters_as_those_published():
    assert {**TARGETS, **DRAFTERS}.keys() == PARAMETERS.keys()
    for name, config in {**TARGETS, **DRAFTERS}.items():
        model = shapes.allocate(config, torch.bfloat16, torch.device("meta"))
        assert sum(p.numel() for p in model.parameters()) == PARAMETERS[name]
        assert {(p.dtype, p.device.type) for p in model.parameters()} == {(torch.bfloat16, "meta")}
    assert torch.get_default_dtype() == torch.float32


def test_every_other_layer_of_gpt_neo_is_local():
    assert TARGETS["gpt-neo-2.7b"].attention_layers == ["global", "local"] * 16
    cut = shapes.cut("target", TARGETS, "gpt-neo-2.7b", 3)
    assert cut.attention_layers == ["global", "local", "global"]
    assert GPTNeoConfig(**cut.to_dict()).attention_layers == cut.attention_layers
    assert TARGETS["gpt-neo-2.7b"].num_layers == 32


def gap(model) -> torch.Tensor:
    """The lead of the best logit over the second, as a share of it, at the positions of a text."""
    text = Decoder(Target(model)).generate(PROMPTS[0], max_new_tokens=12).sequences
    with torch.inference_mode():
        best = model(torch.tensor(text)).logits.float().topk(2).values[0]
    return 1 - best[:, 1] / best[:, 0]


@pytest.mark.parametrize(
    ("name", "dtype", "layers"),
    [
        ("gpt2-xl", torch.bfloat16, 1),
        ("gpt2-xl", torch.float32, 2),
        ("gpt-neo-2.7b", torch.bfloat16, 2),
    ],
)
def test_logits_are_well_apart(name, dtype, layers):
    model = random(name, dtype, layers)
    assert gap(model).min() > 0.25
    text = Decoder(Target(model)).generate(PROMPTS[0], max_new_tokens=12).new_tokens[0]
    assert len(set(text)) == 12  # no token over and over


def test_logits_of_common_random_weights_are_not(model):
    common = shapes.allocate(model.config, torch.bfloat16, torch.device("cpu"))
    shapes.fill(common, 0)
    assert gap(common.eval()).min() < 0.02


def test_weights_are_those_of_the_seed(model):
    assert model.lm_head.weight is model.transformer.wte.weight
    assert {p.dtype for p in model.parameters()} == {model.dtype}
    again, other = random().state_dict(), random(seed=1).state_dict()
    for name, tensor in model.state_dict().items():
        assert tensor.isfinite().all() and tensor.equal(again[name])
        assert tensor.ndim == 1 or not tensor.equal(other[name])


@pytest.mark.parametrize("name", DRAFTERS)
def test_drafters_work_beside_the_target(model, name):
    """One rejected token in a draft of the drafter's own or a controlled one changes no text."""
    target = Target(model)
    drafter = random_drafter(name, target, layers=1)
    kind = SEDD if name == "sedd-small" else Autoregressive
    assert type(drafter) is kind and drafter.vocab_size == 50257
    network = drafter.network if isinstance(drafter, SEDD) else drafter.model.model
    assert {(p.dtype, p.device) for p in network.parameters()} == {(target.dtype, target.device)}
    assert all(p.isfinite().all() for p in network.parameters())
    plain = Decoder(target).generate(PROMPTS, max_new_tokens=12)
    own = Decoder(target, drafter, 4).generate(PROMPTS, max_new_tokens=4)
    assert own.sequences == [text[: len(text) - 8] for text in plain.sequences]
    texts = {tuple(p): text for p, text in zip(PROMPTS, plain.sequences, strict=True)}
    controlled = Decoder(target, Controlled(drafter, texts, [1, 1, 1, 0]), 4)
    run = controlled.generate(PROMPTS, max_new_tokens=12)
    assert run.sequences == plain.sequences
    assert run.stats.acceptance == [1, 1, 1, 0]


def test_unusable_arguments_are_named(model):
    with pytest.raises(ValueError, match=r"target must be one of gpt2-xl, .*, got 'gpt2'"):
        random_target("gpt2", dtype=torch.float32, device="cpu")
    with pytest.raises(ValueError, match="drafter must be one of sedd-small, gpt2, got 'sedd'"):
        random_drafter("sedd", Target(model))
    for layers in (0, 49):
        with pytest.raises(ValueError, match=rf"layers must be in \[1, 48\] .*, got {layers}"):
            random_target("gpt2-xl", dtype=torch.float32, device="cpu", layers=layers)
