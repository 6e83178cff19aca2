"""Accelerated models: the same function, reversibly, row by row."""

from __future__ import annotations

import copy
import io
import itertools

import pytest
import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations
from torch.nn.utils.prune import l1_unstructured, remove
from transformers.pytorch_utils import Conv1D

from specdiff import Decoder, Target
from specdiff.drafters import Autoregressive, PromptLookup, load_drafter
from specdiff.loop.fast_layers import accelerate, is_accelerated, linear, restore
from specdiff.loop.memory import HUGE, LEAST, Store
from specdiff_kernels import pack_weight, use_backend
from tests.operators import Operators
from tests.tiny import FAMILIES, tiny_model

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
HOW = ({}, {"packed": False}, {"bf16": True})


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
@pytest.mark.parametrize("how", HOW, ids=str)
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
    """Torch's own sum over a token's own values only, too, but no document says that they do."""
    x = torch.randn(1, 9, 32)
    model = accelerate(tiny_model(family))
    norms = [m for name, m in model.named_modules() if "norm" in name or "ln_" in name]
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
    copies = [m.forward.args[1] for m in model.modules() if multiplies(m)]
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


def whole(*shape):
    """Whole numbers below 9: their products and sums are exact in any order, and in bf16."""
    return torch.randint(-8, 9, shape).float()


def whole_layer(kind, inputs, outputs):
    """A linear layer of such numbers, so that torch's result is the result bit for bit."""
    layer = (torch.nn.Linear if kind == "linear" else lambda K, N: Conv1D(N, K))(inputs, outputs)
    for parameter in layer.parameters():
        parameter.data = whole(*parameter.shape)
    return layer


def write_by_numpy(weight, new):
    weight.data.numpy()[:] = new.numpy()


def swap(weight, new):
    weight.data = new.clone()


def step(weight, new):
    weight.grad = new
    torch.optim.SGD([weight], lr=1.0).step()


# Every way to write all of a weight [n, k], `new` being other whole numbers
CHANGES = {
    "data, added to": lambda weight, new: weight.data.add_(new),
    "data, copied over": lambda weight, new: weight.data.copy_(new),
    "data, multiplied": lambda weight, new: weight.data.mul_(-1),
    "data, by index": lambda weight, new: weight.data.__setitem__(slice(None), new),
    "data, filled": lambda weight, new: torch.nn.init.constant_(weight.data, 3.0),
    "data, swapped": swap,
    "an alias of data": lambda weight, new: weight.data.t().sub_(new.t()),
    "a detached alias": lambda weight, new: weight.detach().add_(new),
    "its storage": lambda weight, new: weight.untyped_storage().copy_(new.untyped_storage()),
    "numpy": write_by_numpy,
    "dlpack": lambda weight, new: torch.from_dlpack(weight.data).copy_(new),
    "itself": lambda weight, new: weight.copy_(new),
    "inference mode": lambda weight, new: torch.inference_mode()(weight.data.copy_)(new),
    "an optimizer": step,
    "one vector of all": lambda weight, new: torch.nn.utils.vector_to_parameters(
        new.view(-1), [weight]
    ),
}


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_weight_that_is_written_anew(change, how, kind):
    """The layer computes what it would had it never been accelerated, after each of three writes,
    a change of the bias among them."""
    torch.manual_seed(0)
    layer, x = accelerate(whole_layer(kind, 40, 24), **how), whole(2, 40)
    for _ in range(3):
        before = layer(x)
        assert torch.equal(before, type(layer).forward(layer, x))
        change(layer.weight, whole(*layer.weight.shape))
        layer.bias.data.add_(1)
        assert torch.equal(layer(x), type(layer).forward(layer, x))
        assert not torch.equal(layer(x), before)


@torch.no_grad()
def test_inference_tensors_are_followed():
    """They count no writes at all."""
    with torch.inference_mode():
        layer, x = accelerate(whole_layer("linear", 40, 24)), whole(2, 40)
        for _ in range(2):
            assert torch.equal(layer(x), type(layer).forward(layer, x))
            layer.weight.copy_(whole(24, 40))
    assert torch.equal(layer(x), type(layer).forward(layer, x))


@torch.no_grad()
def test_no_single_value_gives_a_weight_away():
    """A weight that changes everywhere but at one place is seen, whichever place that is."""
    layer, x = accelerate(whole_layer("linear", 20, 24)), whole(1, 20)
    layer(x)
    for i in range(24 * 20):
        changed = layer.weight + 1
        changed.view(-1)[i] -= 1
        layer.weight.data.copy_(changed)
        assert torch.equal(layer(x), type(layer).forward(layer, x)), i


