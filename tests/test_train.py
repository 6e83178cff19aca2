"""Training on a tiny target: it learns, continues exactly, and its masks hide what they must."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from rich.progress import Progress
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

from specdiff import Target
from specdiff.drafters import load_drafter
from specdiff.drafters.block_diffusion import BlockDiffusionConfig, BlockDiffusionNetwork
from specdiff.train import (
    Conversations,
    Recipe,
    Teacher,
    Trainer,
    app,
    distillation_loss,
    evaluate,
    forward_blocks,
    frequent_ids,
    hidden_states,
    load_conversations,
    sample_blocks,
)
from tests.tiny import tiny_model

VOCAB, SIZE, K, N, LENGTH = 40, 32, 4, 40, 30
RECIPE = Recipe(steps=60, batch=8, anchors=6, learning_rate=1e-2, held_out=0.2)


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return tiny_model("llama", vocab=VOCAB, eos_token_id=2)


@pytest.fixture(scope="module")
def data(model) -> Conversations:
    """Answers written by the model, of different lengths."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCAB, (N, 3), generator=generator)
    with torch.inference_mode():
        while tokens.shape[1] < LENGTH:
            p = model(tokens).logits[:, -1].softmax(-1)
            tokens = torch.cat((tokens, p.multinomial(1, generator=generator)), 1)
    length = torch.randint(LENGTH // 2, LENGTH + 1, (N,), generator=generator)
    tokens = tokens.clone().masked_fill(torch.arange(LENGTH) >= length[:, None], 0)
    return Conversations(tokens, torch.full((N,), 3), length)


@pytest.fixture(scope="module")
def teacher(model, data, tmp_path_factory) -> Teacher:
    path = tmp_path_factory.mktemp("hidden") / "hidden.npy"
    with Progress(disable=True) as progress:
        hidden = hidden_states(model, data, path, progress)
    return Teacher(model, hidden, torch.arange(VOCAB))


def new_network(teacher) -> BlockDiffusionNetwork:
    config = BlockDiffusionConfig(VOCAB, SIZE, VOCAB, 32, 2, 2, 64, K)
    network = BlockDiffusionNetwork(config, torch.arange(VOCAB))
    network.initialise(teacher.embedding, torch.Generator().manual_seed(0))
    return network


def test_held_out_loss_falls(data, teacher):
    trainer = Trainer(new_network(teacher), data, teacher, RECIPE)
    before = trainer.held_out_loss()
    acceptance = evaluate(trainer.network, data, teacher, trainer.held_rows)["acceptance"]
    while trainer.step < RECIPE.steps:
        trainer.train_step()
    figures = evaluate(trainer.network, data, teacher, trainer.held_rows)
    assert trainer.held_out_loss() < before - 0.2
    assert figures["acceptance"][0] > acceptance[0] + 0.05
    assert 1 < figures["tokens_per_forward"] < K + 1


def test_resumed_training_has_the_same_losses(data, teacher, tmp_path):
    straight = Trainer(new_network(teacher), data, teacher, RECIPE)
    want = [straight.train_step() for _ in range(6)]
    first = Trainer(new_network(teacher), data, teacher, RECIPE)
    got = [first.train_step() for _ in range(3)]
    first.save(tmp_path / "checkpoint.safetensors")
    second = Trainer(new_network(teacher), data, teacher, RECIPE)
    second.resume(tmp_path / "checkpoint.safetensors")
    assert got + [second.train_step() for _ in range(3)] == want
    other = Trainer(new_network(teacher), data, teacher, dataclasses.replace(RECIPE, seed=1))
    with pytest.raises(ValueError, match="repeat its options, or use another folder"):
        other.resume(tmp_path / "checkpoint.safetensors")


def test_a_block_sees_neither_later_tokens_nor_other_blocks(data, teacher):
    """What comes behind an anchor changes nothing; a revealed token or the prefix does."""
    network = new_network(teacher)
    rows = data.length.topk(1).indices
    blocks = sample_blocks(data, rows, 3, K, torch.Generator().manual_seed(0))
    revealed = torch.tensor([[0, 2, 0]])
    blocks = blocks._replace(revealed=revealed)
    tokens, hidden = data.tokens[rows], teacher.states(rows, LENGTH)

    def logits(tokens, hidden):
        with torch.no_grad():
            return forward_blocks(network, tokens, hidden, blocks, teacher)[0]

    base = logits(tokens, hidden)
    for a in range(3):
        start = int(blocks.positions[0, a, 0])  # anchor + 1
        later, states = tokens.clone(), hidden.clone()
        later[:, start + int(revealed[0, a]) :] = 1
        states[:, start - 1 :] = 0  # the state at the anchor itself is not known either
        assert torch.allclose(logits(later, states)[a], base[a], atol=1e-5)
        changed = tokens.clone()
        changed[:, start - 1] = (changed[:, start - 1] + 1) % VOCAB
        assert not torch.allclose(logits(changed, hidden)[a], base[a], atol=1e-3)
    start = int(blocks.positions[0, 1, 0])
    changed = tokens.clone()
    changed[:, start] = (changed[:, start] + 1) % VOCAB
    assert not torch.allclose(logits(changed, hidden)[1], base[1], atol=1e-3)


def test_blocks_stay_inside_answers(data):
    rows = torch.arange(N)
    blocks = sample_blocks(data, rows, 50, K, torch.Generator().manual_seed(0))
    anchors = blocks.positions[..., 0] - 1
    assert (anchors >= 2).all() and (anchors <= data.length[:, None] - 2).all()
    assert (anchors == 2).any() and (anchors == data.length[:, None] - 2).any()
    inside = blocks.positions < data.length[:, None, None]
    hidden = torch.arange(K) >= blocks.revealed[..., None]
    assert torch.equal(blocks.weight > 0, inside & hidden)


def test_loss_is_zero_gradient_at_the_teachers_law():
    target = torch.randn(5, 9, generator=torch.Generator().manual_seed(0))
    logits = target.clone().requires_grad_()
    distillation_loss(logits, target, torch.ones(5), 0.0).backward()
    assert logits.grad.abs().max() < 1e-6
    far = distillation_loss(-target, target, torch.ones(5), 1.0)
    p, q = target.softmax(-1), (-target).softmax(-1)
    torch.testing.assert_close(far, 1 - torch.minimum(p, q).sum(-1).mean())


def test_frequent_ids(data):
    ids = frequent_ids(data, 10, VOCAB, [2])
    assert (ids.diff() > 0).all() and 2 in ids and len(ids) == 10
    counts = np.zeros(VOCAB, int)
    for row, start, end in zip(*data, strict=True):
        np.add.at(counts, row[start:end].numpy(), 1)
    kept = set(ids.tolist()) - {2}
    assert min(counts[list(kept)]) >= max(counts[list(set(range(VOCAB)) - kept - {2})])


def test_hidden_states_continue_after_an_interruption(model, data, teacher, tmp_path, monkeypatch):
    path, calls = tmp_path / "hidden.npy", []
    forward = type(model.base_model).forward

    def failing(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    monkeypatch.setattr(type(model.base_model), "forward", failing)
    with Progress(disable=True) as progress:
        with pytest.raises(KeyboardInterrupt):
            hidden_states(model, data, path, progress)
        assert not path.exists()
        got = hidden_states(model, data, path, progress)
    assert len(calls) == 1 + 1 + 2  # 3 batches of 16, of which the first was kept
    assert np.array_equal(got, teacher.hidden)
    assert [p.name for p in tmp_path.iterdir()] == ["hidden.npy"]


def test_command_trains_a_drafter_that_loads(model, data, tmp_path):
    model.save_pretrained(tmp_path / "target")
    arrays = {name: field.numpy() for name, field in data._asdict().items()}
    np.savez(tmp_path / "data.npz", **arrays)
    assert torch.equal(load_conversations(tmp_path / "data.npz").tokens, data.tokens)
    options = ["--target", tmp_path / "target", "--data", tmp_path / "data.npz"]
    options += ["--out", tmp_path / "out", "--steps", 3, "--batch", 4, "--anchors", 3]
    options += ["--hidden-size", 64, "--layers", 1, "--draft-vocab", 30, "--block", K]
    result = CliRunner().invoke(app, [str(option) for option in options])
    assert result.exit_code == 0, result.output
    assert len(json.loads((tmp_path / "out" / "evaluation.json").read_text())["acceptance"]) == K
    assert load_drafter(tmp_path / "out", Target(model)).vocab_size == VOCAB


def test_data_without_lengths_is_refused(tmp_path):
    np.savez(tmp_path / "data.npz", tokens=np.zeros((2, 3), np.uint16))
    with pytest.raises(ValueError, match="lacks prompt_length, length"):
        load_conversations(tmp_path / "data.npz")
