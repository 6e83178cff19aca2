"""One call: `generate` makes a target, a drafter and a Decoder, and decodes with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from transformers import PreTrainedModel

from specdiff_kernels import Lenience

from .drafters import load_drafter
from .loop.arguments import Prompts, answered
from .loop.capture import Captured
from .loop.chooser import Chooser
from .loop.decoder import Decoder, Generation, Tokenizer
from .loop.drafter import Drafter
from .loop.sampling import Sampling
from .loop.session import Ends, Process
from .loop.target import Target


@answered
def generate(
    target: Target | PreTrainedModel | str | Path,
    drafter: Drafter | str | Path | None,
    prompts: Prompts,
    *,
    k: int | Chooser | None = None,
    rule: str = "token",
    tree: int | Sequence[int] | None = None,
    lenience: Lenience | None = None,
    record: str | None = None,
    backend: str | None = None,
    tokenizer: Tokenizer | None = None,
    max_new_tokens: int = 128,
    sampling: Sampling | None = None,
    seed: int | Sequence[int] = 0,
    stop_tokens: Sequence[int] | None = None,
    stop_strings: str | Sequence[str] | None = None,
    logprobs: bool = False,
    look_every: int | None = None,
    capture: bool | Captured = False,
    block_size: int | None = None,
    blocks: int | None = None,
    process: Process | None = None,
    ends: Ends | None = None,
) -> Generation:
    """Decode in one call.

    Args:
        target: a Target or a model; or a known name or a folder, which `Target.load` loads anew in
            every call.
        drafter: a Drafter; or a name or a folder for `specdiff.drafters.load_drafter`; None: plain
            decoding.
        prompts: token ids: one prompt, or a batch whose rows may differ in length.
        k, rule, tree, lenience, record, backend, tokenizer: arguments of `Decoder`.
        max_new_tokens, sampling, seed, stop_tokens, stop_strings, logprobs, look_every, capture,
            block_size, blocks, process, ends: arguments of `Decoder.generate`.

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
        target, drafter, k, rule, tree=tree,
        lenience=lenience, record=record, backend=backend, tokenizer=tokenizer,
    )  # fmt: skip
    return decoder.generate(
        prompts, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed,
        stop_tokens=stop_tokens, stop_strings=stop_strings, logprobs=logprobs,
        look_every=look_every, capture=capture, block_size=block_size, blocks=blocks,
        process=process, ends=ends,
    )  # fmt: skip
