"""Options and fixtures that tests in several folders share."""

from __future__ import annotations

import os

import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when Triton's kernels are loaded

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from specdiff import Target
from tests.ops import interpreter
from tests.tiny import FAMILIES, tiny_model


def pytest_addoption(parser):
    parser.addoption("--full-sizes", action="store_true", help="do not cut what is interpreted")


def pytest_configure(config):
    interpreter.FULL = config.getoption("--full-sizes")


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE of 290 tokens, trained here; every text is representable."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=["<unk>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    text = "the quick brown fox jumps over the lazy dog and then the other dog jumps over the fox"
    tokenizer.train_from_iterator([text], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>"
    )


@pytest.fixture(scope="session", params=FAMILIES)
def model(request) -> PreTrainedModel:
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def target(model) -> Target:
    return Target(model)
