"""`generate`: what transformers hands to a `custom_generate` function, decoded with drafts."""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from functools import partial, wraps
from threading import Lock
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import stopping_criteria as criteria
from transformers.utils import ModelOutput

from specdiff_kernels import Lenience

from ..drafters import load_drafter
from ..files import stamped
from ..loop.arguments import as_rows, check_prompts
from ..loop.chooser import Chooser
from ..loop.decoder import Decoder
from ..loop.drafter import Drafter
from ..loop.fast_layers import is_accelerated
from ..loop.only_packed import memory_of
from ..loop.session import Session
from ..loop.stats import Stats
from ..loop.target import Target
from .processors import REFUSED, Processing, split

CONSUMED = ("streamer", "assistant_model", "synced_gpus")  # arguments that generate keeps
HONOURED = {  # supported values of GenerationConfig fields; fields not listed support every value
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "prompt_lookup_num_tokens": (None,),
}
OUTPUTS = ("output_attentions", "output_hidden_states", "output_logits")  # not kept here
ABSENT = {  # fields of transformers' outputs, and what there is in their place
    "scores": "`logprobs` has the log-probability of each new token, with output_scores=True",
    "logits": "`logprobs` has the log-probability of each new token, with output_scores=True",
    "past_key_values": "the cache ends with the call; the next turn has to read its text anew",
    "cache": "the cache ends with the call; the next turn has to read its text anew",
    "attentions": "verification reads none",
    "hidden_states": "use specdiff.Target.forward, which returns them",
}
CACHES = ("cache", "past_key_values")  # the name since transformers 5.24, and before
INPUTS = {  # handed over by transformers, or without effect on the text
    "attention_mask", "cache_position", "logits_to_keep", "position_ids", "use_cache", *CACHES,
}  # fmt: skip


@dataclass
class GenerateOutput(ModelOutput):
    """Result of `generate` with return_dict_in_generate.

    Attributes:
        sequences: i64 [B, N], the prompts as given, new tokens, padding.
        logprobs: with output_scores, f32 [B, new tokens]: log-probability of each new token under
            the distribution that it was drawn from (greedy: the softmax of the processed scores);
            0 at padding. It replaces `scores`, whose V numbers a token are not kept.
        stats: counts and times.
    """

    sequences: Tensor | None = None
    logprobs: Tensor | None = None
    stats: Stats | None = None

    def __getattr__(self, name: str) -> Any:
        if name in ABSENT:
            raise AttributeError(f"specdiff.hf.generate keeps no {name}: {ABSENT[name]}")
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")