PARTS = {  # 1 where a weight [n, k] changes
    "a product of two vectors, half of each zero": lambda n, k: (
        torch.randint(0, 2, (n, 1)) * torch.randint(0, 2, (1, k))
    ),
    "half of the rows": lambda n, k: torch.randint(0, 2, (n, 1)).expand(n, k),
    "half of the columns": lambda n, k: torch.randint(0, 2, (1, k)).expand(n, k),
    "half of the values": lambda n, k: torch.randint(0, 2, (n, k)),
    "every fourth row": lambda n, k: (torch.arange(n)[:, None] % 4 == 1).expand(n, k),
    "an eighth of the rows": lambda n, k: block(n, k, n // 8, k),
    "an eighth of the columns": lambda n, k: block(n, k, n, k // 8),
    "a third of the rows of a third of the columns, and more": lambda n, k: block(
        n, k, n // 3, -(-k * 2 // 5)
    ),
}


def block(n, k, rows, columns):
    """Ones in some block of neighbours."""
    ones = torch.zeros(n, k)
    row, column = torch.randint(n - rows + 1, ()), torch.randint(k - columns + 1, ())
    ones[row : row + rows, column : column + columns] = 1
    return ones


@torch.no_grad()
@pytest.mark.parametrize("kind", ["linear", "conv1d"])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_parts_that_change(part, kind):
    """Each of 40 parts by chance is missed with probability 4e-5 at most, and others never: see
    `fingerprint`."""
    torch.manual_seed(0)
    layer, x = accelerate(whole_layer(kind, 576, 576)), whole(1, 576)
    layer(x)
    for _ in range(40):
        layer.weight.data.add_(part(576, 576))
        assert torch.equal(layer(x), type(layer).forward(layer, x))


@torch.no_grad()
def test_a_weight_of_nans_is_packed_once():
    """They do not equal themselves, but their bits do."""
    layer, x = accelerate(torch.nn.Linear(8, 40)), torch.randn(1, 8)
    layer.weight.data.fill_(torch.nan)
    assert layer(x).isnan().all()
    first = layer.forward.args[1].of(layer.weight)
    assert layer.forward.args[1].of(layer.weight) is first
    layer.weight.data.neg_()  # other bits
    assert layer.forward.args[1].of(layer.weight) is not first


@torch.no_grad()
def texts(model):
    return model.generate(TOKENS, do_sample=False, max_new_tokens=20).tolist()


def multiplies(module):
    """Whether it is a swapped linear layer."""
    return "forward" in vars(module) and module.forward.func is linear


def packs(module):
    return multiplies(module) and module.forward.args[1] is not None


def check_that_it_is_followed(model, before=None):
    """The logits of a copy, which packs anew, bit for bit, and the text of one that does not pack.

    Rounded models have texts of their own, or those of the copy.
    """
    now, text = logits(model), texts(model)
    assert is_accelerated(model)
    assert before is None or not torch.equal(now, before)
    anew = copy.deepcopy(model)
    assert torch.equal(now, logits(anew))
    assert text == texts(anew)
    rounded = any(packs(m) and m.forward.args[1].dtype is torch.bfloat16 for m in model.modules())
    assert rounded or text == texts(restore(anew))
    return now


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("safe", [False, True])
def test_adapters_are_merged(family, how, safe):
    peft = pytest.importorskip("peft")
    model = accelerate(tiny_model(family), **how)
    names = sorted({n.rpartition(".")[2] for n, m in model.named_modules() if multiplies(m)})
    plain = check_that_it_is_followed(model)
    config = peft.LoraConfig(
        r=1, init_lora_weights=False, target_modules=[n for n in names if n != "lm_head"],
        fan_in_fan_out=family == "gpt2",
    )  # fmt: skip
    model = peft.get_peft_model(model, config)
    apart = check_that_it_is_followed(model, plain)
    model.merge_adapter(safe_merge=safe)
    merged = check_that_it_is_followed(model, apart)
    assert how.get("bf16") or torch.allclose(merged, apart, rtol=0, atol=1e-3)
    model.unmerge_adapter()
    check_that_it_is_followed(model, merged)
    model = model.merge_and_unload(safe_merge=safe)
    check_that_it_is_followed(model, plain)


@pytest.mark.parametrize("how", HOW, ids=str)
def test_a_model_that_is_converted_there_and_back(family, how):
    """Rounded weights often come to lie where they were."""
    model = accelerate(tiny_model(family), **how)
    check_that_it_is_followed(model)
    for _ in range(3):
        model.to(torch.bfloat16).float()
        check_that_it_is_followed(model)
        for parameter in model.parameters():
            parameter.data.add_(2.0**-12)


def test_a_tied_embedding():
    """It is the head's weight too."""
    model = accelerate(tiny_model("llama", tie_word_embeddings=True))
    assert model.lm_head.weight is model.model.embed_tokens.weight
    before = check_that_it_is_followed(model)
    model.get_input_embeddings().weight.data.neg_()
    check_that_it_is_followed(model, before)
    assert copy.deepcopy(model).lm_head.weight is not model.lm_head.weight


def test_a_step_of_training(family):
    model = accelerate(tiny_model(family))
    before = check_that_it_is_followed(model)
    usual = restore(copy.deepcopy(model))
    for each in (model, usual):
        each(TOKENS, labels=TOKENS).loss.backward()
        torch.optim.SGD(each.parameters(), lr=0.1).step()
    check_that_it_is_followed(model, before)
    for ours, theirs in zip(model.parameters(), usual.parameters(), strict=True):
        assert torch.equal(ours, theirs)


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("how", HOW, ids=str)
@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_copies_are_models_of_their_own(family, copied, how):
    """They hold no packed weight at first, and each follows its own weights."""
    model = accelerate(tiny_model(family), **how)
    before = logits(model)
    other = copied(model)
    assert not any(len(m.forward.args[1].weight.packs) for m in other.modules() if packs(m))
    assert torch.equal(logits(other), before)
    for parameter in other.parameters():
        parameter.data.mul_(1.5)
    check_that_it_is_followed(other, before)
    assert torch.equal(logits(model), before)


@torch.no_grad()
def test_a_change_between_two_rounds():
    """The rest of a text is that of weights packed anew."""
    rest = []
    for anew in (False, True):
        model = accelerate(tiny_model("llama"))
        session = Decoder(Target(model), PromptLookup(), 3).open(1, 40, stop_tokens=[])
        session.admit([[3, 1, 4, 1, 5, 9]], max_new_tokens=30)
        for _ in range(3):
            session.step()
        assert len(session.texts[0]) < 20
        model.lm_head.weight.data.copy_(torch.randn(50, 32, generator=torch.manual_seed(0)))
        model.model.layers[0].mlp.up_proj.weight.data.neg_()
        if anew:
            accelerate(model)
        while not all(session.done):
            session.step()
        rest.append(session.texts[0])
    assert rest[0] == rest[1]


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
        before = layer(x)
        assert torch.equal(compiled(x), before)
        layer.weight.data.neg_()
        assert torch.equal(compiled(x), layer(x)) and not torch.equal(layer(x), before)


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


# --- memory


def test_pieces_of_a_store_begin_in_a_huge_page_and_never_overlap():
    store = Store()
    shapes = [(3, 5), (1000, 7), (1,), (600, 576), (20_000_000,), (2, 2)]
    pieces = [store.take(shape, torch.float32) for shape in shapes]
    pieces += [store.take((3, 16), torch.bfloat16)]
    spans = sorted((x.data_ptr(), x.data_ptr() + x.nbytes) for x in pieces)
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    assert all(start % 64 == 0 for start, _ in spans)
    large = [x for x in pieces if x.nbytes >= LEAST]  # the others are ordinary memory
    assert len(large) == 2 and all(x.data_ptr() % HUGE == 0 for x in large)
    assert [tuple(x.shape) for x in pieces[:-1]] == shapes


def test_a_weight_that_changes_is_packed_where_it_was():
    """Or each merge of an adapter would take the memory of a model."""
    layer = accelerate(nn.Sequential(nn.Linear(20, 30))).eval()
    packed = lambda: layer[0].forward.args[1].weight.packs
    with torch.inference_mode():
        layer(torch.ones(1, 20))
        before = packed().data_ptr()
    with torch.no_grad():
        layer[0].weight.mul_(2)
        got = layer(torch.ones(1, 20))
        assert packed().data_ptr() == before
        assert torch.equal(got, accelerate(copy.deepcopy(restore(layer)))(torch.ones(1, 20)))
    two = copy.deepcopy(accelerate(nn.Sequential(nn.Linear(20, 30), nn.Linear(30, 20))))
    assert two[0].forward.args[1].store is two[1].forward.args[1].store


def test_packs_go_where_they_are_told():
    weight, place = torch.randn(20, 3), torch.empty(2, 3, 16)
    packed = pack_weight(weight, out=place)
    assert packed.packs is place and torch.equal(place, pack_weight(weight).packs)
    with pytest.raises(ValueError, match=r"out: expected shape \[.*2.*\], got \[1, 3, 16\]"):
        pack_weight(weight, out=torch.empty(1, 3, 16))
    with pytest.raises(ValueError, match="out: expected contiguous memory"):
        pack_weight(weight, out=torch.empty(2, 16, 3).transpose(1, 2))
