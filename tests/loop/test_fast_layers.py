"""Accelerated models: the same function, reversibly, row by row."""

from __future__ import annotations

import copy

import pytest
import torch
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from torch.nn.utils.prune import l1_unstructured, remove

from specdiff import Decoder, Target
from specdiff.drafters import Autoregressive, PromptLookup, load_drafter
from specdiff.loop.fast_layers import accelerate, is_accelerated, restore
from specdiff_kernels import use_backend
from tests.operators import Operators
from tests.tiny import FAMILIES, tiny_model

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])


@pytest.fixture(params=FAMILIES)
def family(request):
    return request.param


@torch.no_grad()
def logits(model, tokens=TOKENS):
    return model(tokens).logits


def test_logits_are_those_of_the_model(family):
    """Two layers of width 32 to 64: some 200 roundings of relative size 2^-24 in a chain."""
    model = tiny_model(family)
    before = logits(model)
    after = logits(accelerate(model))
    assert is_accelerated(model)
    assert (after - before).abs().max() < 200 * 2.0**-24 * before.abs().max()


def test_restore_gives_back_the_same_bits(family):
    model = tiny_model(family)
    before = logits(model)
    assert is_accelerated(accelerate(model, bf16=True))
    assert not torch.equal(logits(model), before)
    assert not is_accelerated(restore(model))
    assert torch.equal(logits(model), before)
    assert all(p.is_contiguous() for p in model.parameters())


@torch.no_grad()
def test_a_linear_layer_gives_a_token_the_same_alone_and_among_others():
    model = accelerate(tiny_model("llama"))
    layer = model.model.layers[0].mlp.up_proj
    x = torch.randn(2, 9, 32)
    together = layer(x)
    assert together.shape == (2, 9, 64)
    for b in range(2):
        for i in range(9):
            assert torch.equal(layer(x[b : b + 1, i : i + 1])[0, 0], together[b, i])


@torch.no_grad()
@pytest.mark.parametrize("how", [{}, {"packed": False}, {"bf16": True}], ids=str)
def test_weights_that_change_are_followed(family, how):
    """Loaded over, assigned, converted and copied models compute with what they hold."""
    model, other = accelerate(tiny_model(family), **how), tiny_model(family, seed=1)
    wanted = logits(accelerate(copy.deepcopy(other), **how))
    logits(model)
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model), wanted)
    assert torch.equal(logits(copy.deepcopy(model)), wanted)
    model.load_state_dict(tiny_model(family, seed=1).state_dict(), assign=True)
    assert torch.equal(logits(model), wanted)
    model.load_state_dict(tiny_model(family, seed=2).state_dict())  # into what was assigned
    third = accelerate(tiny_model(family, seed=2), **how)
    assert torch.equal(logits(model), logits(third))
    model.load_state_dict(other.state_dict())
    assert torch.equal(logits(model.double()), logits(other.double()))