_evaluated: WeakKeyDictionary[Any, tuple[int, list[tuple[Any, bool]]]] = WeakKeyDictionary()
_lock = Lock()


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Eval mode; the last of several threads puts back the modes that the first one found."""
    with _lock:
        users, modes = _evaluated.get(model, (0, []))
        if not users:
            modes = [(module, module.training) for module in model.modules()]
            model.eval()
        _evaluated[model] = users + 1, modes
    try:
        yield
    finally:
        with _lock:
            users, modes = _evaluated.pop(model)
            if users > 1:
                _evaluated[model] = users - 1, modes
            else:
                for module, training in modes:
                    module.training = training


def in_eval_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(function)
    def call(model: PreTrainedModel, *args: Any, **options: Any) -> Any:
        with evaluating(model):
            return function(model, *args, **options)

    return call


@in_eval_mode
def generate(
    model: PreTrainedModel,
    input_ids: Tensor,
    logits_processor: Sequence[Any],
    stopping_criteria: Sequence[Any],
    generation_config: GenerationConfig,
    *,
    drafter: Drafter | str | None = None,
    k: int | Chooser | None = None,
    rule: str = "token",
    lenience: Lenience | None = None,
    record: str | None = None,
    backend: str | None = None,
    seed: int | Sequence[int] | None = None,
    stop_strings: str | Sequence[str] | None = None,
    tokenizer: Any = None,
    streamer: Any = None,
    assistant_model: Any = None,
    synced_gpus: bool | None = None,
    **model_kwargs: Any,
) -> Tensor | GenerateOutput:
    """Speculative decoding for the `custom_generate` argument of transformers' `generate`.

    The text follows the distribution that `generate` samples from with the same arguments; greedy
    text is the same. (Rule "lenient": to within the mean of `stats.bias`.) Batches may be
    left-padded. Each row is decoded as if it were alone. `num_return_sequences` works.
    `cache_implementation` has no effect: the cache is always preallocated.

    Args:
        drafter: an object, or a drafter's name on the command line, such as "prompt-lookup"; None
            decodes without drafts.
        k, rule, lenience, record, backend: see `Decoder`.
        seed: one int, or one per returned sequence; None: drawn from torch's global generator.
        stop_strings: these need `tokenizer=...` as well. (They do not work in a GenerationConfig:
            transformers drops the tokenizer first.)
        tokenizer, streamer: as of `model.generate`.
        assistant_model, synced_gpus: refused.

    Processors and criteria that look at the history get one row [1, N] at a time. Processors also
    run on drafted tokens that are rejected later. Those of your own then run on copies (a grammar
    matcher on its `fork()`), so that their state is that of one call for each emitted token. One
    that cannot be copied is called token by token, without drafts.

    A text ends at the model's max_position_embeddings, with a warning.

    Returns:
        i64 [B, N], or with return_dict_in_generate a GenerateOutput.

    Raises:
        ValueError: an argument is not supported; the message names it.

    Example:
        >>> model.generate(
        ...     **tokenizer("Once upon a time", return_tensors="pt"),
        ...     custom_generate=specdiff.hf.generate,
        ...     drafter="prompt-lookup",
        ...     do_sample=True,
        ...     top_p=0.9,
        ... )
    """
    call = {
        "tokenizer": tokenizer,
        "streamer": streamer,
        "assistant_model": assistant_model,
        "synced_gpus": synced_gpus,
    }
    kept = kept_by_generate()
    call = {name: kept.get(name) if value is None else value for name, value in call.items()}
    config = generation_config
    check_honoured(config, logits_processor, call)
    mask = model_kwargs.get("attention_mask")
    check_inputs(model_kwargs, mask, input_ids)
    if len(input_ids) > 1 and call["streamer"] is not None:
        raise ValueError("streamer: expected one sequence, got a batch; decode the rows one by one")
    prepares = getattr(model.prepare_inputs_for_generation, "__self__", model)
    if prepares is not model:
        raise ValueError(
            f"a {type(prepares).__name__} prepares the inputs of this model, as prompt, prefix and "
            "p-tuning do, which is not supported"
        )
    target = Target(model)
    if isinstance(drafter, str):
        drafter = named_drafter(drafter, target)
    decoder = Decoder(target, drafter, k, rule, lenience=lenience, record=record, backend=backend)

    padded = as_rows(input_ids)
    prompts = unpadded(padded, mask)
    max_new_tokens = longest_of(config, stopping_criteria) - input_ids.shape[1]
    check_prompts(target, prompts, max_new_tokens)
    longest = max(map(len, prompts)) + max_new_tokens
    if longest > target.context_limit:
        warnings.warn(
            f"texts end at the model's {target.context_limit} positions, before {longest} tokens",
            stacklevel=3,
        )
    sampling, first = split(logits_processor, config.do_sample)
    stops, others = split_criteria(stopping_criteria)
    processing = Processing(first, padded, prompts, stops) if first else None
    if processing is not None and processing.rigid is not None and drafter is not None:
        warnings.warn(
            f"a logits processor keeps {processing.rigid}, which cannot be copied. It must not see "
            "drafted tokens, so this text is decoded without drafts; a method fork() would help",
            stacklevel=3,
        )
        decoder = decoder.replace(drafter=None)
    if stop_strings is not None:
        others.append(stop_string_criterion(stop_strings, call["tokenizer"]))
    session = decoder.open(
        len(prompts), min(longest, target.context_limit), sampling=sampling, stop_tokens=stops,
        process=processing,
        ends=partial(any_criterion, others, padded, processing, input_ids.device)
        if others else None,
        logprobs=bool(config.return_dict_in_generate and config.output_scores),
    )  # fmt: skip
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    session.admit(prompts, max_new_tokens=max_new_tokens, seed=seed)
    logprobs = run(session, call["streamer"])
    if processing is not None:  # which still has to see the last round's tokens
        for b, (text, prompt) in enumerate(zip(session.texts, prompts, strict=True)):
            processing.advance(b, len(text) - len(prompt))

    pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
    ended = [p + t[len(q) :] for p, q, t in zip(padded, prompts, session.texts, strict=True)]
    sequences = right_padded(ended, pad, input_ids)
    if not config.return_dict_in_generate:
        return sequences
    chances = right_padded(logprobs, 0.0, torch.empty(0)) if session.logprobs else None
    return GenerateOutput(sequences=sequences, logprobs=chances, stats=session.stats)


def run(session: Session, streamer: Any) -> list[list[float]]:
    """Decode all rows to their end. -> log-probabilities of new tokens, empty if not requested"""
    logprobs: list[list[float]] = [[] for _ in session.done]
    while not all(session.done):
        step = session.step()
        for known, more in zip(logprobs, step.logprobs or [[]] * len(logprobs), strict=True):
            known += more
        if streamer is not None:
            streamer.put(torch.tensor(step.tokens[0]))
    if streamer is not None:
        streamer.end()
    return logprobs


def kept_by_generate() -> dict[str, Any]:
    """Arguments of `model.generate` that it keeps from a `custom_generate` function.

    transformers 5.17 to 5.24 pass such a function neither the streamer nor the assistant nor the
    tokenizer, whatever its signature says (`GenerationMixin._extract_generation_mode_kwargs`), so
    they are read where they stand: in the frame of `generate`, the tokenizer in its decorator's. A
    version that passes them is given precedence.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    if frame is None:
        return {}
    found = {name: frame.f_locals.get(name) for name in CONSUMED}
    outer = frame.f_back.f_locals.get("kwargs") if frame.f_back is not None else None
    if isinstance(outer, dict) and "custom_generate" in outer:
        found["tokenizer"] = outer.get("tokenizer")
    return found


