"""Models whose decoder layers are not known: norms and gated MLPs are swapped by their code."""

from __future__ import annotations

import copy
import functools
import io

import pytest
import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm
from transformers.models.olmo2.modeling_olmo2 import Olmo2RMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from specdiff.loop.fast_layers import accelerate, norm, restore, swapped
from specdiff.loop.gated_mlps import mlp
from specdiff.loop.known import is_gated_mlp, norm_of, same_code
from tests.operators import Operators
from tests.tiny import NO_IDS, tiny_model

# Of two layers: norms and MLPs that are swapped. Those of OLMo 2 and Cohere are norms of their own,
# Phi 3 has gate and up in one, StarCoder 2 no gate, and Mixtral experts.
FAMILIES = {
    "qwen3": (9, 2, {"head_dim": 8}),
    "phi3": (5, 0, {"pad_token_id": None}),
    "olmo2": (0, 2, {}),
    "granite": (5, 2, {}),
    "starcoder2": (5, 0, {}),
    "mixtral": (5, 0, {"num_local_experts": 4}),
    "stablelm": (5, 2, {}),
    "cohere": (0, 2, {}),
    "smollm3": (5, 2, {}),
    "ernie4_5": (5, 2, {"head_dim": 8}),
}
TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
HOW = ({}, {"packed": False}, {"packed": "only"}, {"bf16": True})


def other_model(family: str, seed: int = 0):
    """Two layers of width 32."""
    torch.manual_seed(seed)
    options = {
        "max_position_embeddings": 64, "hidden_size": 32, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 64,
        "initializer_range": 0.3, "vocab_size": 50, "use_cache": True, **NO_IDS,
        **FAMILIES[family][2],
    }  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **options)).eval()


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


def by(function, model):
    return [m for m in model.modules() if swapped(m) and m.forward.func is function]


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens).logits


@torch.no_grad()
def test_the_same_function_with_norms_and_mlps_swapped(family):
    """As in test_fast_layers.py; and greedy text is the same, and `restore` gives the same bits."""
    model = other_model(family)
    before = logits(model)
    generate = functools.partial(model.generate, TOKENS, max_new_tokens=12, do_sample=False)
    text = generate()
    accelerate(model)
    norms, mlps, _ = FAMILIES[family]
    assert (len(by(norm, model)), len(by(mlp, model))) == (norms, mlps)
    assert (logits(model) - before).abs().max() < 200 * 2.0**-24 * before.abs().max()
    assert torch.equal(generate(), text)
    assert torch.equal(logits(restore(model)), before)


@torch.no_grad()
@pytest.mark.parametrize("how", HOW, ids=str)
def test_norms_and_mlps_give_a_token_the_same_alone_and_among_others(family, how):
    model = accelerate(other_model(family), **how)
    for module in (*by(norm, model), *by(mlp, model)):
        width = getattr(module, "hidden_size", None) or module.weight.shape[0]
        x = torch.randn(2, 9, width)
        together = module(x)
        for b in range(2):
            for i in range(9):
                assert torch.equal(module(x[b : b + 1, i : i + 1])[0, 0], together[b, i])


@torch.no_grad()
@pytest.mark.parametrize("how", HOW, ids=str)
def test_weights_that_change_are_followed(how):
    """Written to, loaded over, copied, pickled and assigned."""
    model, other = accelerate(other_model("qwen3"), **how), other_model("qwen3", seed=1)
    wanted = logits(accelerate(copy.deepcopy(other), **how))
    assert not torch.equal(logits(model), wanted)
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(copy.deepcopy(model)), wanted)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    assert torch.equal(logits(torch.load(file, weights_only=False)), wanted)
    for module in by(mlp, model):
        module.up_proj.weight.data.mul_(2)
    for module in other.model.layers:
        module.mlp.up_proj.weight.mul_(2)
    wanted = logits(accelerate(copy.deepcopy(other), **how))
    assert torch.equal(logits(model), wanted)
    model.load_state_dict(other_model("qwen3", seed=2).state_dict(), assign=True)
    assert torch.equal(logits(model), logits(accelerate(other_model("qwen3", seed=2), **how)))


def mlp_of(kind=Qwen3MLP, **options):
    torch.manual_seed(0)
    return kind(other_model("qwen3").config, **options).eval()


def is_native(module, x):
    """Whether a call makes no product of its own."""
    calls = []
    forward = type(module).forward
    type(module).forward = lambda *given: calls.append(given) or forward(*given)
    try:
        module(x)
    finally:
        type(module).forward = forward
    return not calls