def test_subclasses_are_left_alone():
    class Doubled(torch.nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    assert not is_accelerated(accelerate(Doubled(4, 4)))
    assert not is_accelerated(accelerate(weight_norm(torch.nn.Linear(4, 4))))


def test_a_trainable_bias_learns():
    layer = accelerate(torch.nn.Linear(8, 4), bf16=True)
    layer.weight.requires_grad_(False)
    layer(torch.randn(2, 8)).sum().backward()
    assert layer.bias.grad is not None


@torch.no_grad()
def test_norms_give_a_token_the_same_alone_and_among_others(family):
    """torch's own, which `accelerate` leaves in place: sums over a token's own values only."""
    x = torch.randn(1, 9, 32)
    norms = [m for name, m in tiny_model(family).named_modules() if "norm" in name or "ln_" in name]
    assert norms
    for norm in norms:
        together = norm(x)
        for i in range(9):
            assert torch.equal(norm(x[:, i : i + 1])[:, 0], together[:, i])


def test_gradients_go_to_torch_and_many_rows_do_not():
    layer = torch.nn.Linear(8, 4)
    accelerate(layer)
    wide, narrow = torch.randn(300, 8), torch.randn(3, 8)
    with torch.no_grad():
        assert torch.equal(layer(wide)[297:], layer(wide[297:]))
    with Operators() as called:
        layer(narrow).sum().backward()
    assert layer.weight.grad is not None and "specdiff.skinny_linear.default" not in called.names
    with torch.no_grad(), Operators() as called:
        layer(wide)
    assert called.names.count("specdiff.skinny_linear.default") == 1


@torch.no_grad()
def test_without_a_copy_the_bits_are_the_same(family):
    """Weights used where they lie: the same logits, and no tensor beside the model's."""
    model = accelerate(tiny_model(family), packed=False)
    expected = logits(accelerate(tiny_model(family)))
    assert torch.equal(logits(model), expected)
    copies = [m.forward.args[1] for m in model.modules() if "forward" in vars(m)]
    assert copies and all(copy is None for copy in copies)
    assert torch.equal(logits(restore(model)), logits(tiny_model(family)))


@torch.no_grad()
def test_a_weight_is_packed_once():
    layer = accelerate(torch.nn.Linear(8, 40))
    layer(torch.randn(1, 8))
    first = layer.forward.args[1].of(layer.weight)
    assert first.packs.shape == (3, 8, 16) and first.rows == 40
    layer(torch.randn(9, 8))
    assert layer.forward.args[1].of(layer.weight) is first
    layer.weight.add_(1)
    assert layer.forward.args[1].of(layer.weight) is not first


def test_a_rounded_copy_is_packed():
    with pytest.raises(ValueError, match=r"^bf16: a rounded weight is a copy, which is packed"):
        accelerate(torch.nn.Linear(8, 4), packed=False, bf16=True)


def test_what_does_not_fit_is_torchs_error():
    """No kernel reads behind the end of an input, a weight or a bias that has been replaced."""
    layer = accelerate(torch.nn.Linear(8, 4))
    with torch.no_grad():
        with pytest.raises(RuntimeError, match="cannot be multiplied"):
            layer(torch.randn(3, 7))
        expected = layer(torch.ones(1, 8)) - layer.bias + layer.bias[0]
        layer.bias = torch.nn.Parameter(layer.bias[:1].clone())
        assert torch.allclose(layer(torch.ones(1, 8)), expected)
        layer.bias = torch.nn.Parameter(torch.arange(8.0)[::2])
        assert torch.allclose(
            layer(torch.ones(1, 8)), torch.nn.Linear.forward(layer, torch.ones(1, 8))
        )


class Doubled(torch.nn.Module):
    def forward(self, x):
        return 2 * x


@pytest.mark.parametrize("name", ["weight", "bias"])
def test_a_layer_that_is_changed_later(name):
    """Parametrized, pruned, or with a tensor in a parameter's place."""
    layer, x = accelerate(torch.nn.Linear(8, 4)), torch.randn(2, 8)
    usual = torch.nn.Linear.forward
    with torch.no_grad():
        register_parametrization(layer, name, Doubled())
        assert torch.equal(layer(x), usual(layer, x))
        remove_parametrizations(layer, name)
        l1_unstructured(layer, name, 1)
        assert torch.equal(layer(x), usual(layer, x))
        remove(layer, name)
        value = getattr(layer, name).clone()
        delattr(layer, name)
        setattr(layer, name, value)
        assert torch.equal(layer(x), usual(layer, x))


def test_changes_through_data_are_seen():
    layer, x = accelerate(torch.nn.Linear(8, 8)), torch.randn(2, 8)
    with torch.no_grad():
        layer(x)
        layer.weight.data = layer.weight.data.t()
        assert torch.allclose(layer(x), torch.nn.Linear.forward(layer, x), atol=1e-5)
        layer.weight.data = layer.weight.data[:2]
        layer.bias.data = layer.bias.data[::4]
        assert torch.allclose(layer(x), torch.nn.Linear.forward(layer, x), atol=1e-5)


def test_a_functional_gradient():
    layer, x = accelerate(torch.nn.Linear(8, 4)), torch.randn(2, 8)
    parameters = dict(layer.named_parameters())

    def loss(parameters):
        return torch.func.functional_call(layer, parameters, (x,)).square().sum()

    gradient = torch.func.grad(loss)(parameters)
    assert torch.allclose(gradient["bias"], 2 * layer(x).sum(0), atol=1e-5)


def test_the_products_dtype_and_device_are_its_own():
    """Whatever tensors are made of by default."""
    layer, x = accelerate(torch.nn.Linear(8, 4)), torch.randn(2, 8)
    with torch.no_grad():
        expected = layer(x)
        for dtype in (torch.float64, torch.bfloat16):
            torch.set_default_dtype(dtype)
            try:
                result = layer(x)
            finally:
                torch.set_default_dtype(torch.float32)
            assert torch.equal(result, expected)
        with torch.device("meta"):
            assert torch.equal(layer(x), expected)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
def test_inputs_of_every_rank(backend):
    layer = torch.nn.Linear(8, 4)
    with torch.no_grad(), use_backend(backend):
        for shape in ((8,), (3, 8), (2, 3, 8)):
            x = torch.randn(shape)
            expected = layer(x)
            assert torch.allclose(accelerate(layer)(x), expected, atol=1e-5)
            restore(layer)


@pytest.mark.parametrize("bf16", [False, True])
def test_compiled_as_well(bf16):
    """A compiler sees one op, of the same bits."""
    layer, x = accelerate(torch.nn.Linear(8, 4), bf16=bf16), torch.randn(2, 3, 8)
    with torch.no_grad():
        compiled = torch.compile(layer, backend="eager", fullgraph=True)
        assert torch.equal(compiled(x), layer(x))


def test_other_dtypes_are_left_alone():
    assert not is_accelerated(accelerate(tiny_model("llama", dtype=torch.bfloat16)))


def test_bf16_is_used_for_many_rows_too():
    layer = accelerate(torch.nn.Linear(64, 64), bf16=True)
    x = torch.randn(40, 64)
    with torch.no_grad():
        assert torch.allclose(layer(x)[:20], layer(x[:20]), rtol=0, atol=1e-5)


def test_greedy_text_is_that_of_plain_decoding(family):
    target = Target(accelerate(tiny_model(family)))
    prompts = [[1, 2, 3, 1, 2], [7, 8, 9]]
    plain = Decoder(target).generate(prompts, max_new_tokens=25).new_tokens
    for drafter in (PromptLookup(), Autoregressive(tiny_model("llama", seed=3))):
        assert Decoder(target, drafter).generate(prompts, max_new_tokens=25).new_tokens == plain


def test_a_drafter_follows_its_target(tmp_path):
    tiny_model("gpt2", seed=1).save_pretrained(tmp_path)
    for model, expected in ((tiny_model("llama"), False), (accelerate(tiny_model("llama")), True)):
        drafter = load_drafter(tmp_path, Target(model))
        assert is_accelerated(drafter.model.model) == expected
