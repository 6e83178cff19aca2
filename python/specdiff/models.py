"""Models: a causal language model from a local folder.

Nothing is ever unpickled, and no code that a folder brings along or names is run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAVED = "as save_pretrained writes them for a model that transformers itself has"
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # of transformers


def load_causal(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """The causal language model of a folder, on the CPU, from its safetensors alone.

    Raises:
        ValueError: the folder holds none, or one that cannot be had without running code that the
            folder brings along or names, or without unpickling.

    Example:
        >>> load_causal(fetch("smollm2-135m"), torch.float32)
    """
    from transformers import AutoModelForCausalLM

    with usable(folder, f"config.json and safetensors weights, {SAVED}"):
        refuse_detours(folder)
        model: Any = AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, use_safetensors=True, **LOCAL
        )
    return model.eval()


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder.

    Raises:
        ValueError: the folder holds none, or one that needs code of its own.

    Example:
        >>> load_tokenizer(fetch("smollm2-135m"))("Hello").input_ids
        [19556]
    """
    from transformers import AutoTokenizer

    with usable(folder, f"config.json, a tokenizer and safetensors weights, {SAVED}"):
        return AutoTokenizer.from_pretrained(folder, **LOCAL)


@contextmanager
def usable(folder: Path, expected: str) -> Iterator[None]:
    """Turn what transformers raises for a folder into a ValueError that names it."""
    from safetensors import SafetensorError

    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        why: Any = error
        if "trust_remote_code" in str(error):  # an argument that nobody can give here
            why = "it needs code of its own (auto_map), which is never run"
        raise ValueError(
            f"{folder} holds no usable causal language model: {why}; expected {expected}"
        ) from error


def refuse_detours(folder: Path) -> None:
    """Raise ValueError where a folder's files lead transformers to pickles or to code elsewhere.

    That is: weights in another file than .safetensors, which config.json or an index may name; an
    adapter, which may be pickled; a kernel of the hub in the place of attention.
    """
    from transformers import PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(folder, **LOCAL)
    weights = ["model.safetensors"]
    for key, value in entries(config):
        if key == "transformers_weights" and value is not None:
            weights.append(str(value).removesuffix(".index.json"))
        if "attn_implementation" in key and "/" in json.dumps(value):
            raise ValueError(
                f"config.json has {key} {value!r}, code on Hugging Face's hub: leave it out"
            )
    refuse_pickles("config.json", weights)
    for name in weights:
        index = folder / f"{name}.index.json"
        if index.is_file():
            refuse_pickles(index.name, json.loads(index.read_text("utf-8"))["weight_map"].values())
    if (folder / "adapter_config.json").exists():
        raise ValueError("adapters (adapter_config.json) are not read: merge it into the weights")


def entries(fields: Any) -> Iterator[tuple[str, Any]]:
    """Keys and values of JSON, at every depth."""
    if isinstance(fields, dict):
        yield from fields.items()
        fields = list(fields.values())
    if isinstance(fields, list):
        for value in fields:
            yield from entries(value)


def refuse_pickles(where: str, names: Iterable[str]) -> None:
    for name in names:
        if not name.endswith(".safetensors"):
            raise ValueError(
                f"{where} names {name} for weights, which may be pickled: save them as safetensors"
            )


def encode(tokenizer: PreTrainedTokenizerBase, text: str, raw: bool = False) -> list[int]:
    """Token ids of a prompt, as a user's message if there is a chat template and raw is False.

    Example:
        >>> encode(tokenizer, "Why is the sky blue?")
    """
    if raw or not tokenizer.chat_template:
        return tokenizer(text)["input_ids"]
    message = [{"role": "user", "content": text}]
    encoded: Any = tokenizer.apply_chat_template(
        message, add_generation_prompt=True, return_dict=True
    )
    return encoded["input_ids"]