def check_honoured(config: GenerationConfig, listed: Sequence[Any], call: dict[str, Any]) -> None:
    asked = OUTPUTS if config.return_dict_in_generate else ()
    for name, values in {**HONOURED, **dict.fromkeys(asked, (None, False))}.items():
        if (value := getattr(config, name, None)) not in values:
            raise ValueError(f"{name}={value!r} is not supported by speculative decoding")
    for name in ("assistant_model", "synced_gpus"):
        if call.get(name):
            raise ValueError(f"{name} is not supported: pass drafter=... and use one device")
    for processor in listed:
        name = type(processor).__name__
        if name in REFUSED:
            raise ValueError(f"{name} is not supported: it {REFUSED[name]}")


def check_inputs(given: dict[str, Any], mask: Tensor | None, input_ids: Tensor) -> None:
    """Raise ValueError for model inputs that change the text but are unsupported by the loop."""
    if given.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds is not supported: pass input_ids")
    for name in CACHES:
        cache = given.get(name)
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(f"{name} already holds tokens: pass the whole text as input_ids")
    other = [name for name, value in given.items() if name not in INPUTS and value is not None]
    if other:
        raise ValueError(f"{other[0]} is not supported: the target reads only tokens")
    positions = given.get("position_ids")
    if positions is not None:
        real = torch.ones_like(input_ids) if mask is None else mask
        counted = real.long().cumsum(1) - 1
        if ((positions != counted) & (real != 0)).any():
            raise ValueError("position_ids: expected 0, 1, 2... in each row, got other positions")


def longest_of(config: GenerationConfig, listed: Sequence[Any]) -> int:
    """Maximum number of tokens of a sequence, left padding included."""
    lengths = [c.max_length for c in listed if type(c) is criteria.MaxLengthCriteria]
    return min([config.max_length, *lengths])


_loaded: WeakKeyDictionary[Any, dict[str, tuple[Any, Drafter]]] = WeakKeyDictionary()


def named_drafter(name: str, target: Target) -> Drafter:
    """A named drafter for `target`. Its weights are loaded once for each state of the model.

    Each call returns a copy, so that callers do not share the drafter's state.
    """
    embedding = target.model.get_input_embeddings().weight
    state = (
        target.device, target.dtype, is_accelerated(target.model), memory_of(embedding).data_ptr(),
        stamped(name),
    )  # fmt: skip
    known = _loaded.setdefault(target.model, {})
    if name not in known or known[name][0] != state:
        known[name] = state, load_drafter(name, target)
    return copy(known[name][1])


def split_criteria(listed: Sequence[Any]) -> tuple[list[int], list[Any]]:
    """Token ids that end a row, and the other criteria except the maximum length."""
    stops: list[int] = []
    others = []
    for criterion in listed:
        if type(criterion) is criteria.EosTokenCriteria:
            stops += criterion.eos_token_id.tolist()
        elif type(criterion) is not criteria.MaxLengthCriteria:
            others.append(criterion)
    return stops, others


def stop_string_criterion(strings: str | Sequence[str], tokenizer: Any) -> Any:
    if tokenizer is None:
        raise ValueError("stop_strings need the model's tokenizer: pass tokenizer=... as well")
    strings = [strings] if isinstance(strings, str) else list(strings)
    return criteria.StopStringCriteria(tokenizer=tokenizer, stop_strings=strings)


def any_criterion(
    listed: list[Any],
    padded: list[list[int]],
    processing: Processing | None,
    device: torch.device,
    row: int,
    new: list[int],
) -> bool:
    """Whether a row ends with its last new token. A criterion may look at a processor's state."""
    if processing is not None:
        processing.advance(row, len(new))
    ids = torch.tensor([padded[row] + new], device=device)
    return any(bool(torch.as_tensor(criterion(ids, None)).all()) for criterion in listed)


def unpadded(rows: list[list[int]], mask: Tensor | None) -> list[list[int]]:
    """Rows without their left padding. mask: [B, N], or None if nothing is padded"""
    if mask is None:
        return rows
    if (mask.long().diff(dim=1) < 0).any():
        raise ValueError(
            "attention_mask: expected zeros on the left only; use padding_side='left', and pass "
            "the mask if the text itself may contain the pad token"
        )
    counts = mask.long().sum(1).tolist()
    return [row[len(row) - n :] for row, n in zip(rows, counts, strict=True)]


def right_padded(rows: list[list[Any]], blank: Any, like: Tensor) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor(
        [row + [blank] * (longest - len(row)) for row in rows], dtype=like.dtype, device=like.device
    )
