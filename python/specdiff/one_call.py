"""One call: `generate` makes a Decoder and decodes with it."""

from __future__ import annotations

from typing import Any

from transformers import PreTrainedModel

from specdiff_kernels import Lenience

from .loop.chooser import Chooser
from .loop.decoder import Decoder, Generation, Prompts, Tokenizer
from .loop.drafter import Drafter
from .loop.target import Target


def generate(
    target: Target | PreTrainedModel,
    drafter: Drafter | None,
    input_ids: Prompts,
    *,
    k: int | Chooser | None = None,
    rule: str = "token",
    lenience: Lenience | None = None,
    record: str | None = None,
    backend: str | None = None,
    tokenizer: Tokenizer | None = None,
    **options: Any,
) -> Generation:
    """Decode in one call; see `Decoder` and `Decoder.stream` for the arguments.

    Example:
        >>> generate(model, PromptLookup(), [[1, 2, 3], [4, 5]], max_new_tokens=16).new_tokens
    """
    if not isinstance(target, Target):
        target = Target(target)
    decoder = Decoder(
        target, drafter, k, rule,
        lenience=lenience, record=record, backend=backend, tokenizer=tokenizer,
    )  # fmt: skip
    return decoder.generate(input_ids, **options)
