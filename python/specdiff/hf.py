"""The Hugging Face door: `model.generate(..., custom_generate=specdiff.hf.generate, drafter=...)`.

Everything that shapes the text is honoured, or refused with a reason: temperature, top_k, top_p and
min_p inside the verification; other logits processors on the rows that it reads, those that look at
the history one row after another; stopping criteria token by token.
"""

from __future__ import annotations

import inspect
import sys
import warnings
from collections.abc import Callable, Sequence
from copy import copy
from dataclasses import dataclass
from functools import partial, wraps
from types import FrameType
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import GenerationConfig, GenerationMixin, PreTrainedModel
from transformers.generation import logits_process as processors
from transformers.generation import stopping_criteria as criteria
from transformers.utils import ModelOutput

from specdiff_kernels import Lenience

from .drafters import load_drafter
from .files import stamped
from .loop.chooser import Chooser
from .loop.decoder import Decoder, as_rows
from .loop.drafter import Drafter
from .loop.fast_layers import is_accelerated
from .loop.sampling import Sampling
from .loop.session import Session, check_prompts
from .loop.stats import Stats
from .loop.target import Target

# functions of a row of scores alone: all rows of a round at once
ROW_ALONE = (
    processors.EpsilonLogitsWarper,
    processors.EtaLogitsWarper,
    processors.InfNanRemoveLogitsProcessor,
    processors.LogitNormalization,
    processors.MinPLogitsWarper,
    processors.SuppressTokensLogitsProcessor,
    processors.TemperatureLogitsWarper,
    processors.TopKLogitsWarper,
    processors.TopPLogitsWarper,
    processors.TypicalLogitsWarper,
)
# what `verify` does itself, in this order
FUSED = {
    processors.TemperatureLogitsWarper: "temperature",
    processors.TopKLogitsWarper: "top_k",
    processors.TopPLogitsWarper: "top_p",
    processors.MinPLogitsWarper: "min_p",
}
HIDDEN = ("streamer", "assistant_model", "synced_gpus")
REFUSED = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "runs the model by itself",
    "SynthIDTextWatermarkLogitsProcessor": "keeps state from token to token",
    "EncoderRepetitionPenaltyLogitsProcessor": "wants all rows at once",
    "EncoderNoRepeatNGramLogitsProcessor": "wants all rows at once",
}
HONOURED = {  # values of a GenerationConfig; what is not listed here works with any
    "num_beams": (None, 1),
    "penalty_alpha": (None, 0, 0.0),
    "dola_layers": (None,),
    "constraints": (None,),
    "force_words_ids": (None,),
    "prompt_lookup_num_tokens": (None,),
}
OUTPUTS = ("output_attentions", "output_hidden_states", "output_logits")  # that nobody keeps
CACHES = ("cache", "past_key_values")  # the name from transformers 5.24 on, and before
INPUTS = {  # what transformers hands over, or what changes no text
    "attention_mask", "cache_position", "logits_to_keep", "position_ids", "use_cache", *CACHES,
}  # fmt: skip


@dataclass
class GenerateOutput(ModelOutput):
    """What `generate` returns with return_dict_in_generate.

    Attributes:
        sequences: i64 [B, N], prompts as they came, new tokens, padding.
        logprobs: with output_scores, f32 [B, new tokens]: log-probability of each new token under
            the distribution that it was drawn from (greedy: the processed scores' softmax); 0 at
            padding. In the place of `scores`, whose V numbers a token nobody keeps here.
        stats: counts and times.
    """

    sequences: Tensor | None = None
    logprobs: Tensor | None = None
    stats: Stats | None = None


def in_own_mode(function: Callable[..., Any]) -> Callable[..., Any]:
    """Modules that were training, which a target is not, do so again afterwards."""

    @wraps(function)
    def call(model: PreTrainedModel, *args: Any, **options: Any) -> Any:
        modes = [(module, module.training) for module in model.modules()]
        try:
            return function(model, *args, **options)
        finally:
            for module, training in modes:
                module.training = training

    return call


