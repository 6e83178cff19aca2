"""On a CPU with accelerated layers a token's logits are the same bits however it was read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specdiff import Decoder, Sampling, Target, accelerate
from specdiff.loop import decoder_layers
from specdiff.loop.memory import Store, huge_share
from specdiff_kernels import use_backend
from specdiff_kernels.reference import decoder_layer as reference
from tests.tiny import ALIKE, DRAFTERS, FAMILIES, PROMPTS, tiny_model

EVERY = (*FAMILIES, *ALIKE)
CACHES = ({}, {"block_size": 1}, {"block_size": 5}, {"block_size": 16})
LENGTH = 48


@pytest.fixture(params=EVERY)
def family(request):
    return request.param


@torch.inference_mode()
def alone(target, texts):
    """Logits of each token of texts [B, N], one token in a forward."""
    rows = []
    for text in texts:
        cache, row = target.new_cache(1, LENGTH), []
        for n, token in enumerate(text):
            row.append(target.forward(token.view(1, 1), cache)[0][0, 0])
            cache.set_lengths(torch.tensor([n + 1]), n + 1)
        rows.append(torch.stack(row))
    return torch.stack(rows)


@torch.inference_mode()
def dependences(target, texts, seed, **kind):
    """Tokens whose logits differ from those that they get alone, when the texts are read in rounds:
    a prompt, then drafts of random lengths, of which random parts are rejected."""
    random = torch.Generator().manual_seed(seed)
    draw = lambda high, size=(): torch.randint(high, size, generator=random)
    B, N = texts.shape
    expected, wrong = alone(target, texts), []
    cache = target.new_cache(B, N, **kind)
    counts = 1 + draw(N // 3, (B,))
    target.prefill(texts, counts, cache)
    while (counts < N).any():
        Q = 1 + int(draw(9))
        drafts = draw(50, (B, Q))  # wrong from `right` on
        right = torch.minimum(1 + draw(Q, (B,)), N - counts)
        for b in range(B):
            drafts[b, : right[b]] = texts[b, counts[b] : counts[b] + right[b]]
        logits = target.forward(drafts, cache)[0]
        for b in range(B):
            for i in range(int(right[b])):
                if not torch.equal(logits[b, i], expected[b, counts[b] + i]):
                    wrong.append((b, int(counts[b]) + i))
        counts = counts + right
        cache.set_lengths(counts, int(counts.max()))
    return wrong


@pytest.mark.parametrize("kind", CACHES, ids=str)
@pytest.mark.parametrize("how", [{}, {"bf16": True}, {"packed": False}], ids=str)
def test_after_any_rounds(family, kind, how):
    target = Target(accelerate(tiny_model(family), **how))
    texts = torch.randint(50, (3, LENGTH), generator=torch.Generator().manual_seed(1))
    assert target.inconsistency is None
    assert not dependences(target, texts, 2, **kind)


@torch.inference_mode()
def test_a_prompt_of_any_length(family):
    """Chunks of prompts, longer than blocks and spans of attention."""
    target = Target(accelerate(tiny_model(family, context=400)))
    text = torch.randint(50, (1, 300), generator=torch.Generator().manual_seed(1))
    whole = target.forward(text, target.new_cache(1, 300))[0]
    for chunk in (1, 7, 64, 299):
        cache, parts = target.new_cache(1, 300, block_size=16), []
        for start in range(0, 300, chunk):
            part = text[:, start : start + chunk]
            parts.append(target.forward(part, cache)[0])
            length = start + part.shape[1]
            cache.set_lengths(torch.tensor([length]), length)
        assert torch.equal(torch.cat(parts, 1), whole), chunk


@torch.inference_mode()
def test_through_transformers_own_cache(family):
    """Its forward with padding on the left: the logits of a target's."""
    model = accelerate(tiny_model(family))
    text = torch.randint(50, (1, 20), generator=torch.Generator().manual_seed(1))
    target = Target(model)
    expected = target.forward(text, target.new_cache(1, 20))[0]
    assert torch.equal(model(text).logits, expected)
    first = model(text[:, :9], use_cache=True)
    name = "past_key_values" if hasattr(first, "past_key_values") else "cache"
    second = model(text[:, 9:], **{name: getattr(first, name)})
    assert torch.equal(torch.cat((first.logits, second.logits), 1), expected)
    padded = torch.cat((torch.zeros(1, 4, dtype=torch.int64), text), 1)
    mask = torch.ones(1, 24, dtype=torch.int64)
    mask[:, :4] = 0
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    got = model(padded, attention_mask=mask, position_ids=positions).logits[:, 4:]
    if family == "gpt_neo":  # its own attention needs other masks, and is torch's
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)
    else:
        assert torch.equal(got, expected)


