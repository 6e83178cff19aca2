"""BlockDiffusion with random weights: what it records, its cache, its steps, its files."""

from __future__ import annotations

import json

import pytest
import torch

from specdiff import Decoder, Sampling, Target
from specdiff.drafters import Draws, News, load_drafter
from specdiff.drafters.block_diffusion import (
    BlockDiffusion,
    BlockDiffusionConfig,
    BlockDiffusionNetwork,
)
from specdiff.schedule import chunk
from specdiff.train import Blocks, Teacher, forward_blocks
from specdiff_kernels import Purpose, row_law, sample
from specdiff_kernels.reference.numerics import random_word
from tests.tiny import tiny_model

VOCAB, SIZE, K = 50, 32, 4
DRAFT_IDS = torch.arange(1, VOCAB, 2)


@pytest.fixture(scope="module")
def target() -> Target:
    return Target(tiny_model("llama", vocab=VOCAB))


@pytest.fixture
def network() -> BlockDiffusionNetwork:
    """Every parameter is random and of weight, so that every input matters to the output."""
    config = BlockDiffusionConfig(
        target_vocab_size=VOCAB,
        target_hidden_size=SIZE,
        draft_vocab_size=len(DRAFT_IDS),
        hidden_size=16,
        layers=2,
        heads=2,
        intermediate_size=32,
        block=K,
    )
    generator = torch.Generator().manual_seed(1)
    network = BlockDiffusionNetwork(config, DRAFT_IDS)
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return network


def recomputed(network, target, tokens, before, revealed) -> torch.Tensor:
    """Logits [K, Vd] of the block that ends `tokens`, by the trainer's forward, without a cache.

    before: [len(tokens) - K, d], the target's state before each committed token.
    """
    states = torch.cat((before[1:], torch.zeros(K + 1, SIZE)))  # AT each token
    teacher = Teacher(target.model, states[None].numpy(), DRAFT_IDS)
    positions = torch.arange(len(tokens) - K, len(tokens)).view(1, 1, K)
    blocks = Blocks(positions, torch.tensor([[revealed]]), torch.ones(1, 1, K))
    with torch.no_grad():
        return forward_blocks(network, tokens[None], states[None], blocks, teacher)[0, 0]


@pytest.mark.parametrize("steps", [1, 2, 3, K])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(temperature=0.9, top_k=10)], ids=repr)
def test_draft_equals_a_fresh_forward(target, network, steps, sampling):
    """Ragged news through the cache: logits of the trainer's forward, tokens by their law."""
    drafter = BlockDiffusion(network, target, steps=steps)
    drafter.start(3, 40, sampling)
    generator = torch.Generator().manual_seed(3)
    seed = torch.tensor([1, 2, 3])
    tokens = [torch.empty(0, dtype=torch.int64)] * 3
    before = [torch.empty(0, SIZE)] * 3
    for turn, counts in enumerate([[3, 7, 1], [1, 5, 2], [4, 0, 1], [2, 3, 5]]):
        new = torch.randint(VOCAB, (3, max(counts)), generator=generator)
        states = torch.randn(3, max(counts), SIZE, generator=generator)
        if turn == 0:
            states[:, 0] = 0  # nothing comes before the first token
        tokens = [torch.cat((row, new[b, : counts[b]])) for b, row in enumerate(tokens)]
        before = [torch.cat((row, states[b, : counts[b]])) for b, row in enumerate(before)]
        lengths = torch.tensor([K if count else 0 for count in counts])
        round = torch.full((3,), turn)
        news = News(new, torch.tensor(counts), states)
        draft = drafter.draft(news, K, lengths, Draws(seed, round))
        for b in (b for b in range(3) if counts[b]):
            row = torch.cat((tokens[b], draft.tokens[b]))
            for step in range(steps):
                lo, hi = chunk(K, steps, step)
                want = recomputed(network, target, row, before[b], revealed=lo)[lo:hi]
                have = draft.logits[b * K + lo : b * K + hi]
                torch.testing.assert_close(have, want, rtol=1e-4, atol=1e-4)
                assert draft.tau[b, lo:hi].tolist() == [step] * (hi - lo)
                guess = [-1] * (hi - lo)  # greedy tokens are no draws
                rows = list(range(b * K + lo, b * K + hi))
                assert draft.rows[b, lo:hi].tolist() == (guess if sampling.greedy else rows)
        rows = torch.arange(3 * K).view(3, K)[lengths > 0].flatten()
        law = row_law(draft.logits[rows], *sampling.parameters)
        assert all(torch.equal(have[rows], want) for have, want in zip(draft.law, law, strict=True))
        sequence = rows // K
        words = random_word(
            seed[sequence], rows % K, round[sequence], Purpose.DRAFT, draft.tau.flatten()[rows]
        )
        again = sample(draft.logits[rows], law, words=words, draft_ids=DRAFT_IDS)
        assert torch.equal(draft.tokens.flatten()[rows], again)


@pytest.mark.parametrize("steps", [1, 3])
def test_greedy_text_is_plain_decodings(target, network, steps):
    prompts = [[1, 2, 3], [4], [5, 6]]
    want = Decoder(target).generate(prompts, max_new_tokens=20).new_tokens
    drafter = BlockDiffusion(network, target, steps=steps)
    assert Decoder(target, drafter, K).generate(prompts, max_new_tokens=20).new_tokens == want


@pytest.mark.parametrize(("k", "steps"), [(8, 1), (8, 3), (7, 7), (5, 2)])
def test_chunks_cover_the_block_from_left_to_right(k, steps):
    chunks = [chunk(k, steps, step) for step in range(steps)]
    assert [i for lo, hi in chunks for i in range(lo, hi)] == list(range(k))
    assert chunks[0] == (0, k // steps)


def test_save_and_load(target, network, tmp_path):
    network.save(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["config.json", "model.safetensors"]
    drafter = load_drafter(tmp_path, target, steps=2)
    assert isinstance(drafter, BlockDiffusion) and drafter.steps == 2
    assert drafter.network.config == network.config
    assert torch.equal(drafter.network.draft_ids, DRAFT_IDS)
    for (name, saved), loaded in zip(
        network.named_parameters(), drafter.network.parameters(), strict=True
    ):
        assert torch.equal(saved.half().float(), loaded), name


def test_damaged_files_are_refused(network, tmp_path):
    network.save(tmp_path)
    weights = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(ValueError, match="holds no usable block-diffusion drafter"):
        BlockDiffusionNetwork.load(tmp_path)
    network.save(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"hidden_size": 24}))
    with pytest.raises(ValueError, match="holds no usable block-diffusion drafter"):
        BlockDiffusionNetwork.load(tmp_path)


def test_bad_arguments(target, network):
    with pytest.raises(ValueError, match=r"steps must be in \[1, block = 4\], got 5"):
        BlockDiffusion(network, target, steps=5)
    one = torch.ones(1, dtype=torch.int64)
    drafter = BlockDiffusion(network, target)
    drafter.start(1, 10, Sampling())
    with pytest.raises(ValueError, match=r"k must be in \[1, 4\] for this drafter, got 5"):
        drafter.draft(News(one[:, None], one, torch.zeros(1, 1, SIZE)), 5, one, Draws(one, one))
    with pytest.raises(ValueError, match=r"news.hidden is None"):
        drafter.draft(News(one[:, None], one, None), 4, one, Draws(one, one))
    network.config = BlockDiffusionConfig(VOCAB + 1, SIZE, len(DRAFT_IDS), 16, 2, 2, 32, K)
    with pytest.raises(ValueError, match="was trained for a target with embeddings"):
        BlockDiffusion(network, target)
