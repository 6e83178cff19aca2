"""Messages that are held out for benchmarks: no drafter is trained on them."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from ..files import read_lines
from ..models import encode

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

CHAT = Path(__file__).with_name("prompts.txt")  # 16, one on each line
HELD_OUT = Path(__file__).with_name("held_out_prompts.jsonl")  # 64, see data/README.md


@cache
def messages(task: str) -> tuple[str, ...]:
    """The user messages of a benchmark task.

    Args:
        task: "chat" or "held-out".

    Example:
        >>> messages("chat")[0]
        'Why is the sky blue? Explain it to a ten-year-old.'
    """
    if task == "chat":
        return tuple(read_lines(CHAT))
    return tuple(json.loads(line)["message"] for line in read_lines(HELD_OUT))


def is_held_out(message: str) -> bool:
    """Whether a message is in one of the two tasks, up to surrounding space.

    Example:
        >>> is_held_out("Write a short poem about the first snow of winter.\\n")
        True
    """
    return message.strip() in stripped()


@cache
def stripped() -> frozenset[str]:
    return frozenset(message.strip() for task in ("chat", "held-out") for message in messages(task))


def held_out_prompts(tokenizer: PreTrainedTokenizerBase) -> set[tuple[int, ...]]:
    """Token ids of all prompts from the held-out messages, with and without surrounding space.

    Example:
        >>> tuple(encode(tokenizer, messages("chat")[0])) in held_out_prompts(tokenizer)
        True
    """
    texts = {*messages("chat"), *messages("held-out"), *stripped()}
    return {tuple(encode(tokenizer, text)) for text in texts}
