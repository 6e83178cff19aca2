"""A tiny target, what it wrote, and a network that learns from it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from specdiff.drafters.network import DraftConfig, DraftNetwork
from specdiff.training.conversations import Conversations
from specdiff.training.teacher import Teacher
from tests.tiny import tiny_model

VOCAB, SIZE, TEXTS, LENGTH, BLOCK = 40, 32, 64, 30, 4


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