@pytest.mark.parametrize("more", [{}, {"cache_implementation": "static"}], ids=str)
def test_generate_of_transformers(family, more, monkeypatch):
    """Its text in a batch with padding, with every layer native but for GPT-Neo's."""
    if family == "gpt_neo" and more:
        pytest.skip("GPT-Neo's own attention takes no static cache")
    left = []
    native = decoder_layers.native

    def counted(*given):
        out = native(*given)
        left.append(out is None)
        return out

    monkeypatch.setattr(decoder_layers, "native", counted)
    model = tiny_model(family)
    tokens = torch.tensor([[3, 1, 4, 1, 5], [0, 0, 2, 6, 5]])
    more = {"attention_mask": (tokens > 0).long(), "max_new_tokens": 20, "pad_token_id": 0, **more}
    expected = model.generate(tokens, do_sample=False, **more)
    assert torch.equal(accelerate(model).generate(tokens, do_sample=False, **more), expected)
    assert left and (family == "gpt_neo" or not any(left))


def split_by_tokens(x, of):
    """A linear layer whose sums are cut into as many parts as there are tokens."""
    packs, N = of.weight
    weight = packs.transpose(1, 2).reshape(-1, packs.shape[1])[:N]
    parts = zip(x.chunk(x.shape[1], -1), weight.chunk(x.shape[1], -1), strict=True)
    y = sum(a @ b.T for a, b in parts)
    return y if of.bias is None else y + of.bias


def test_a_sum_split_by_the_number_of_tokens_is_found(family, monkeypatch):
    target = Target(accelerate(tiny_model(family)))
    texts = torch.randint(50, (2, 16), generator=torch.Generator().manual_seed(1))
    with use_backend("reference"):
        assert not dependences(target, texts, 2)
        monkeypatch.setattr(reference, "linear", split_by_tokens)
        assert dependences(target, texts, 2)


@pytest.mark.parametrize("drafter", ["itself", "parallel", "block-diffusion", "prompt-lookup"])
@pytest.mark.parametrize("kind", [{}, {"block_size": 4}], ids=str)
def test_texts_are_those_of_plain_decoding(family, drafter, kind):
    """Greedy, and coupled at temperature 1, in a batch and alone."""
    target, seeds = Target(accelerate(tiny_model(family))), [7, 8, 9]
    for temperature, rule in ((0.0, "token"), (1.0, "coupled")):
        settings = {"max_new_tokens": 30, "sampling": Sampling(temperature), "stop_tokens": ()}
        plain = Decoder(target, rule=rule)
        rows = zip(PROMPTS, seeds, strict=True)
        expected = [plain.generate([p], seed=[s], **settings).new_tokens[0] for p, s in rows]
        decoder = Decoder(target, DRAFTERS[drafter](target), k=4, rule=rule)
        assert decoder.generate(PROMPTS, seed=seeds, **settings, **kind).new_tokens == expected
        alone = decoder.replace(k=2).generate([PROMPTS[1]], seed=[8], **settings, **kind)
        assert alone.new_tokens == expected[1:2]


def test_what_is_left_to_torch_is_named(family):
    model = tiny_model(family)
    target = Target(model)
    assert target.inconsistency == "layer 0 is torch's: it is not accelerated"
    accelerate(model)
    assert target.inconsistency is None
    layers = target.recorder.layers
    part = next(m for m in layers[1].modules() if isinstance(m, torch.nn.LayerNorm) or "Norm" in
                type(m).__name__)  # fmt: skip
    hook = part.register_forward_hook(lambda *given: None)
    assert target.inconsistency == "layer 1 is torch's: a module in it has hooks"
    hook.remove()
    assert target.inconsistency is None
    part.forward = torch.nn.Identity()
    assert target.inconsistency == "layer 1 is torch's: the forward of a module in it was replaced"


@torch.inference_mode()
def test_hooks_inside_a_layer_are_called(family):
    """A layer that somebody looks into goes module by module, off by a rounding."""
    model = accelerate(tiny_model(family))
    tokens = torch.tensor([[3, 1, 4, 1, 5]])
    before = model(tokens).logits
    heard = []
    target = Target(model)
    mlp = target.recorder.layers[0].mlp
    hook = mlp.register_forward_hook(lambda *given: heard.append(given))
    assert (model(tokens).logits - before).abs().max() < 1e-4
    assert len(heard) == 1
    hook.remove()
    assert torch.equal(model(tokens).logits, before) and len(heard) == 1


@torch.inference_mode()
def test_every_layer_of_a_target_is_native(family, monkeypatch):
    calls = []
    native = decoder_layers.decoder_layer
    monkeypatch.setattr(
        decoder_layers, "decoder_layer", lambda *given: calls.append(given) or native(*given)
    )
    target = Target(accelerate(tiny_model(family)))
    target.forward(torch.tensor([[3, 1, 4]]), target.new_cache(1, 8))
    assert len(calls) == 2


def test_huge_pages_are_granted_where_the_system_has_them():
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this system grants no huge pages")
    piece = Store().take((8 << 20,), torch.float32).zero_()
    assert huge_share(piece) > 0.5
    assert huge_share(torch.zeros(1000)) == 0
