"""Models whose weights lie packed and nowhere else: the same values, whoever asks."""

from __future__ import annotations

import copy
import io
import weakref

import pytest
import torch
from torch import nn

from specdiff import Decoder, Target, accelerate, restore
from specdiff.loop.only_packed import OnlyPacked
from tests.tiny import DRAFTERS, tiny_model

TOKENS = torch.tensor([[3, 1, 4, 1, 5, 9, 2, 6]])
MODELS = {
    "gpt2": ("gpt2", {}),  # Conv1D, a tied embedding
    "gpt_neo": ("gpt_neo", {}),
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "qwen2": ("qwen2", {}),  # biases
    "gemma": ("gemma", {}),  # a subclass of nn.Embedding, 8 rows in a pack of 16
}


@pytest.fixture(params=MODELS.values(), ids=MODELS)
def made(request):
    """Makes the model of a seed."""
    family, more = request.param
    return lambda seed=0: tiny_model(family, seed=seed, **more)


def only(model):
    model = accelerate(model, packed="only")
    assert lying(model) > 5
    return model


def lying(model):
    return sum(type(p) is OnlyPacked for p in model.parameters())


@torch.no_grad()
def logits(model):
    return model(TOKENS).logits


def same(model, other):
    """Whether all values are, bit for bit."""
    pairs = zip(model.named_parameters(), other.named_parameters(), strict=True)
    return all(n == m and torch.equal(p, q) for (n, p), (m, q) in pairs)


def test_logits_and_restored_weights_have_the_same_bits(made):
    model, plain = only(made()), made()
    assert torch.equal(logits(model), logits(accelerate(made())))
    assert same(model, plain) and not same(model, made(1))
    assert model.num_parameters() == plain.num_parameters()
    restore(model)
    assert lying(model) == 0 and same(model, plain)
    assert [p.stride() for p in model.parameters()] == [p.stride() for p in plain.parameters()]
    assert not any(m._state_dict_hooks for m in model.modules())
    assert torch.equal(logits(model), logits(plain))


def test_a_weight_has_no_memory_beside_its_packs():
    layer = nn.Linear(64, 64)
    old = layer.weight.untyped_storage()._weak_ref()
    accelerate(layer, packed="only")
    assert torch.UntypedStorage._expired(old)
    torch.UntypedStorage._free_weak_ref(old)
    with pytest.raises(NotImplementedError, match=r"^data_ptr: .*call specdiff.restore"):
        layer.weight.data_ptr()
    with pytest.raises(NotImplementedError, match=r"^numpy: "):
        layer.weight.detach().numpy()


def test_saved_files_are_the_same(made, tmp_path):
    model, plain = only(made()), made()
    for name, each in (("only", model), ("plain", plain)):
        each.save_pretrained(tmp_path / name)
    file = "model.safetensors"
    assert (tmp_path / "only" / file).read_bytes() == (tmp_path / "plain" / file).read_bytes()
    assert same(type(model).from_pretrained(tmp_path / "only"), plain)
    states = model.state_dict()
    assert all(type(x) is torch.Tensor for x in states.values())
    assert all(torch.equal(x, plain.state_dict()[n]) for n, x in states.items())


@pytest.mark.parametrize("assign", [False, True])
def test_loaded_weights_are_used(made, assign):
    model = only(made())
    count = lying(model)
    model.load_state_dict(made(1).state_dict(), assign=assign)  # assigned ones are tied no more
    assert lying(model) == (0 if assign else count)
    wanted = made(1).state_dict()
    assert all(torch.equal(x, wanted[name]) for name, x in model.state_dict().items())
    assert torch.equal(logits(model), logits(accelerate(made(1))))


def saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize("copied", [copy.deepcopy, saved_and_loaded])
def test_copies_are_models_of_their_own(made, copied):
    model = only(made())
    other = copied(model)
    assert lying(other) == lying(model) and torch.equal(logits(other), logits(model))
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.neg_()
    assert same(model, made()) and not same(other, model)


def test_conversions_unpack(made):
    model, plain = only(made()), made()
    model.to("cpu").float()
    assert lying(model) > 5
    model.double(), plain.double()
    assert lying(model) == 0 and same(model, plain)
    assert torch.equal(logits(model), logits(plain))
    assert torch.equal(logits(model.float()), logits(accelerate(made())))


def test_steps_of_training(made):
    model, plain = only(made()), made()
    for each in (model, plain):
        optimizer = torch.optim.AdamW(each.parameters(), lr=0.01)
        for _ in range(2):
            optimizer.zero_grad()
            each(TOKENS, labels=TOKENS).loss.backward()
            optimizer.step()
    assert lying(model) > 5 and same(model, plain) and not same(model, made())
    assert torch.equal(logits(model), logits(accelerate(plain)))


@pytest.mark.parametrize("safe", [False, True])
def test_adapters_are_merged(made, safe):
    peft = pytest.importorskip("peft")
    results = []
    for each in (only(made()), made()):
        names = {n.rpartition(".")[2] for n, m in each.named_modules() if hasattr(m, "weight")}
        names = [n for n in names if "proj" in n or n.startswith("c_")]
        config = peft.LoraConfig(r=1, init_lora_weights=False, target_modules=sorted(names))
        torch.manual_seed(0)
        model = peft.get_peft_model(each, config)
        model.merge_adapter(safe_merge=safe)
        results.append([logits(model)])
        model.unmerge_adapter()
        results[-1].append(model.merge_and_unload(safe_merge=safe))
    (ours, model), (theirs, plain) = results
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-3)
    assert lying(model) > 5 and same(model, plain) and not same(model, made())


