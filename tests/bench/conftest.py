"""A tiny Llama and its tokenizer in a folder, as `specdiff bench` takes targets."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specdiff.bench.methods import Models
from tests.tiny import tiny_model


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tiny_tokenizer) -> Path:
    path = tmp_path_factory.mktemp("bench") / "tiny-llama"
    model = tiny_model("llama", vocab=len(tiny_tokenizer), context=400)
    model.generation_config.eos_token_id = tiny_tokenizer.eos_token_id
    model.config.eos_token_id = tiny_tokenizer.eos_token_id
    model.save_pretrained(path)
    tiny_tokenizer.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def models(folder) -> Models:
    return Models(str(folder), torch.float32, torch.device("cpu"))


@pytest.fixture
def corpus(tmp_path) -> Path:
    """A folder of documents, of which some are held out."""
    path = tmp_path / "texts"
    path.mkdir()
    for n in range(60):
        (path / f"{n}.txt").write_text(f"{n} foxes jump over the lazy dog and then the other. " * n)
    return path
