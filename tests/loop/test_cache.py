"""RowCache and Target: a cache that was rolled back row by row equals a fresh prefill.

Tolerance: twice the difference between two exact ways to compute the same states in plain torch.
"""

from __future__ import annotations

import copy
import sys

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    T5Config,
    T5ForConditionalGeneration,
)

from specdiff import Target
from specdiff.loop import attention
from specdiff.loop.target import cache_argument
from specdiff_kernels import commit
from tests.tiny import ALIKE, FAMILIES, tiny_model


@pytest.fixture(scope="module", params=[*FAMILIES, *ALIKE])
def model(request):
    return tiny_model(request.param)


@pytest.fixture(scope="module")
def target(model):
    return Target(model)


@torch.inference_mode()
def fresh(model, tokens: list[int]):
    """Logits [N, V] and per layer keys and values [H, N, D], by transformers alone."""
    cache = DynamicCache()
    output = model(torch.tensor([tokens]), **{cache_argument(model): cache}, use_cache=True)
    layers = cache.layers
    return output.logits[0], [(layer.keys[0], layer.values[0]) for layer in layers]


@torch.inference_mode()
def token_by_token(model, tokens: list[int]):
    """The same, one token at a time: how much the order of float sums alone may change."""
    cache, logits = DynamicCache(), []  # which keeps what is outside of a window
    for token in tokens:
        output = model(torch.tensor([[token]]), **{cache_argument(model): cache}, use_cache=True)
        logits.append(output.logits[0])
    return torch.cat(logits), [(layer.keys[0], layer.values[0]) for layer in cache.layers]


def distance(a, b) -> float:
    (logits_a, layers_a), (logits_b, layers_b) = a, b
    pairs = [(logits_a, logits_b)]
    pairs += [
        xy for la, lb in zip(layers_a, layers_b, strict=True) for xy in zip(la, lb, strict=True)
    ]
    return max((x - y).abs().max().item() for x, y in pairs)


@torch.inference_mode()
def ragged_rounds(target: Target, batch: int, seed: int, capacity: int = 60, **options):
    """Random accept and reject rounds. -> cache, tokens of each row, last logits of each row.

    options: of `Target.new_cache`
    """
    generator = torch.Generator().manual_seed(seed)
    draw = lambda high, *shape: torch.randint(high, shape, generator=generator)
    V = target.vocab_size
    rows = [draw(V, 1 + int(draw(9, 1))).tolist() for _ in range(batch)]
    width = max(map(len, rows))
    padded = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    cache = target.new_cache(batch, capacity, **options)
    target.prefill(padded, torch.tensor([len(row) - 1 for row in rows]), cache)
    last = [row.pop() for row in rows]
    logits = [torch.empty(0, V) for _ in rows]
    for _ in range(9):
        k = int(draw(6, 1))
        drafted = draw(V, batch, k)
        round_logits, _ = target.forward(
            torch.cat([torch.tensor(last)[:, None], drafted], 1), cache
        )
        for b, row in enumerate(rows):
            stays = min(1 + int(draw(k + 1, 1)), capacity - len(row))
            row += [last[b], *drafted[b].tolist()][:stays]
            logits[b] = round_logits[b, :stays]
            last[b] = int(draw(V, 1))
        lengths = torch.tensor([len(row) for row in rows])
        if cache.pages is not None:
            commit(lengths, torch.full((batch, 1), -1), pages=cache.pages)
        cache.set_lengths(lengths, int(lengths.max()))
    return cache, rows, logits


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("seed", range(3))
def test_cache_after_rounds_equals_fresh_prefill(model, target, batch, seed):
    cache, rows, logits = ragged_rounds(target, batch, seed)
    assert cache.lengths.tolist() == [len(row) for row in rows]
    assert batch == 1 or len({len(row) for row in rows}) > 1
    for b, row in enumerate(rows):
        want_logits, want_layers = want = fresh(model, row)
        noise = distance(want, token_by_token(model, row))
        got_layers = [(x.keys[b, :, : len(row)], x.values[b, :, : len(row)]) for x in cache.layers]
        tail = len(logits[b])
        got, want = (logits[b], got_layers), (want_logits[-tail:], want_layers)
        assert 0 < noise < 1e-4
        assert distance(got, want) <= 2 * noise


