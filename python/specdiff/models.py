"""Load causal language models and tokenizers from local folders.

Nothing is unpickled. Code in the folder, or named by it, is never run.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

SAVED = "as written by save_pretrained for a model class built into transformers"
# masks and frequencies that older versions of transformers stored; models compute them now
BUFFERS = (".attn.bias", ".attention.bias", ".masked_bias", ".inv_freq")
LOCAL: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}  # for transformers


def load_causal(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a folder's causal language model onto the CPU, from safetensors only.

    Raises:
        ValueError: the folder holds no such model or a damaged one, or loading it would run code
            from the folder or the hub, or would unpickle.

    Example:
        >>> load_causal(fetch("smollm2-135m"), torch.float32)
    """
    from transformers import AutoModelForCausalLM

    with usable(folder, f"config.json and safetensors weights, {SAVED}"):
        refuse_detours(folder)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            dtype=dtype,
            use_safetensors=True,
            ignore_mismatched_sizes=True,  # refused below, by name
            output_loading_info=True,
            **LOCAL,
        )
        model, found = loaded
        refuse_damage(**found)
    return model.eval()


def refuse_damage(
    missing_keys: Iterable[str],
    unexpected_keys: Iterable[str],
    mismatched_keys: Iterable[tuple[str, Sequence[int], Sequence[int]]],
    **_: Any,
) -> None:
    """Raise ValueError unless the weights are those of the model that config.json describes.

    transformers gives random values to what is missing. It leaves out what may be missing, such as
    a tied lm head.
    """
    missing = sorted(missing_keys)
    unexpected = sorted(name for name in unexpected_keys if not name.endswith(BUFFERS))
    shapes = [
        f"{name} is {list(stored)} in the weights and {list(wanted)} by config.json"
        for name, stored, wanted in sorted(mismatched_keys)
    ]
    faults = [
        f"the weights lack {listed(missing)}" if missing else "",
        f"the weights have {listed(unexpected)}, which the model has not" if unexpected else "",
        listed(shapes),
    ]
    if missing and unexpected and all(name.startswith("module.") for name in unexpected):
        faults.append("save the model itself and not the wrapper whose `module` it is")
    if any(faults):
        raise ValueError("; ".join(filter(None, faults)))


def listed(names: Sequence[str]) -> str:
    """The first three of them, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """Load a folder's tokenizer.

    Raises:
        ValueError: the folder holds no tokenizer, or one that needs its own code.

    Example:
        >>> load_tokenizer(fetch("smollm2-135m"))("Hello").input_ids
        [19556]
    """
    from transformers import AutoTokenizer

    with usable(folder, f"config.json, a tokenizer and safetensors weights, {SAVED}"):
        return AutoTokenizer.from_pretrained(folder, **LOCAL)


@contextmanager
def usable(folder: Path, expected: str) -> Iterator[None]:
    """Turn the errors that transformers raises into a ValueError that names the folder."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # of any kind, where a file is damaged
        why: Any = error
        if "trust_remote_code" in str(error):  # callers here cannot set it
            why = "it needs its own code (auto_map), which is never run"
        raise ValueError(
            f"{folder} holds no usable causal language model: {why}; expected {expected}"
        ) from error


def refuse_detours(folder: Path) -> None:
    """Raise ValueError if a folder would make transformers unpickle or run code from elsewhere.

    Refused: weights outside .safetensors files (config.json or an index can name some), adapters
    (they can be pickled), and attention kernels from the hub.
    """
    from transformers import PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(folder, **LOCAL)
    weights = ["model.safetensors"]
    for key, value in entries(config):
        if key == "transformers_weights" and value is not None:
            weights.append(str(value).removesuffix(".index.json"))
        if "attn_implementation" in key and "/" in json.dumps(value):
            raise ValueError(
                f"config.json has {key} {value!r}, code on Hugging Face's hub: remove it"
            )
    refuse_pickles("config.json", weights)
    for name in weights:
        index = folder / f"{name}.index.json"
        if index.is_file():
            refuse_pickles(index.name, json.loads(index.read_text("utf-8"))["weight_map"].values())
    if (folder / "adapter_config.json").exists():
        raise ValueError(
            "adapters (adapter_config.json) are not supported: merge the adapter into the weights"
        )


def entries(fields: Any) -> Iterator[tuple[str, Any]]:
    """All (key, value) pairs of parsed JSON, at every depth."""
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
                f"{where} names {name} as weights, which may be pickled: save them as safetensors"
            )


def encode(tokenizer: PreTrainedTokenizerBase, text: str, raw: bool = False) -> list[int]:
    """Token ids of a prompt. With a chat template and raw=False, it becomes a user message.

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