@torch.no_grad()
def test_what_an_mlp_leaves_to_its_class():
    """Hooks inside, parts that do not fit, other dtypes, gradients, and operators that are watched;
    training is no reason, for there is no dropout in it."""
    x = torch.randn(2, 3, 32)
    module = accelerate(mlp_of()).train()
    assert is_native(module, x)
    seen = []
    hook = module.up_proj.register_forward_hook(lambda *given: seen.append(given))
    assert not is_native(module, x) and seen
    hook.remove()
    assert is_native(module, x) and not is_native(module, x[:0])
    with torch.enable_grad():
        assert not is_native(module, x)
        module(x).sum().backward()
    assert all(p.grad is not None for p in module.parameters())
    with Operators() as called:
        module(x)
    assert called.names.count("specdiff.skinny_linear.default") == 3
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), module(x), rtol=1e-5, atol=1e-6)
    with pytest.raises(RuntimeError):
        module(torch.randn(2, 31))
    linear, module.down_proj = module.down_proj, nn.Sequential(module.down_proj)
    assert not is_native(module, x)
    module.down_proj = linear
    assert is_native(module, x)
    module.down_proj.bias = nn.Parameter(torch.randn(1))  # which torch broadcasts
    assert not is_native(module, x)
    module.down_proj.bias = nn.Parameter(torch.randn(32))
    assert is_native(module, x)
    torch.testing.assert_close(module(x), Qwen3MLP.forward(module, x), rtol=1e-5, atol=1e-6)
    module.act_fn.forward = lambda x: 2 * x
    assert not is_native(module, x)
    assert not is_native(module.double(), x.double())


@torch.no_grad()
@pytest.mark.parametrize("name", ["mlp", "mlp.gate_proj", "mlp.act_fn", "input_layernorm"])
def test_a_forward_that_was_replaced_before_is_kept(name):
    """In an MLP, and in a decoder layer that would else be native as a whole."""
    for model in (other_model("qwen3"), tiny_model("llama")):
        module = model.model.layers[0].get_submodule(name)
        forward = module.forward
        module.forward = lambda x, forward=forward: 2 * forward(x)
        before = logits(model)
        after = logits(accelerate(model))
        assert (after - before).abs().max() < 200 * 2.0**-24 * before.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("called", [False, True])
def test_a_linear_layer_in_it_that_is_restored(called):
    for model in (other_model("qwen3"), tiny_model("llama")):
        before = logits(model)
        accelerate(model)
        if called:
            logits(model)
        restore(model.model.layers[0].mlp.gate_proj)
        assert (logits(model) - before).abs().max() < 200 * 2.0**-24 * before.abs().max()


def test_a_decoder_layer_is_native_with_its_mlp_swapped():
    """Nothing in it is called."""
    model = accelerate(tiny_model("llama"))
    layer = model.model.layers[0]
    assert len(by(mlp, model)) == 2 and layer.forward.args[1].reason(layer) is None
    with torch.no_grad():
        logits(model)
    assert layer.mlp.forward.args[1].native is None is not layer.forward.args[1].native


# --- code ----------------------------------------------------------------------------------------


class Doubled(LlamaRMSNorm):
    def forward(self, hidden_states):
        return 2 * super().forward(hidden_states)


class Inherited(LlamaRMSNorm):
    pass


class Minus(LlamaMLP):
    def forward(self, x):
        return -super().forward(x)


def test_code_of_the_same_kind_only(monkeypatch):
    known = (LlamaRMSNorm, MixtralRMSNorm, Qwen3RMSNorm, GemmaRMSNorm, Gemma2RMSNorm, nn.LayerNorm)
    assert all(norm_of(kind) for kind in known)
    assert not any(norm_of(kind) for kind in (Doubled, Inherited, Olmo2RMSNorm, nn.Linear))
    assert is_gated_mlp(Qwen3MLP) and not is_gated_mlp(Minus) and not is_gated_mlp(LlamaRMSNorm)
    monkeypatch.setattr(Gemma2RMSNorm, "_norm", lambda self, x: x)
    monkeypatch.setattr(MixtralRMSNorm, "forward", Doubled.forward)
    wrapped = functools.wraps(Qwen3RMSNorm.forward)(lambda *given: 2 * given[1])
    monkeypatch.setattr(Qwen3RMSNorm, "forward", wrapped)
    assert not any(norm_of(kind) for kind in (MixtralRMSNorm, Qwen3RMSNorm, Gemma2RMSNorm))
    monkeypatch.setattr(Qwen3MLP, "forward", lambda self, x: x)
    assert not is_gated_mlp(Qwen3MLP)


def function(text):
    space: dict = {"__name__": "transformers.models.one"}
    exec(text, space)
    return space["f"]


def test_code_is_compared_but_for_docstrings():
    one = function('def f(self, x):\n    "Words."\n    return self.a(x) + 1')
    same = function("def f(self, y):\n    return self.a(y) + 1")
    others = ("self.a(x) + 2", "self.a(x) + 1.0", "self.a(x) - 1", "self.b(x) + 1")
    assert same_code(one, same) and same_code(same, one)
    for other in others:
        assert not same_code(one, function(f"def f(self, x):\n    return {other}")), other
    assert not same_code(one, function("def f(self, z, x):\n    return self.a(z) + 1"))


@torch.no_grad()
def test_norms_of_a_class_that_is_changed_later(monkeypatch):
    module, x = accelerate(Qwen3RMSNorm(8)), torch.randn(2, 8)
    assert swapped(module)
    monkeypatch.setattr(Qwen3RMSNorm, "forward", lambda self, x: 2 * x)
    assert torch.equal(module(x), 2 * x)
