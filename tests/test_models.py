"""Damaged folders of models: nothing is decoded with weights that transformers made up."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from specdiff import Target
from specdiff.drafters import load_drafter
from specdiff.models import load_causal
from tests.tiny import tiny_model

FAMILIES = ("gemma", "gpt2", "gpt_neo", "llama", "mistral", "qwen2")


def changed(folder: Path, change) -> Path:
    """A folder of a tiny Llama whose tensors went through `change`."""
    tiny_model("llama").save_pretrained(folder)
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, {"format": "pt"})
    return folder


def without(*parts: str):
    def change(tensors) -> None:
        for name in [n for n in tensors if any(part in n for part in parts)]:
            del tensors[name]

    return change


def prefixed(tensors) -> None:
    for name in list(tensors):
        tensors[f"module.{name}"] = tensors.pop(name)


def eagle_layout(tensors) -> None:
    """One layer, a projection of two states, no head: as EAGLE's drafters are published."""
    for name in list(tensors):
        value = tensors.pop(name)
        if name.startswith("model.layers.0."):
            tensors[name.removeprefix("model.")] = value
    tensors["fc.weight"] = torch.zeros(4, 8)


def wider(tensors) -> None:
    tensors["lm_head.weight"] = torch.zeros(51, tensors["lm_head.weight"].shape[1])


def extra(tensors) -> None:
    tensors["model.layers.7.mlp.up_proj.weight"] = torch.zeros(2)


DAMAGE = {
    "the weights lack lm_head.weight;": without("lm_head"),
    "the weights lack model.layers.0.mlp.down_proj.weight, model.layers.0": without("layers.0.mlp"),
    "save the model itself and not the wrapper": prefixed,
    "the weights have fc.weight, which the model has not": eagle_layout,
    "lm_head.weight is [51, 32] in the weights and [50, 32] by config.json": wider,
    "the weights have model.layers.7.mlp.up_proj.weight, which the model has not": extra,
}


@pytest.mark.parametrize("message", DAMAGE)
def test_a_damaged_folder_is_refused_by_the_names_of_its_tensors(tmp_path, message):
    folder = changed(tmp_path, DAMAGE[message])
    (tmp_path / "tokenizer.json").touch()
    with pytest.raises(ValueError, match=re.escape(message.rstrip(";"))) as error:
        load_causal(folder, torch.float32)
    assert str(folder) in str(error.value) and "above" not in str(error.value)
    target = Target(tiny_model("llama"))
    with pytest.raises(ValueError, match=re.escape(message.rstrip(";"))):
        load_drafter(folder, target)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tied", [False, True])
def test_whole_folders_load(tmp_path, family, tied):
    """A tied head is not missing, nor are buffers that old checkpoints hold unexpected."""
    model = tiny_model(family)
    model.config.tie_word_embeddings = tied
    embedding = model.get_input_embeddings().weight
    model.lm_head.weight = embedding if tied else torch.nn.Parameter(embedding.clone() + 1)
    model.save_pretrained(tmp_path)
    if family == "gpt2":  # as OpenAI's own checkpoint has
        file = tmp_path / "model.safetensors"
        tensors = load_file(file)
        tensors["transformer.h.0.attn.bias"] = torch.ones(1, 1, 4, 4)
        tensors["transformer.h.0.attn.masked_bias"] = torch.tensor(-1e4)
        save_file(tensors, file, {"format": "pt"})
    loaded = load_causal(tmp_path, torch.float32)
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(loaded(tokens).logits, model(tokens).logits)
    assert json.loads((tmp_path / "config.json").read_text())["tie_word_embeddings"] is tied