@pytest.fixture(params=["sdpa", "eager", "flex", "flash"])
def attending(request, flash_attn):
    """Makes targets with an attention; flash-attn, which needs a GPU, is replaced by its words."""
    return lambda family: Target(tiny_model(family), attention=request.param)


@pytest.mark.parametrize("family", [f for f in (*FAMILIES, *ALIKE) if f != "gpt_neo"])
@pytest.mark.parametrize("block_size", [None, 3])
@pytest.mark.filterwarnings("ignore:flex_attention called without")
def test_every_attention_and_cache_equals_fresh_prefill(attending, family, block_size):
    target = attending(family)
    kind = {"block_size": block_size, "blocks": 70} if block_size else {}
    cache, rows, logits = ragged_rounds(target, 3, 7, capacity=66, **kind)
    model = tiny_model(family)  # untouched
    for b, row in enumerate(rows):
        want = fresh(model, row)
        noise = distance(want, token_by_token(model, row))
        tail = len(logits[b])
        assert (logits[b] - want[0][-tail:]).abs().max() <= 2 * noise
        # and the model by itself is what it was
        alone = target.model(torch.tensor([row])).logits[0]
        assert (alone - want[0]).abs().max() <= 2 * noise
    if block_size:
        held = (cache.pages.tables >= 0).sum(1).tolist()
        assert held == [-(-len(row) // 3) for row in rows]
        assert int(cache.pages.available) == 70 - sum(held)


def test_gpt_neo_reads_a_paged_cache(model):
    target = Target(tiny_model("gpt_neo"))
    paged, dense = (ragged_rounds(target, 3, 7, **kind)[2] for kind in ({"block_size": 4}, {}))
    for a, b in zip(paged, dense, strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_attention_is_chosen_by_device_dtype_and_what_is_installed(flash_attn, monkeypatch):
    model = tiny_model("llama", head_dim=16)
    assert attention.choose(model) == "sdpa"
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    assert attention.choose(model) == "flex"  # fp32
    assert attention.choose(tiny_model("llama")) == "sdpa"  # heads of 8
    monkeypatch.setattr(type(model), "dtype", torch.bfloat16)
    assert attention.choose(model) == "flash"
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # as if it were not installed
    assert attention.choose(model) == "flex"
    model.config._attn_implementation = "eager"
    assert attention.choose(model) == "eager"


def test_a_pool_that_is_too_small_says_so(target):
    with pytest.raises(ValueError, match="blocks=3 needs a block_size"):
        target.new_cache(2, 32, blocks=3)
    cache = target.new_cache(2, 32, block_size=4, blocks=3)
    with pytest.raises(RuntimeError, match="pool of 3 blocks was 1 blocks too small"):
        target.prefill(torch.ones(2, 8, dtype=torch.int64), torch.tensor([8, 8]), cache)


@pytest.mark.parametrize("kind", [{}, {"block_size": 4}])
def test_a_part_of_a_cache_shares_its_memory(model, target, kind):
    """Rows 1 and 2 are read by themselves, then all rows are decoded together."""
    tokens = torch.arange(24).view(3, 8)
    cache = target.new_cache(3, 20, **kind)
    with torch.inference_mode():
        for rows in (slice(1, 3), slice(0, 1)):
            part = cache.part(rows)
            target.prefill(tokens[rows], torch.full((len(tokens[rows]),), 8), part)
        cache.set_lengths(torch.full((3,), 8), 8)
        got, _ = target.forward(torch.full((3, 2), 40), cache)
    for b, row in enumerate(tokens.tolist()):
        row = [*row, 40, 40]
        want = fresh(model, row)
        noise = distance(want, token_by_token(model, row))
        assert (got[b] - want[0][-2:]).abs().max() <= 2 * noise


def test_one_stale_entry_would_be_seen(model, target):
    """The comparison above has teeth: a rollback that is one short is far beyond the tolerance."""
    tokens = torch.arange(12)[None]
    row = [*range(8), 40, 41]
    want = fresh(model, row)[0][-2:]
    noise = distance(fresh(model, row), token_by_token(model, row))
    errors = []
    with torch.inference_mode():
        for kept in (8, 9):
            cache = target.new_cache(1, 20)
            target.prefill(tokens, torch.tensor([12]), cache)
            cache.set_lengths(torch.tensor([kept]), kept)
            logits, _ = target.forward(torch.tensor([[40, 41]]), cache)
            errors.append((logits[0] - want).abs().max().item())
    assert errors[0] <= 2 * noise < 100 * noise < errors[1]


def test_update_is_in_place_and_returns_views(target):
    cache = target.new_cache(2, 32)
    with torch.inference_mode():
        target.prefill(torch.ones(2, 5, dtype=torch.int64), torch.tensor([5, 3]), cache)
        before = [layer.keys.data_ptr() for layer in cache.layers]
        target.forward(torch.ones(2, 4, dtype=torch.int64), cache)
        layer = cache.layers[0]
        states = torch.zeros(2, *layer.keys.shape[1:2], 4, layer.keys.shape[-1])
        keys, values = cache.update(states, states, 0)
    assert [layer.keys.data_ptr() for layer in cache.layers] == before
    assert keys.data_ptr() == layer.keys.data_ptr() and keys.shape[2] == 9
    assert values.data_ptr() == layer.values.data_ptr()


def test_chunked_prefill_equals_one_forward(model):
    target = Target(model)
    target.prefill_chunk = 7
    tokens = torch.arange(40).view(2, 20)
    counts = torch.tensor([20, 11])
    cache = target.new_cache(2, 30)
    told = [None] * 21

    def heard(start, states):
        for i in range(states.shape[1]):
            told[start + i] = states[:, i]

    with torch.inference_mode():
        target.prefill(tokens, counts, cache, heard=heard)
        logits = target.head(torch.stack(told, 1))
    assert cache.lengths.tolist() == [20, 11]
    assert not told[0].any()
    for b, count in enumerate(counts.tolist()):
        row = tokens[b, :count].tolist()
        want_logits, want_layers = want = fresh(model, row)
        noise = distance(want, token_by_token(model, row))
        got = [(x.keys[b, :, :count], x.values[b, :, :count]) for x in cache.layers]
        assert distance((logits[b, 1 : count + 1], got), (want_logits, want_layers)) <= 2 * noise


def test_hidden_is_the_input_of_the_lm_head(model, target):
    tokens = torch.arange(12)[None]
    with torch.inference_mode():
        logits, hidden = target.forward(tokens, target.new_cache(1, 16))
        want = model(tokens).logits
        assert torch.equal(target.head(hidden), logits)
    noise = distance(fresh(model, tokens[0].tolist()), token_by_token(model, tokens[0].tolist()))
    assert (logits - want).abs().max() <= 2 * noise


def test_padding_beyond_the_context_disturbs_no_row(target):
    """The shorter row is padded past the position table and the cache; the other is not changed."""
    limit = target.context_limit
    long, short = torch.arange(limit - 1) % 50, torch.arange(4)
    padded = torch.stack([long, torch.nn.functional.pad(short, (0, limit - 5))])
    query = torch.tensor([[7, 8, 9], [7, 8, 9]])
    with torch.inference_mode():
        cache = target.new_cache(2, limit)
        target.prefill(padded, torch.tensor([limit - 1, 4]), cache)
        got, _ = target.forward(query, cache)
        for row, real, b in ((long, 1, 0), (short, 3, 1)):
            alone = target.new_cache(1, limit)
            target.prefill(row[None], torch.tensor([len(row)]), alone)
            want, _ = target.forward(query[:1, :real], alone)
            torch.testing.assert_close(got[b, :real], want[0], atol=1e-4, rtol=1e-4)


def test_eager_and_sdpa_agree():
    for family in ("gpt2", "llama", *ALIKE):
        model = tiny_model(family)
        sdpa = Target(model)
        eager_model = copy.deepcopy(model)
        eager_model.set_attn_implementation("eager")
        eager = Target(eager_model)
        assert sdpa.boolean_mask and not eager.boolean_mask
        got = [ragged_rounds(t, 3, 5)[2] for t in (sdpa, eager)]
        for a, b in zip(*got, strict=True):
            torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-4)


def test_gpt_neo_still_works_by_itself():
    untouched, taken = tiny_model("gpt_neo"), tiny_model("gpt_neo")
    tokens = torch.arange(30).view(2, 15)
    mask = torch.ones_like(tokens)
    mask[1, :4] = 0
    before = untouched(tokens, attention_mask=mask).logits
    Target(taken)
    Target(taken)  # twice is once
    assert torch.equal(taken(tokens, attention_mask=mask).logits, before)


@pytest.mark.parametrize("family", ["gpt_neo", "mistral", "qwen2"])
def test_a_window_is_obeyed(family):
    """A token beyond both layers' reach through the window matters only by a layer without one."""
    model = tiny_model(family, **({"max_window_layers": 0} if family == "qwen2" else {}))
    for block in model.transformer.h if family == "gpt_neo" else ():
        block.attn.attention.attention_type = "local"
    target = Target(model)
    tokens = torch.arange(30)[None]
    changed = tokens.clone()
    changed[0, 0] = 49
    with torch.inference_mode():
        a, b = (target.forward(t, target.new_cache(1, 30))[0][0] for t in (tokens, changed))
    reach = 2 * (5 - 1)  # two layers of a window of 5
    assert not torch.equal(a[reach], b[reach])
    assert torch.equal(a[reach + 1 :], b[reach + 1 :])


TINY = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, vocab_size=20)
HEADS = dict(num_attention_heads=2, num_key_value_heads=2)


@pytest.mark.parametrize(
    "build, message",
    [
        (lambda: MambaForCausalLM(MambaConfig(**TINY, state_size=4)), "recurrent state"),
        (
            lambda: T5ForConditionalGeneration(
                T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2)
            ),
            "encoder-decoder",
        ),
        (
            lambda: LlamaForCausalLM(
                LlamaConfig(
                    **TINY,
                    **HEADS,
                    rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
                )
            ),
            "batch mates",
        ),
    ],
)
def test_unsupported_models_say_why(build, message):
    with pytest.raises(ValueError, match=message):
        Target(build())


def test_attention_without_masks_is_refused():
    model = tiny_model("llama")
    model.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ValueError, match="attn_implementation='sdpa'"):
        Target(model)
    with pytest.raises(
        ValueError, match="attention must be one of flash, flex, cached, sdpa, eager"
    ):
        Target(tiny_model("llama"), attention="fast")
    with pytest.raises(ValueError, match="gpt_neo has no attention interface"):
        Target(tiny_model("gpt_neo"), attention="flex")
    with pytest.raises(ValueError, match="pip install flash-attn"):
        Target(tiny_model("llama"), attention="flash")


def test_stop_tokens_come_from_the_model():
    model = tiny_model("llama")
    assert Target(model).stop_tokens == ()
    model.config.eos_token_id = 3
    assert Target(model).stop_tokens == (3,)
    model.generation_config.eos_token_id = [4, 5]
    assert Target(model).stop_tokens == (4, 5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_runs(dtype):
    for family in (*FAMILIES, *ALIKE):
        target = Target(tiny_model(family, dtype=dtype))
        cache, rows, logits = ragged_rounds(target, 3, 1)
        assert logits[0].dtype == dtype and all(x.isfinite().all() for x in logits)
        assert cache.layers[0].keys.dtype == dtype and len(rows) == 3
