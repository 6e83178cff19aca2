"""DDiT against a naive one, its table of modulations, padding, and public checkpoints' files."""

from __future__ import annotations

import json
import math
import sys
from itertools import pairwise
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from specdiff.drafters import ddit
from specdiff.drafters.ddit import DDiT, DDiTConfig, Modulation
from specdiff.drafters.noise import Geometric, LogLinear

TINY = {"tokens": 11, "hidden_size": 24, "blocks": 3, "heads": 3, "cond_dim": 10, "length": 16}
SIGMAS = [0.0, 0.03, 1.7, 6.9]


def tiny(dtype: torch.dtype = torch.float64, **changes) -> DDiT:
    """Every parameter is random and of weight, so that every input matters to the output."""
    network = DDiT(DDiTConfig(**{**TINY, **changes})).to(dtype).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in network.parameters():
        parameter.normal_(std=0.4, generator=generator)
    return network


def some_tokens(*shape: int) -> Tensor:
    tokens = torch.randint(TINY["tokens"], shape, generator=torch.Generator().manual_seed(2))
    tokens[..., ::3] = TINY["tokens"]  # the mask
    return tokens


def logits(network: DDiT, tokens: Tensor, sigma: float, mask: Tensor | None = None) -> Tensor:
    return network.head(network(tokens, network.modulations([sigma])[0], mask))


