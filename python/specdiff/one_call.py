"""One call: `generate` makes a target, a drafter and a Decoder, and decodes with them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from specdiff_kernels import Lenience

from .drafters import load_drafter
from .loop.chooser import Chooser
from .loop.decoder import Decoder, Generation, Prompts, Tokenizer
from .loop.drafter import Drafter
from .loop.target import Target


def generate(
    target: Target | PreTrainedModel | str | Path,
    drafter: Drafter | str | Path | None,
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
    """Decode in one call.

    Args:
        target: a Target or a model; or a known name or a folder, which `Target.load` loads anew in
            every call.
        drafter: a Drafter; or a name or a folder for `specdiff.drafters.load_drafter`; None: plain
            decoding.
        input_ids: prompts, as `Decoder.stream` takes them.
        k, rule, lenience, record, backend, tokenizer: arguments of `Decoder`.
        options: of `Decoder.stream`, such as max_new_tokens and sampling.

    Raises:
        ValueError, TypeError: an argument cannot be used; the message names it.

    Example:
        >>> generate(model, PromptLookup(), [[1, 2, 3], [4, 5]], max_new_tokens=16).new_tokens
    """
    if isinstance(target, (str, Path)):
        target = Target.load(target)
    elif not isinstance(target, Target):
        target = Target(target)
    if isinstance(drafter, (str, Path)):
        drafter = load_drafter(drafter, target, backend=backend)
    decoder = Decoder(
        target, drafter, k, rule,
        lenience=lenience, record=record, backend=backend, tokenizer=tokenizer,
    )  # fmt: skip
    return decoder.generate(input_ids, **options)
