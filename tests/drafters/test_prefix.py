"""Drafters with a DraftNetwork of random weights: what they record, cache, steps and files."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
import torch.nn.functional as F

from specdiff import Decoder, Sampling, Target
from specdiff.drafters import (
    BlockDiffusion,
    Drafter,
    Draws,
    Eagle,
    News,
    ParallelDrafter,
    load_drafter,
)
from specdiff.drafters.head import SequentialHead
from specdiff.drafters.network import DraftNetwork
from specdiff.drafters.schedule import chunk
from specdiff.training.groups import Groups, forward_groups
from specdiff_kernels import Purpose, row_distribution, sample
from specdiff_kernels.reference.numerics import random_word
from tests.tiny import tiny_model, tiny_network

VOCAB, SIZE, K = 50, 32, 4
DRAFT_IDS = torch.arange(1, VOCAB, 2)
KINDS = {"block-diffusion": BlockDiffusion, "parallel": ParallelDrafter, "eagle": Eagle}
LAYERS = {"target_layers": (1, 2), "target_layer_count": 2}
VARIANTS = {  # name -> kind, reverse steps, what else the network has
    **{f"block-diffusion, T = {T}": ("block-diffusion", T, {}) for T in (1, 2, 3, K)},
    "parallel": ("parallel", 1, {}),
    "eagle": ("eagle", K, {}),
    "parallel, layers": ("parallel", 1, LAYERS),
    "parallel, layers, head": ("parallel", 1, {**LAYERS, "head_rank": 5}),
    "parallel, head of tokens": ("parallel", 1, {"head_rank": 5, "head_state": False}),
    "block-diffusion, T = 1, head": ("block-diffusion", 1, {"head_rank": 5}),
    "block-diffusion, T = 2, layers, head": ("block-diffusion", 2, {**LAYERS, "head_rank": 5}),
}
STEPS = pytest.mark.parametrize(("kind", "steps", "more"), VARIANTS.values(), ids=VARIANTS)


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(tiny_model("llama", vocab=VOCAB))


def make(kind: str, target: Target, steps: int | None = None, **more) -> Drafter:
    network = tiny_network(kind, DRAFT_IDS, layers=2, block=K, **more)
    options = {"steps": steps} if kind == "block-diffusion" else {}
    return KINDS[kind](network, target, **options)


def recomputed(network, target, tokens, before, revealed, k) -> torch.Tensor:
    """Logits [k, Vd] of the draft that ends `tokens`, by the forward of training, without a cache.

    before: [len(tokens) - k, ...], the target's states before each committed token.
    """
    states = torch.cat((before, torch.zeros(k, before.shape[1])))
    anchor = torch.tensor([[len(tokens) - k - 1]])
    embedded = F.embedding(tokens[None], target.model.get_input_embeddings().weight)
    groups = Groups(anchor, torch.tensor([[revealed]]))
    with torch.no_grad():
        text, behind = forward_groups(network, embedded, states[None], groups, k)
        out = behind[0, 0]
        if network.config.kind != "block-diffusion":
            out = torch.cat((text[0, anchor[0]], out))
        output = target.model.get_output_embeddings().weight[network.draft_ids]
        logits = F.linear(network.embed_out(out), output, network.bias)
        if network.head is not None:  # W C silu(A n(E[x]) + B n(s)), x the token before
            head, x = network.head, embedded[0, -k - 1 : -1]
            inner = head.token(x / x.square().mean(-1, keepdim=True).sqrt())
            if head.state is not None:
                inner += head.state(out / out.square().mean(-1, keepdim=True).sqrt())
            logits += F.silu(inner) @ head.mix.weight.T @ head.out.weight.T
        return logits


def test_codes_of_tokens_are_made_in_slices():
    """Of entries +-1, whose root mean square is 1, and small integers, whose sums are exact: the
    bits are those of one product, in which order however it adds."""
    draw = torch.Generator().manual_seed(0)
    head = SequentialHead(target_size=6, state_size=0, rank=5, vocab_size=9)
    head.token.weight.data = torch.randint(-9, 9, (5, 6), generator=draw).float()
    embedding = torch.randint(2, (50, 6), generator=draw).float() * 2 - 1
    sizes = []
    head.token.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    for rows in (1, 7, 25, 50, 4096):
        sizes.clear()
        assert torch.equal(head.codes(embedding, rows), embedding @ head.token.weight.T)
        assert sum(sizes) == 50 and max(sizes) == min(rows, 50)


@STEPS
@pytest.mark.parametrize("k", [1, 3, K])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, top_k=10)], ids=repr)
def test_draft_equals_a_fresh_forward(target, kind, steps, more, k, sampling):
    """Ragged news through the cache: logits of the trainer's forward, tokens by their
    distribution."""
    drafter = make(kind, target, steps, **more)
    width = (len(drafter.target_layers) + 1) * SIZE
    drafter.start(3, 40, sampling)
    generator = torch.Generator().manual_seed(3)
    seed = torch.tensor([1, 2, 3])
    tokens = [torch.empty(0, dtype=torch.int64)] * 3
    before = [torch.empty(0, width)] * 3
    for turn, counts in enumerate([[3, 7, 1], [1, 5, 2], [4, 0, 1], [2, 3, 5]]):
        new = torch.randint(VOCAB, (3, max(counts)), generator=generator)
        states = torch.randn(3, max(counts), width, generator=generator)
        if turn == 0:
            states[:, 0] = 0  # nothing comes before the first token
        tokens = [torch.cat((row, new[b, : counts[b]])) for b, row in enumerate(tokens)]
        before = [torch.cat((row, states[b, : counts[b]])) for b, row in enumerate(before)]
        lengths = torch.tensor([k if count else 0 for count in counts])
        round = torch.full((3,), turn)
        news = News(new, torch.tensor(counts), states)
        draft = drafter.draft(news, k, lengths, Draws(seed, round))
        taken = min(steps, k)
        for b in (b for b in range(3) if counts[b]):
            row = torch.cat((tokens[b], draft.tokens[b]))
            for step in range(taken):
                lo, hi = chunk(k, taken, step)
                want = recomputed(drafter.network, target, row, before[b], lo, k)[lo:hi]
                have = draft.logits[b * k + lo : b * k + hi]
                torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
                one_by_one = "head_rank" in more
                tau = [*range(lo, hi)] if one_by_one else [step] * (hi - lo)
                assert draft.tau[b, lo:hi].tolist() == tau
                guess = [-1] * (hi - lo)  # greedy tokens are no draws
                rows = list(range(b * k + lo, b * k + hi))
                assert draft.rows[b, lo:hi].tolist() == (guess if sampling.greedy else rows)
        rows = torch.arange(3 * k).view(3, k)[lengths > 0].flatten()
        distribution = row_distribution(draft.logits[rows], *sampling.parameters)
        assert all(
            torch.equal(have[rows], want)
            for have, want in zip(draft.distribution, distribution, strict=True)
        )
        sequence = rows // k
        words = random_word(
            seed[sequence], rows % k, round[sequence], Purpose.DRAFT, draft.tau.flatten()[rows]
        )
        again = sample(draft.logits[rows], distribution, words=words, draft_ids=DRAFT_IDS)
        assert torch.equal(draft.tokens.flatten()[rows], again)


@STEPS
def test_greedy_text_is_plain_decodings(target, kind, steps, more):
    prompts = [[1, 2, 3], [4], [5, 6]]
    want = Decoder(target).generate(prompts, max_new_tokens=20).new_tokens
    drafter = make(kind, target, steps, **more)
    assert Decoder(target, drafter, K).generate(prompts, max_new_tokens=20).new_tokens == want


@pytest.mark.parametrize(
    ("kind", "more"), [("parallel", {}), ("parallel", {"head_rank": 5}), ("eagle", {})]
)
def test_causal_drafts_know_nothing_of_a_draft_s_length(target, kind, more):
    """The first tokens of a long draft are those of a short one."""
    one, news = torch.ones(1, dtype=torch.int64), torch.tensor([[3, 4, 5]])
    hidden = torch.randn(1, 3, SIZE, generator=torch.Generator().manual_seed(0))
    drafts = []
    for k in (1, 2, K):
        drafter = make(kind, target, **more)
        drafter.start(1, 20, Sampling(1.0))
        draft = drafter.draft(News(news, 3 * one, hidden), k, k * one, Draws(one, one))
        drafts.append(draft.logits)
    torch.testing.assert_close(drafts[0], drafts[2][:1])
    torch.testing.assert_close(drafts[1], drafts[2][:2])


@pytest.mark.parametrize("kind", KINDS)
def test_far_positions_in_bf16(kind):
    """Attention sees distances alone: far from the beginning bf16 is off no more than near it."""
    network = tiny_network(kind, DRAFT_IDS, layers=2)
    x = torch.randn(1, 12, 16, generator=torch.Generator().manual_seed(0))
    mask, near = torch.ones(12, 12, dtype=torch.bool).tril()[None, None], torch.arange(12)[None]
    with torch.no_grad():
        exact = network(x, near, mask)
        network.bfloat16()
        error = [
            (network(x.bfloat16(), near + first, mask).float() - exact).abs().max()
            for first in (0, 3000)
        ]
    assert error[0] > 0 and error[1] <= 2 * error[0]


@pytest.mark.parametrize(("k", "steps"), [(8, 1), (8, 3), (7, 7), (5, 2)])
def test_chunks_cover_the_block_from_left_to_right(k, steps):
    chunks = [chunk(k, steps, step) for step in range(steps)]
    assert [i for lo, hi in chunks for i in range(lo, hi)] == list(range(k))
    assert chunks[0] == (0, k // steps)


@STEPS
def test_save_and_load(target, kind, steps, more, tmp_path):
    network = tiny_network(kind, DRAFT_IDS, **more)
    network.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    drafter = load_drafter(tmp_path, target)
    assert drafter.kind == kind and drafter.network.config == network.config
    assert torch.equal(drafter.network.draft_ids, DRAFT_IDS)
    for (name, saved), loaded in zip(
        network.named_parameters(), drafter.network.parameters(), strict=True
    ):
        assert torch.equal(saved.half().float(), loaded), name


@pytest.mark.parametrize("kind", ["parallel", "block-diffusion"])
def test_what_a_drafter_has_read_is_as_good_as_news(target, kind):
    """Prompts in chunks, then the last token as news: the draft is that of all news at once."""
    drafts, generator = [], torch.Generator().manual_seed(0)
    tokens = torch.randint(VOCAB, (2, 9), generator=generator)
    states = torch.randn(2, 9, 3 * SIZE, generator=generator)
    counts, two = torch.tensor([9, 6]), torch.full((2,), K)
    for chunks in ([], [(0, 4), (4, 8)]):
        drafter = make(kind, target, **LAYERS, head_rank=5)
        drafter.start(3, 20, Sampling(1.0))  # the first place stays empty
        known = torch.zeros_like(counts)
        for lo, hi in chunks:
            now = (counts - 1 - lo).clamp(0, hi - lo)
            drafter.read(slice(1, 3), News(tokens[:, lo:hi], now, states[:, lo:hi], hi))
            known += now
        at = known[:, None] + torch.arange(9)
        news, hidden = torch.zeros(3, 9, dtype=torch.int64), torch.zeros(3, 9, 3 * SIZE)
        news[1:] = tokens.gather(1, at.clamp(max=8))
        hidden[1:] = states.gather(1, at.clamp(max=8)[..., None].expand(-1, -1, 3 * SIZE))
        left, wanted = F.pad(counts - known, (1, 0)), F.pad(two, (1, 0))
        draws = Draws(torch.arange(3), torch.zeros(3, dtype=torch.int64))
        drafts.append(drafter.draft(News(news, left, hidden), K, wanted, draws))
        assert drafter.cache.lengths.tolist() == [0, 9, 6]
    assert torch.equal(drafts[0].tokens, drafts[1].tokens)
    torch.testing.assert_close(drafts[0].logits[K:], drafts[1].logits[K:], rtol=1e-4, atol=1e-4)


def test_a_file_without_layers_and_head_reads_the_last_state_alone(target, tmp_path):
    """As files of drafters did before there were such fields."""
    network = tiny_network("parallel", DRAFT_IDS)
    network.save(tmp_path)
    fields = json.loads((tmp_path / "config.json").read_text())
    for name in ("target_layers", "target_layer_count", "head_rank", "head_state"):
        del fields[name]
    (tmp_path / "config.json").write_text(json.dumps(fields))
    drafter = load_drafter(tmp_path, target)
    assert drafter.network.config == network.config
    assert drafter.target_layers == () and drafter.correction is None
    assert drafter.network.hidden_in.weight.shape == (16, SIZE)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"target_layers": (1, 3), "target_layer_count": 2}, r"from 1 to .* = 2, got \[1, 3\]"),
        ({"target_layers": (0, 1), "target_layer_count": 2}, r"from 1 to .* = 2, got \[0, 1\]"),
        ({"target_layers": (2, 1), "target_layer_count": 2}, r"ascending, .* got \[2, 1\]"),
        ({"target_layers": (1,)}, r"\[1\] also need a target_layer_count"),
        ({"head_rank": -1}, r"head_rank must be at least 0, got -1"),
    ],
)
def test_layers_and_ranks_out_of_range(more, message):
    with pytest.raises(ValueError, match=message):
        tiny_network("parallel", DRAFT_IDS, **more)


def test_an_eagle_has_neither_layers_nor_head():
    for more in (LAYERS, {"head_rank": 4}):
        with pytest.raises(ValueError, match="an eagle reads only the state that it predicts"):
            tiny_network("eagle", DRAFT_IDS, **more)


def test_a_target_of_other_layers_is_refused(target):
    network = tiny_network("parallel", DRAFT_IDS, target_layers=(1, 2), target_layer_count=3)
    with pytest.raises(ValueError, match="for a target with 3 layers, got 2"):
        ParallelDrafter(network, target)


def test_a_head_s_corrections_begin_at_zero():
    head = tiny_network("parallel", DRAFT_IDS, head_rank=5).head
    head.initialise(torch.Generator().manual_seed(0))
    x = torch.randn(3, SIZE)
    assert not head(x, torch.randn(3, 16)).any()
    for factor in (head.token, head.state, head.mix):
        assert 0.005 < factor.weight.std() < 0.02


def test_steps_belong_to_block_diffusion(target, tmp_path):
    tiny_network("block-diffusion", DRAFT_IDS).save(tmp_path / "block")
    assert load_drafter(tmp_path / "block", target, steps=2).steps == 2
    tiny_network("parallel", DRAFT_IDS).save(tmp_path / "parallel")
    with pytest.raises(ValueError, match="a drafter of kind 'parallel' has none"):
        load_drafter(tmp_path / "parallel", target, steps=2)


def test_damaged_files_are_refused(tmp_path):
    network = tiny_network("block-diffusion", DRAFT_IDS)
    network.save(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="holds no usable drafter"):
        DraftNetwork.load(tmp_path)
    network.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for field, value in (("hidden_size", 24), ("model_type", "llama")):
        (tmp_path / "config.json").write_text(json.dumps(config | {field: value}))
        with pytest.raises(ValueError, match="holds no usable drafter"):
            DraftNetwork.load(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_draft_has_k_tokens_unless_told_otherwise(target, kind):
    network = tiny_network(kind, DRAFT_IDS)
    drafter = KINDS[kind]
    assert Decoder(target, drafter(network, target)).settings.k == K
    network.config = dataclasses.replace(network.config, k=2)
    assert Decoder(target, drafter(network, target)).settings.k == 2
    assert Decoder(target, drafter(network, target), 3).settings.k == 3
    with pytest.raises(ValueError, match=r"k must be in \[1, block = 4\], got 5"):
        dataclasses.replace(network.config, k=5)


@pytest.mark.parametrize("kind", KINDS)
def test_bad_arguments(target, kind):
    one = torch.ones(1, dtype=torch.int64)
    drafter = make(kind, target)
    drafter.start(1, 10, Sampling())
    with pytest.raises(ValueError, match=r"k must be in \[1, 4\] for this drafter, got 5"):
        drafter.draft(News(one[:, None], one, torch.zeros(1, 1, SIZE)), 5, one, Draws(one, one))
    with pytest.raises(ValueError, match=r"news.hidden is None"):
        drafter.draft(News(one[:, None], one, None), 4, one, Draws(one, one))
    network = tiny_network(kind, DRAFT_IDS, vocab=VOCAB + 1)
    with pytest.raises(ValueError, match="was trained for a target with embeddings"):
        type(drafter)(network, target)
    other = tiny_network(next(k for k in KINDS if k != kind), DRAFT_IDS)
    with pytest.raises(ValueError, match=f"network must be of kind '{kind}'"):
        type(drafter)(other, target)
    if kind == "block-diffusion":
        with pytest.raises(ValueError, match=r"steps must be in \[1, block = 4\], got 5"):
            make(kind, target, steps=5)


def test_a_longer_block_adopts_a_shorter_ones_weights():
    short = tiny_network("block-diffusion", DRAFT_IDS)
    long = DraftNetwork(dataclasses.replace(short.config, block=6), DRAFT_IDS)
    long.adopt(short)
    assert torch.equal(long.offset[:4], short.offset)
    assert torch.equal(long.offset[4:], short.offset[-1:].expand(2, -1))
    assert torch.equal(long.layers[0].qkv.weight, short.layers[0].qkv.weight)
    parallel = DraftNetwork(dataclasses.replace(long.config, kind="parallel"), DRAFT_IDS)
    parallel.adopt(long)
    assert torch.equal(parallel.offset, long.offset[1:])  # the first token needs no mask
    eagle = DraftNetwork(dataclasses.replace(long.config, kind="eagle"), DRAFT_IDS)
    eagle.adopt(parallel)
    assert torch.equal(eagle.hidden_in.weight, short.hidden_in.weight)
    with pytest.raises(ValueError, match=r"initial network's mask must be \[16\], got None"):
        parallel.adopt(eagle)
    more = tiny_network("parallel", DRAFT_IDS, block=6, head_rank=5, target_layers=(1, 2),
                        target_layer_count=2)  # fmt: skip
    own = more.head.out.weight.clone()
    more.adopt(parallel)
    states = more.hidden_in.weight.split(SIZE, 1)
    assert torch.equal(states[2], parallel.hidden_in.weight)
    assert not states[0].any() and not states[1].any()  # begin without effect
    assert torch.equal(more.head.out.weight, own)
    again = tiny_network("parallel", DRAFT_IDS, block=6, head_rank=5, target_layers=(2,),
                         target_layer_count=2)  # fmt: skip
    again.adopt(more)
    assert torch.equal(again.hidden_in.weight, torch.cat(states[1:], 1))
    assert torch.equal(again.head.out.weight, own)
    wide = tiny_network("parallel", DRAFT_IDS, layers=2)
    with pytest.raises(ValueError, match=r"initial network's layers.1"):
        wide.adopt(tiny_network("parallel", DRAFT_IDS))