def naive(state: dict[str, Tensor], heads: int, tokens: list[int], sigma: float) -> Tensor:
    """l [N, V + 1] of one text, straight from the definition; scale and shift come unfolded."""

    def linear(name: str, x: Tensor) -> Tensor:
        return x @ state[f"{name}.weight"].T + state.get(f"{name}.bias", 0)

    def silu(x: Tensor) -> Tensor:
        return x / (1 + (-x).exp())

    def gelu(x: Tensor) -> Tensor:
        return x / 2 * (1 + ((2 / math.pi) ** 0.5 * (x + 0.044715 * x**3)).tanh())

    def ada_norm(name: str, x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return centred / deviation * state[f"{name}.weight"] * (1 + scale) + shift

    def rotated(x: Tensor) -> Tensor:
        half = x.shape[1] // 2
        turns = torch.arange(len(x))[:, None] * 10000.0 ** (-torch.arange(half).double() / half)
        unit = torch.complex(turns.cos().float().double(), turns.sin().float().double())
        product = torch.complex(x[:, :half], x[:, half:]) * unit
        return torch.cat((product.real, product.imag), 1)

    waves = [sigma / 10000 ** (i / 128) for i in range(128)]
    features = [math.cos(wave) for wave in waves] + [math.sin(wave) for wave in waves]
    condition = linear("sigma_map.mlp.0", torch.tensor(features, dtype=torch.float64))
    condition = silu(linear("sigma_map.mlp.2", silu(condition)))
    x = torch.stack([state["vocab_embed.embedding"][token] for token in tokens])
    d = x.shape[1]
    D = d // heads
    for index in range(sum(name.endswith("attn_out.weight") for name in state)):
        block = f"blocks.{index}"
        adaptive = linear(f"{block}.adaLN_modulation", condition).view(6, d)
        shift1, scale1, gate1, shift2, scale2, gate2 = adaptive
        qkv = linear(f"{block}.attn_qkv", ada_norm(f"{block}.norm1", x, shift1, scale1))
        mixed = []
        for head in range(heads):
            q, k, v = (qkv[:, part * d + head * D : part * d + (head + 1) * D] for part in range(3))
            scores = rotated(q) @ rotated(k).T / D**0.5
            weights = (scores - scores.amax(1, keepdim=True)).exp()
            mixed.append(weights / weights.sum(1, keepdim=True) @ v)
        x = x + gate1 * linear(f"{block}.attn_out", torch.cat(mixed, 1))
        inner = gelu(linear(f"{block}.mlp.0", ada_norm(f"{block}.norm2", x, shift2, scale2)))
        x = x + gate2 * linear(f"{block}.mlp.2", inner)
    shift, scale = linear("output_layer.adaLN_modulation", condition).view(2, d)
    return linear("output_layer.linear", ada_norm("output_layer.norm_final", x, shift, scale))


def public_shapes(tokens: int, d: int, blocks: int, cond: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the public checkpoints, but for rotary_emb.inv_freq."""

    def linear(name: str, out: int, into: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.weight": (out, into), f"{name}.bias": (out,)}

    shapes = {"vocab_embed.embedding": (tokens + 1, d)}
    shapes |= linear("sigma_map.mlp.0", cond, 256) | linear("sigma_map.mlp.2", cond, cond)
    for index in range(blocks):
        block = f"blocks.{index}"
        shapes |= {f"{block}.norm1.weight": (d,), f"{block}.norm2.weight": (d,)}
        shapes |= {f"{block}.attn_qkv.weight": (3 * d, d), f"{block}.attn_out.weight": (d, d)}
        shapes |= linear(f"{block}.mlp.0", 4 * d, d) | linear(f"{block}.mlp.2", d, 4 * d)
        shapes |= linear(f"{block}.adaLN_modulation", 6 * d, cond)
    shapes |= {"output_layer.norm_final.weight": (d,)}
    shapes |= linear("output_layer.linear", tokens + 1, d)
    return shapes | linear("output_layer.adaLN_modulation", 2 * d, cond)


@pytest.mark.parametrize(
    ("config", "parameters"),
    [
        (DDiTConfig(), 169_627_218),
        (DDiTConfig(hidden_size=1024, blocks=24, heads=16), 424_477_010),
    ],
    ids=["small", "medium"],
)
def test_state_dict_is_that_of_the_public_checkpoints(config, parameters):
    with torch.device("meta"):
        network = DDiT(config)
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    assert shapes == public_shapes(50257, config.hidden_size, config.blocks, 128)
    assert sum(value.numel() for value in network.parameters()) == parameters


@pytest.mark.parametrize("sigma", SIGMAS)
def test_equals_a_naive_network(sigma):
    network, tokens = tiny(), some_tokens(2, 13)
    have = logits(network, tokens, sigma)
    for row, text in zip(have, tokens.tolist(), strict=True):
        want = naive(network.state_dict(), TINY["heads"], text, sigma)
        torch.testing.assert_close(row, want, rtol=1e-9, atol=1e-9)


def test_random_weights_begin_as_in_the_public_code():
    network = DDiT(DDiTConfig(**TINY))
    zero = {name for name, value in network.named_parameters() if not value.any()}
    starts = ("adaLN_modulation.weight", "adaLN_modulation.bias", "layer.linear.weight")
    want = {name for name in network.state_dict() if name.endswith((*starts, "layer.linear.bias"))}
    assert zero == want and len(zero) == 2 * TINY["blocks"] + 4
    assert all((value == 1).all() for n, value in network.named_parameters() if "norm" in n)


def test_table_equals_each_sigma_alone():
    network, tokens = tiny(), some_tokens(1, 9)
    table = network.modulations(SIGMAS)
    states = [network(tokens, entry) for entry in table]
    for sigma, entry, have in zip(SIGMAS, table, states, strict=True):
        (alone,) = network.modulations([sigma])
        torch.testing.assert_close(entry, alone, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(have, network(tokens, alone), rtol=1e-12, atol=1e-12)
    assert all((a - b).abs().max() > 1e-3 for a, b in pairwise(states))


def test_mdlm_takes_sigma_as_zero():
    timed, untimed, tokens = tiny(), tiny(time_conditioned=False), some_tokens(2, 9)
    table = untimed.modulations(SIGMAS)
    assert len(table) == len(SIGMAS)
    for entry in table:
        have = untimed.head(untimed(tokens, entry))
        torch.testing.assert_close(have, logits(timed, tokens, 0.0), rtol=1e-12, atol=1e-12)


def test_logits_at_some_positions_only():
    network, tokens = tiny(), some_tokens(2, 9)
    assert (network.vocab_size, network.mask_id) == (11, 11)
    masked = tokens == network.mask_id
    states = network(tokens, network.modulations([1.0])[0])
    want = logits(network, tokens, 1.0)[masked]
    torch.testing.assert_close(network.head(states[masked]), want, rtol=1e-12, atol=1e-12)


def test_padding_changes_nothing():
    """Positions are relative, so padding may come from either side."""
    network, tokens = tiny(), some_tokens(4, 14)
    spans = [(0, 14), (0, 9), (3, 14), (5, 6)]
    columns = torch.arange(14)
    mask = torch.stack([(columns >= start) & (columns < end) for start, end in spans])
    batch = logits(network, tokens, 0.5, mask)
    for row, text, (start, end) in zip(batch, tokens, spans, strict=True):
        alone = logits(network, text[None, start:end], 0.5)[0]
        torch.testing.assert_close(row[start:end], alone, rtol=1e-6, atol=1e-6)
    assert batch.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_runs_in_other_dtypes(dtype):
    exact, network, tokens = tiny(), tiny().to(dtype), some_tokens(2, 9)
    have, want = logits(network, tokens, 1.0), logits(exact, tokens, 1.0)
    tolerance = 1e-4 if dtype is torch.float32 else 0.1
    assert have.dtype == dtype
    assert F.cosine_similarity(have.double(), want, -1).min() > 1 - tolerance


def test_built_under_another_default_dtype():
    torch.set_default_dtype(torch.bfloat16)
    try:
        network = DDiT(DDiTConfig(**TINY))
    finally:
        torch.set_default_dtype(torch.float32)
    tokens = some_tokens(1, 9)
    (entry,) = network.modulations([1.0])
    states = network(tokens, entry)
    assert states.dtype == torch.bfloat16
    want = F.layer_norm(network.vocab_embed(tokens), (24,))  # while all gates are zero
    torch.testing.assert_close(states, want, rtol=0.02, atol=0.02)


def test_too_many_columns():
    network = tiny()
    with pytest.raises(ValueError, match=r"at most length = 16 columns, got 17"):
        network(some_tokens(1, 17), network.modulations([0.0])[0])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"hidden_size": 27}, r"hidden_size must be a multiple of 2 \* heads = 6, got 27"),
        ({"blocks": 0}, "blocks must be at least 1, got 0"),
    ],
)
def test_bad_configs(changes, message):
    with pytest.raises(ValueError, match=message):
        DDiTConfig(**{**TINY, **changes})


@pytest.mark.parametrize(
    "changes",
    [{}, {"noise": Geometric(1e-3, 5.0), "time_conditioned": False}, {"noise": LogLinear(0.01)}],
    ids=["sedd", "mdlm", "eps"],
)
def test_save_and_load(tmp_path, changes):
    network = tiny(torch.float32, **changes)
    network.save_pretrained(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    loaded = DDiT.from_pretrained(tmp_path)
    assert loaded.config == network.config
    tokens = some_tokens(2, 16)
    assert torch.equal(logits(loaded, tokens, 0.4), logits(network, tokens, 0.4))
    loaded.output_layer.linear.weight.data.zero_()  # its own memory, not the file's
    assert load_file(tmp_path / "model.safetensors")["output_layer.linear.weight"].any()


def test_saved_names_are_the_public_ones(tmp_path):
    tiny().save_pretrained(tmp_path)
    saved = load_file(tmp_path / "model.safetensors")
    shapes = public_shapes(TINY["tokens"], TINY["hidden_size"], TINY["blocks"], TINY["cond_dim"])
    assert {k: tuple(v.shape) for k, v in saved.items()} == shapes | {"rotary_emb.inv_freq": (4,)}
    want = 1 / 10000 ** (torch.arange(0, 8, 2).float() / 8)  # as the public code computes it
    torch.testing.assert_close(saved["rotary_emb.inv_freq"], want)


def public_folder(folder, network: DDiT, dtype: torch.dtype = torch.float32, **more: Tensor):
    """Files as the public repository writes them: all of its training configuration, flat names."""
    tensors = {name: value.to(dtype).contiguous() for name, value in network.state_dict().items()}
    save_file(tensors | more, folder / "model.safetensors")
    config = network.config
    fields = {
        "ngpus": 8,
        "tokens": config.tokens,
        "training": {"batch_size": 512, "ema": 0.9999},
        "data": {"train": "openwebtext", "valid": "wikitext103", "cache_dir": "data"},
        "graph": {"type": "absorb", "file": "data", "report_all": False},
        "noise": {"type": "loglinear", "sigma_min": 0.0001, "sigma_max": 20},
        "sampling": {"predictor": "euler", "steps": 128, "noise_removal": True},
        "model": {
            "name": "small",
            "type": "ddit",
            "hidden_size": config.hidden_size,
            "cond_dim": config.cond_dim,
            "length": config.length,
            "n_blocks": config.blocks,
            "n_heads": config.heads,
            "scale_by_sigma": True,
            "dropout": 0.1,
        },
    }
    (folder / "config.json").write_text(json.dumps(fields))
    return fields


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("frequencies", [True, False], ids=["inv_freq", "no inv_freq"])
def test_loads_a_public_checkpoint(tmp_path, dtype, frequencies):
    network, tokens = tiny(torch.float32).to(dtype).float(), some_tokens(1, 12)
    more = {"rotary_emb.inv_freq": torch.zeros(4, dtype=dtype)} if frequencies else {}
    public_folder(tmp_path, network, dtype, **more)
    loaded = DDiT.from_pretrained(tmp_path)
    assert loaded.config == DDiTConfig(**TINY)
    assert {value.dtype for value in loaded.state_dict().values()} == {torch.float32}
    assert {value.device.type for value in [*loaded.parameters(), *loaded.buffers()]} == {"cpu"}
    network.rotary_emb = DDiT(network.config).rotary_emb  # whose tables were never in 16 bits
    assert torch.equal(logits(loaded, tokens, 0.4), logits(network, tokens, 0.4))


@pytest.mark.parametrize(
    ("section", "changes", "message"),
    [
        ("graph", {"type": "uniform"}, "graph.type must be 'absorb', got 'uniform'"),
        ("model", {"scale_by_sigma": False}, "model.scale_by_sigma must be true"),
        ("noise", {"type": "cosine"}, "noise.type must be one of loglinear, geometric, got 'cos"),
        ("noise", {"type": "geometric", "sigma_max": 0}, "0 < sigma_min < sigma_max, got"),
        ("model", {"n_heads": 7}, r"hidden_size must be a multiple of 2 \* heads = 14"),
        ("model", {"n_blocks": 4}, r'Missing key\(s\) in state_dict: "blocks.3'),
        ("model", {"cond_dim": 12}, r"size mismatch for sigma_map"),
        ("model", {"length": None}, "'<' not supported"),
    ],
)
def test_other_configs_are_refused(tmp_path, section, changes, message):
    fields = public_folder(tmp_path, tiny())
    fields[section] |= changes
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=rf"(?s)holds no usable DDiT: .*{message}"):
        DDiT.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", ["tokens", "graph", "noise", "model"])
def test_missing_sections_are_named(tmp_path, key):
    fields = public_folder(tmp_path, tiny())
    del fields[key]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ValueError, match=f"config.json lacks '{key}'"):
        DDiT.from_pretrained(tmp_path)


def test_damaged_folders_are_refused(tmp_path):
    network = tiny()
    with pytest.raises(ValueError, match=r"(?s)holds no usable DDiT: .*config.json"):
        DDiT.from_pretrained(tmp_path)
    public_folder(tmp_path, network)
    weights = tmp_path / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"holds no usable DDiT: .*expected config.json and"):
        DDiT.from_pretrained(tmp_path)
    tensors = network.state_dict()
    del tensors["blocks.1.attn_out.weight"]
    save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"(?s)Missing key.*blocks.1.attn_out.weight"):
        DDiT.from_pretrained(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds no usable DDiT"):
        DDiT.from_pretrained(tmp_path)


def test_pickled_weights_are_not_read(tmp_path):
    network = tiny()
    public_folder(tmp_path, network)
    (tmp_path / "model.safetensors").unlink()
    torch.save(network.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"(?s)model.safetensors.*pickled weights are not read"):
        DDiT.from_pretrained(tmp_path)


@pytest.fixture
def flash_calls(monkeypatch):
    """A flash_attn of our own; -> the calls that it gets."""
    calls: list[tuple[int, ...]] = []

    def flash_attn_func(q: Tensor, k: Tensor, v: Tensor) -> Tensor:  # [B, N, H, D]
        calls.append(tuple(q.shape))
        scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
        return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)

    package = ModuleType("flash_attn")
    package.flash_attn_func = flash_attn_func  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    ddit.flash_attention.cache_clear()
    yield calls
    ddit.flash_attention.cache_clear()


def test_flash_attention_computes_the_same(flash_calls, monkeypatch):
    network, tokens = tiny(), some_tokens(2, 9)
    want = logits(network, tokens, 1.0)
    assert not flash_calls  # not on a CPU
    monkeypatch.setattr(ddit, "flash_fits", lambda q, mask: True)
    have = logits(network, tokens, 1.0)
    assert flash_calls == [(2, 9, 3, 8)] * TINY["blocks"]
    torch.testing.assert_close(have, want, rtol=1e-10, atol=1e-10)


def test_without_flash_attention(flash_calls, monkeypatch):
    network, tokens = tiny(), some_tokens(2, 9)
    want = logits(network, tokens, 1.0)
    monkeypatch.setattr(ddit, "flash_fits", lambda q, mask: True)
    monkeypatch.setitem(sys.modules, "flash_attn", None)  # as if it were not installed
    assert torch.equal(logits(network, tokens, 1.0), want)


def test_flash_attention_is_for_half_precision_on_cuda_without_padding():
    def fits(cuda: bool, dtype: torch.dtype, padded: bool) -> bool:
        q = SimpleNamespace(is_cuda=cuda, dtype=dtype)
        return ddit.flash_fits(q, torch.ones(1, 1, 1, 4).bool() if padded else None)

    assert fits(True, torch.float16, False) and fits(True, torch.bfloat16, False)
    assert not fits(True, torch.float32, False)
    assert not fits(False, torch.float16, False)
    assert not fits(True, torch.float16, True)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("padded", [False, True])
def test_half_precision_on_a_gpu(padded):
    exact, tokens = tiny(), some_tokens(2, 16)
    mask = torch.arange(16) < torch.tensor([[16], [11]]) if padded else None
    network = tiny().half().cuda()
    have = logits(network, tokens.cuda(), 1.0, None if mask is None else mask.cuda()).cpu()
    want = logits(exact, tokens, 1.0, mask)
    real = slice(None) if mask is None else mask
    assert F.cosine_similarity(have[real].double(), want[real], -1).min() > 0.99


def test_modulation_is_laid_out_as_documented():
    network = tiny()
    (entry,) = network.modulations([0.7])
    assert isinstance(entry, Modulation)
    shift1, gain1, gate1, _, gain2, _ = entry.blocks[1]
    block, condition = network.blocks[1], network.sigma_map([0.7])[0]
    raw = block.adaLN_modulation(condition).view(6, -1)
    torch.testing.assert_close(shift1, raw[0])
    torch.testing.assert_close(gain1, block.norm1.weight * (1 + raw[1]))
    torch.testing.assert_close(gate1, raw[2])
    torch.testing.assert_close(gain2, block.norm2.weight * (1 + raw[4]))