@in_own_mode
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
    **model_kwargs: Any,
) -> Tensor | GenerateOutput:
    """Speculative decoding as a `custom_generate` of transformers' `generate`, which calls it.

    The text follows the distribution that `generate` samples from with the same arguments; greedy
    text is the same. (Rule "lenient": to within the mean of `stats.bias`.) Batches may be
    left-padded, rows are decoded as if each were alone, and `num_return_sequences` works.
    `cache_implementation` is
    taken as a wish: the cache is preallocated in any case.

    Args:
        drafter: an object, or a name that the command line knows, such as "prompt-lookup"; None is
            plain decoding.
        k, rule, lenience, record, backend: of `Decoder`.
        seed: one int, or one per returned sequence; None: drawn from torch's global generator.
        stop_strings: need `tokenizer=...` beside them. (In a GenerationConfig they do not work:
            transformers drops the tokenizer before it looks for it.)

    Processors and criteria that look at history are called with one row [1, N] at a time, and a
    processor for drafted tokens that will be rejected, too: they must be functions of their
    arguments. A text ends at the model's max_position_embeddings, with a warning.

    Returns:
        i64 [B, N], or with return_dict_in_generate a GenerateOutput.

    Raises:
        ValueError: an argument that cannot be honoured; the message names it.

    Example:
        >>> model.generate(
        ...     **tokenizer("Once upon a time", return_tensors="pt"),
        ...     custom_generate=specdiff.hf.generate,
        ...     drafter="prompt-lookup",
        ...     do_sample=True,
        ...     top_p=0.9,
        ... )
    """
    call = arguments_of_generate()
    config = generation_config
    check_honoured(config, logits_processor, call)
    mask = model_kwargs.get("attention_mask")
    check_inputs(model_kwargs, mask, input_ids)
    if len(input_ids) > 1 and call.get("streamer") is not None:
        raise ValueError("streamer: expected one sequence, got a batch; decode it row by row")
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
    if stop_strings is not None:
        others.append(stop_string_criterion(stop_strings, call.get("tokenizer")))
    session = decoder.open(
        len(prompts), min(longest, target.context_limit), sampling=sampling, stop_tokens=stops,
        process=Processing(first, padded, prompts, stops) if first else None,
        ends=partial(any_criterion, others, padded, input_ids.device) if others else None,
        logprobs=bool(config.return_dict_in_generate and config.output_scores),
    )  # fmt: skip
    seed = int(torch.randint(2**62, ())) if seed is None else seed
    session.admit(prompts, max_new_tokens=max_new_tokens, seed=seed)
    logprobs = run(session, call.get("streamer"))

    pad = 0 if config._pad_token_tensor is None else int(config._pad_token_tensor)
    ended = [p + t[len(q) :] for p, q, t in zip(padded, prompts, session.texts, strict=True)]
    sequences = right_padded(ended, pad, input_ids)
    if not config.return_dict_in_generate:
        return sequences
    chances = right_padded(logprobs, 0.0, torch.empty(0)) if session.logprobs else None
    return GenerateOutput(sequences=sequences, logprobs=chances, stats=session.stats)


def run(session: Session, streamer: Any) -> list[list[float]]:
    """Decode to the end of all rows. -> log-probabilities of their new tokens, if asked for"""
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


def arguments_of_generate() -> dict[str, Any]:
    """What `model.generate` was called with and does not hand to a callable.

    Its own frame has the streamer and an assistant; the tokenizer is left in its decorator's.
    """
    code = inspect.unwrap(GenerationMixin.generate).__code__
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    if frame is None:
        return {}
    found = {name: frame.f_locals.get(name) for name in HIDDEN}
    outer = frame.f_back.f_locals.get("kwargs") if frame.f_back is not None else None
    if isinstance(outer, dict) and "custom_generate" in outer:
        found["tokenizer"] = outer.get("tokenizer")
    return found


def check_honoured(config: GenerationConfig, listed: Sequence[Any], call: dict[str, Any]) -> None:
    asked = OUTPUTS if config.return_dict_in_generate else ()
    for name, values in {**HONOURED, **dict.fromkeys(asked, (None, False))}.items():
        if (value := getattr(config, name, None)) not in values:
            raise ValueError(f"{name}={value!r} cannot be honoured by speculative decoding")
    for name in ("assistant_model", "synced_gpus"):
        if call.get(name):
            raise ValueError(f"{name} cannot be honoured: pass drafter=..., on one device")
    for processor in listed:
        name = type(processor).__name__
        if name in REFUSED:
            raise ValueError(f"{name} cannot be honoured: it {REFUSED[name]}")


def check_inputs(given: dict[str, Any], mask: Tensor | None, input_ids: Tensor) -> None:
    """Raise for inputs of the model that would change its text and that the loop does not bring."""
    if given.get("inputs_embeds") is not None:
        raise ValueError("inputs_embeds cannot be drafted for: pass input_ids")
    for name in CACHES:
        cache = given.get(name)
        if cache is not None and cache.get_seq_length() > 0:
            raise ValueError(f"{name} holds tokens already: pass the whole text as input_ids")
    other = [name for name, value in given.items() if name not in INPUTS and value is not None]
    if other:
        raise ValueError(f"{other[0]} cannot be honoured: the target reads tokens alone")
    positions = given.get("position_ids")
    if positions is not None:
        real = torch.ones_like(input_ids) if mask is None else mask
        counted = real.long().cumsum(1) - 1
        if ((positions != counted) & (real != 0)).any():
            raise ValueError("position_ids cannot be honoured: expected each text's own 0, 1, 2...")


def longest_of(config: GenerationConfig, listed: Sequence[Any]) -> int:
    """Most tokens of a text, its padding included."""
    lengths = [c.max_length for c in listed if type(c) is criteria.MaxLengthCriteria]
    return min([config.max_length, *lengths])


_loaded: WeakKeyDictionary[Any, dict[str, tuple[Any, Drafter]]] = WeakKeyDictionary()


def named_drafter(name: str, target: Target) -> Drafter:
    """A drafter whose weights are read once for each state of a model, and whose own state is the
    caller's."""
    embedding = target.model.get_input_embeddings().weight
    state = (
        target.device, target.dtype, is_accelerated(target.model), embedding.data_ptr(),
        stamped(name),
    )  # fmt: skip
    known = _loaded.setdefault(target.model, {})
    if name not in known or known[name][0] != state:
        known[name] = state, load_drafter(name, target)
    return copy(known[name][1])


