"""A tiny target, what it wrote, a network that learns from it, and files of runs."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from typer.testing import CliRunner, Result

from specdiff.cli.main import app
from specdiff.drafters.network import DraftConfig, DraftNetwork
from specdiff.training.conversations import Conversations
from specdiff.training.teacher import Teacher
from tests.tiny import tiny_model

VOCAB, SIZE, TEXTS, LENGTH, BLOCK = 40, 32, 64, 30, 4
PARALLEL = f"""
target = "target"

[drafter]
kind = "parallel"
block = {BLOCK}
hidden_size = 32
heads = 2
intermediate_size = 64
draft_vocab_size = 30

[data]
conversations = "answers.npz"
held_out = 0.2

[objective]
anchors = 4

[training]
steps = 12
batch = 4
accumulate = 2
learning_rate = 1e-2
save_every = 3
"""
SEDD = """
target = "target"

[drafter]
kind = "sedd"
hidden_size = 32
blocks = 1
heads = 2
cond_dim = 16
length = 40

[data]
texts = "texts"
length = 16

[training]
steps = 3
batch = 4
"""


@pytest.fixture(autouse=True)
def on_the_cpu(monkeypatch) -> None:
    """Where the fixtures are, also on a machine with a GPU."""
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")


@pytest.fixture(scope="session")
def model() -> LlamaForCausalLM:
    return tiny_model("llama", vocab=VOCAB, eos_token_id=2).requires_grad_(False)


@pytest.fixture(scope="session")
def conversations(model) -> Conversations:
    """Answers that the model sampled, of different lengths."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, VOCAB, (TEXTS, 3), generator=generator)
    while tokens.shape[1] < LENGTH:
        p = model(tokens).logits[:, -1].softmax(-1)
        tokens = torch.cat((tokens, p.multinomial(1, generator=generator)), 1)
    length = torch.randint(LENGTH // 2, LENGTH + 1, (TEXTS,), generator=generator)
    tokens = tokens.masked_fill(torch.arange(LENGTH) >= length[:, None], 0)
    return Conversations(tokens, torch.full((TEXTS,), 3), length)


@pytest.fixture(scope="session")
def teacher(model, conversations) -> Teacher:
    return Teacher(model, conversations, torch.arange(VOCAB))


@pytest.fixture
def new_network(teacher) -> Callable[..., DraftNetwork]:
    """Untrained networks of a kind, always the same."""

    def make(kind: str, block: int = BLOCK, **more: Any) -> DraftNetwork:
        config = DraftConfig(kind, VOCAB, SIZE, VOCAB, 32, 1, 2, 64, block, **more)
        network = DraftNetwork(config, torch.arange(VOCAB))
        network.initialise(teacher.embedding, torch.Generator().manual_seed(0))
        return network

    return make


def save_target(model, words: dict[str, int], folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w2", unk_token="w0")
    fast.save_pretrained(folder)


@pytest.fixture(scope="session")
def folder(model, conversations, tmp_path_factory) -> Path:
    """A target with a tokenizer, its answers, and texts."""
    folder = tmp_path_factory.mktemp("run")
    save_target(model, {f"w{i}": i for i in range(VOCAB)}, folder / "target")
    np.savez(folder / "answers.npz", **{k: v.numpy() for k, v in conversations._asdict().items()})
    (folder / "texts").mkdir()
    for i in range(60):
        text = " ".join(f"w{(i * j) % VOCAB}" for j in range(40))
        (folder / "texts" / f"{i}.txt").write_text(text)
    return folder


def write(folder: Path, name: str, text: str) -> Path:
    (folder / name).write_text(text)
    return folder / name


def train(*args: object) -> Result:
    return CliRunner().invoke(app, ["train", *map(str, args)])