WRITES = {
    "a row": lambda w: w[3].mul_(2),
    "a value": lambda w: w.__setitem__((1, 2), 5.0),
    "data": lambda w: w.data.add_(1),
    "a part, transposed": lambda w: w.data.t()[1:3].sub_(1),
    "one of several views": lambda w: w.detach().split(5)[1].zero_(),
    "a flat view": lambda w: w.view(-1)[7:90].neg_(),
    "rows by number": lambda w: w.index_add_(0, torch.tensor([1, 4]), torch.ones(2, w.shape[1])),
    "data, replaced": lambda w: setattr(w, "data", torch.ones(w.shape)),
    "inference mode": lambda w: torch.inference_mode()(lambda: w.reshape(-1)[:9].mul_(3))(),
}


@torch.no_grad()
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
@pytest.mark.parametrize("outputs", [32, 20])
def test_writes_arrive(write, outputs):
    plain = nn.Linear(24, outputs)
    layer, x = accelerate(copy.deepcopy(plain), packed="only"), torch.randn(2, 24)
    before = layer(x)
    write(layer.weight)
    write(plain.weight)
    assert torch.equal(layer.weight, plain.weight)
    assert torch.equal(layer(x), accelerate(plain)(x)) and not torch.equal(layer(x), before)


@torch.no_grad()
def test_what_would_leave_the_packs_is_refused():
    weight = accelerate(nn.Linear(8, 8), packed="only").weight
    before = weight.clone()
    for change in (lambda w: w.set_(torch.ones(8, 8)), lambda w: w.t_(), lambda w: w.resize_(4, 4)):
        with pytest.raises(NotImplementedError, match=r"^aten.*call specdiff.restore\(model\)"):
            change(weight.detach())
    assert torch.equal(weight, before)


@torch.no_grad()
def test_a_weight_that_something_else_uses_stays():
    class Other(nn.Module):
        def __init__(self, weight):
            super().__init__()
            self.weight = weight

    shared, alone = nn.Linear(8, 8), nn.Linear(8, 8)
    model = nn.Sequential(shared, alone)
    model.other = Other(shared.weight)
    accelerate(model, packed="only")
    assert type(shared.weight) is nn.Parameter and model.other.weight is shared.weight
    assert type(alone.weight) is OnlyPacked


def test_tied_embeddings_stay_tied_and_are_looked_up():
    model = only(tiny_model("llama", tie_word_embeddings=True))
    embedding = model.get_input_embeddings()
    plain = tiny_model("llama", tie_word_embeddings=True).get_input_embeddings()
    assert torch.equal(embedding(TOKENS), plain(TOKENS))
    with pytest.raises(IndexError):
        embedding(torch.tensor([50]))
    for each in (model, copy.deepcopy(model), saved_and_loaded(model), restore(model)):
        assert each.lm_head.weight is each.model.embed_tokens.weight


@pytest.mark.parametrize("name", ["itself", "eagle", "block-diffusion"])
def test_drafters_read_true_values(name):
    texts = []
    for packed in (True, "only"):
        model = accelerate(tiny_model("llama", tie_word_embeddings=True), packed=packed)
        target = Target(model)
        decoder = Decoder(target, DRAFTERS[name](target), 3)
        texts.append(decoder.generate([[1, 2, 3], [4, 5]], max_new_tokens=12).new_tokens)
    assert texts[0] == texts[1]


@torch.no_grad()
def test_compiled_as_well():
    layer, x = accelerate(nn.Linear(8, 40), packed="only"), torch.randn(2, 3, 8)
    compiled = torch.compile(layer, backend="eager", fullgraph=True)
    before = layer(x)
    assert torch.equal(compiled(x), before)
    layer.weight.neg_()
    assert torch.equal(compiled(x), layer(x)) and not torch.equal(layer(x), before)


def test_arguments():
    layer = nn.Linear(8, 4)
    with pytest.raises(ValueError, match=r"^packed: expected True, False or 'only', got 'Only'"):
        accelerate(layer, packed="Only")
    with pytest.raises(ValueError, match=r"^bf16: .* leave packed=True"):
        accelerate(layer, packed="only", bf16=True)


def test_data_of_another_shape_or_dtype_takes_the_place():
    layer, x = accelerate(nn.Linear(8, 8, bias=False), packed="only"), torch.randn(2, 8)
    expected = nn.functional.linear(x, layer.weight[:2].clone())
    layer.weight.data = layer.weight.data[:2]
    assert torch.allclose(layer(x), expected)
    layer.weight.data = torch.ones(3, 8)
    assert torch.allclose(layer(x), x.sum(1, keepdim=True).expand(2, 3))
    layer = accelerate(nn.Linear(8, 8), packed="only")
    watcher = weakref.ref(layer.weight)
    with pytest.raises(RuntimeError, match=r"^data: .*call specdiff.restore\(model\) first"):
        layer.double()
    assert watcher() is layer.weight and type(layer.weight) is OnlyPacked