def split(listed: Sequence[Any], samples: bool) -> tuple[Sampling, list[Any]]:
    """What `verify` does itself, and the processors that come before.

    Temperature, top-k, top-p and min-p are fused where they come last, in this order.
    """
    first = list(listed)
    if not samples:
        return Sampling(), first
    fused: dict[str, Any] = {"temperature": 1.0}
    order = list(FUSED)
    while first and type(first[-1]) in order and plain(first[-1]):
        place = order.index(type(first[-1]))
        name = FUSED[order[place]]
        fused[name] = getattr(first.pop(), name)
        order = order[:place]
    return Sampling(**fused), first


def plain(warper: Any) -> bool:
    """Whether it drops what it drops altogether, and may leave a single token."""
    return (
        getattr(warper, "filter_value", -float("inf")) == -float("inf")
        and getattr(warper, "min_tokens_to_keep", 1) == 1
    )


class Processing:
    """Logits processors applied to the K + 1 rows of each sequence, in their order.

    Row i of a sequence is seen behind its text and the first i drafted tokens, as if these had been
    emitted; so what stands in the end was processed as by decoding token by token.

    Args:
        listed: the processors.
        padded: i64 rows as they came to `generate`: processors see the padding too.
        prompts: the same without padding.
        stops: ids that end a text, behind which no processor looks.
    """

    def __init__(
        self,
        listed: Sequence[Any],
        padded: list[list[int]],
        prompts: list[list[int]],
        stops: Sequence[int] = (),
    ) -> None:
        self.listed = listed
        self.padded = padded
        self.stops = frozenset(stops)
        self.padding = [len(p) - len(q) for p, q in zip(padded, prompts, strict=True)]

    def __call__(self, texts: list[list[int]], drafted: Tensor, logits: Tensor) -> Tensor:
        """logits [B, K + 1, V] in any float dtype -> f32"""
        scores = logits.float()
        B, Q, V = scores.shape
        for processor in self.listed:
            if type(processor) in ROW_ALONE:
                none = drafted.new_empty(B * Q, 0)
                scores = processor(none, scores.reshape(B * Q, V)).view(B, Q, V)
            else:
                rows = [
                    self._sequence(b, processor, text, drafted[b], scores[b])
                    for b, text in enumerate(texts)
                ]
                scores = torch.stack(rows)
        return scores

    def _sequence(
        self, b: int, processor: Any, text: list[int], drafted: Tensor, scores: Tensor
    ) -> Tensor:
        """scores [K + 1, V] of a sequence, row by row"""
        processor = of_row(processor, b)
        seen = torch.tensor(self.padded[b][: self.padding[b]] + text, device=drafted.device)
        seen = torch.cat([seen, drafted])[None]
        start = seen.shape[1] - len(drafted)
        rows: list[Tensor] = []
        for i, row in enumerate(scores[:, None]):
            rows.append(processor(seen[:, : start + i], row.clone()))
            if i < len(drafted) and (
                rows[i][0, drafted[i]] == -torch.inf or int(drafted[i]) in self.stops
            ):
                break  # it is rejected or ends the text, and no text has it for its history
        return torch.cat([*rows, scores[len(rows) :]])


def of_row(processor: Any, b: int) -> Any:
    """The processor as row b of the batch sees it, if it tells rows apart."""
    if isinstance(processor, processors.PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        return type(processor)(lambda _, ids: allowed(b, ids), num_beams=1)
    ignored = getattr(processor, "prompt_ignore_length", None)
    if isinstance(ignored, Tensor):  # [B], the left padding
        processor = copy(processor)
        processor.prompt_ignore_length = ignored[b : b + 1]
    return processor


def split_criteria(listed: Sequence[Any]) -> tuple[list[int], list[Any]]:
    """Ids that end a row, and the criteria other than these and the length."""
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
    listed: list[Any], padded: list[list[int]], device: torch.device, row: int, new: list[int]
) -> bool:
    """Whether a row ends with the last of its new tokens."""
    ids = torch.tensor([padded[row] + new], device=device)
    return any(bool(torch.as_tensor(criterion(ids, None)).all()) for criterion in listed)


def unpadded(rows: list[list[int]], mask: Tensor | None) -> list[list[int]]:
    """Rows without their padding on the left. mask: [B, N], or None: there is none"""
    if mask is None:
        return rows
    if (mask.long().diff(dim=1) < 0).any():
        raise ValueError(
            "attention_mask must be 0 on the left alone: use padding_side='left', and pass the "
            "mask if a text may hold the pad token"
        )
    counts = mask.long().sum(1).tolist()
    return [row[len(row) - n :] for row, n in zip(rows, counts, strict=True)]


def right_padded(rows: list[list[Any]], blank: Any, like: Tensor) -> Tensor:
    longest = max(map(len, rows))
    return torch.tensor(
        [row + [blank] * (longest - len(row)) for row in rows], dtype=like.dtype, device=like.device
    )
