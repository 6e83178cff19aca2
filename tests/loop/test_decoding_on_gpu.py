"""The loop on a GPU: captured rounds, kinds of attention, and how long the device waits."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specdiff import Decoder, Sampling, Target
from specdiff.drafters import Autoregressive, ParallelDrafter
from specdiff.loop import attention
from tests.tiny import tiny_model, tiny_network

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 1, 2, 4, 5], [3]]


def targets(family: str, dtype: torch.dtype, **options) -> tuple[Target, Autoregressive]:
    wide = {} if family == "gpt2" else {"head_dim": 16}  # FlexAttention's least
    make = lambda seed: tiny_model(family, seed=seed, context=512, dtype=dtype, **wide).cuda()
    return Target(make(0), **options), Autoregressive(Target(make(1), attention="sdpa"))


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9)])
@pytest.mark.parametrize("block_size", [None, 16])
def test_captured_rounds_give_the_text_of_uncaptured_ones(family, sampling, block_size):
    """Over more keys than one graph reads."""
    target, drafter = targets(family, torch.float32, attention="sdpa")
    options = dict(max_new_tokens=400, sampling=sampling, seed=2, block_size=block_size)
    want = Decoder(target, drafter, 4).generate(PROMPTS, look_every=1, **options)
    got = Decoder(target, drafter, 4).generate(PROMPTS, capture=True, **options)
    assert got.new_tokens == want.new_tokens
    assert got.stats.accepted_at == want.stats.accepted_at


@pytest.mark.parametrize("family", ["llama", "gpt2"])
@pytest.mark.parametrize("block_size", [None, 16])
def test_captured_rounds_record_states_of_layers_and_run_the_head(family, block_size):
    target, _ = targets(family, torch.float32, attention="sdpa")
    layers = {"target_layers": (1, 2), "target_layer_count": 2}
    network = tiny_network("parallel", torch.arange(50), head_rank=5, **layers)
    drafter = ParallelDrafter(network, target)
    options = dict(max_new_tokens=300, sampling=Sampling(0.9), seed=2, block_size=block_size)
    want = Decoder(target, drafter, 4).generate(PROMPTS, look_every=1, **options)
    got = Decoder(target, drafter, 4).generate(PROMPTS, capture=True, **options)
    assert got.new_tokens == want.new_tokens
    assert got.stats.accepted_at == want.stats.accepted_at


@pytest.mark.parametrize("name", ["flash", "flex"])
@pytest.mark.parametrize("block_size", [None, 256])
def test_every_attention_decodes(name, block_size):
    """Greedily in fp32 to the same text; flash-attn knows half precision alone, so near logits."""
    if name == "flash":
        pytest.importorskip("flash_attn", reason="flash-attn is not installed")
    dtype = torch.float32 if name == "flex" else torch.bfloat16
    (plain, drafter), (other, _) = (targets("llama", dtype, attention=n) for n in ("sdpa", name))
    assert other.attention == name and attention.choose(other.model) == name
    options = dict(max_new_tokens=60, block_size=block_size)
    want, got = (Decoder(t, drafter, 4).generate(PROMPTS, **options) for t in (plain, other))
    if dtype == torch.float32:
        assert got.new_tokens == want.new_tokens
    tokens = torch.tensor([want.sequences[1]], device="cuda")
    caches = [t.new_cache(1, 128, block_size=block_size) for t in (plain, other)]
    with torch.inference_mode():
        a, b = (t.forward(tokens, c)[0] for t, c in zip((plain, other), caches, strict=True))
    torch.testing.assert_close(a, b)


def test_the_device_hardly_waits_for_the_host():
    """Kernels fill 95% of the time of captured rounds."""
    sizes = dict(hidden_size=2048, intermediate_size=5632, num_hidden_layers=16)
    heads = dict(num_attention_heads=16, num_key_value_heads=4)
    config = LlamaConfig(vocab_size=32000, max_position_embeddings=2048, **sizes, **heads)
    target = Target(LlamaForCausalLM(config).to("cuda", torch.bfloat16), attention="sdpa")
    session = Decoder(target).open(4, 1024, capture=True, stop_tokens=())
    session.admit([[1, 2, 3, 4]] * 4, max_new_tokens=1000)
    for _ in range(3):
        session.step()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as watched:
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(10):
            session.step()
        end.record()
        torch.cuda.synchronize()
    busy = sum(event.self_device_time_total for event in watched.key_averages())
    assert busy > 0.95 * 1e3 * start.elapsed_time(end)
