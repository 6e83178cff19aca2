"""Logits processors of transformers' `generate`: those that `verify` applies, and those before it.

Processors of a text run on each row of logits that verification reads, with the drafted tokens
before it as the history.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from itertools import takewhile
from typing import Any

import torch
from torch import Tensor
from transformers.generation import logits_process as processors

from ..loop.sampling import Sampling
from .copies import Uncopyable, copied


class TopP:
    """TopPLogitsWarper, mostly without its sort of the whole vocabulary.

    Where several tokens are equally likely at the border, transformers keeps those that its sort
    happens to put last, and `specdiff.Sampling` all of them. So rows with such tokens are left to
    transformers, and those where the border lies too close to a sum to tell.

    Args:
        warper: transformers' own.
    """

    LIKELIEST = 1024  # tokens that are sorted; most rows need no more
    CLEAR = 1e-5  # more than the error of transformers' fp32 sums

    def __init__(self, warper: processors.TopPLogitsWarper) -> None:
        self.warper = warper

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """scores [N, V] f32 -> the same with the filter value at what is dropped"""
        warper, V = self.warper, scores.shape[-1]
        n = min(max(self.LIKELIEST, warper.min_tokens_to_keep), V)
        values = scores.topk(n).values  # [N, n], descending
        total = scores.double().logsumexp(-1, keepdim=True)
        chances = (values.double() - total).exp()
        before = chances.cumsum(-1) - chances
        kept = (before < warper.top_p).sum(-1, keepdim=True)
        kept = kept.clamp(min=min(warper.min_tokens_to_keep, V))
        keep = scores >= values.gather(-1, kept - 1)
        near = (before[:, 1:] - warper.top_p).abs() < self.CLEAR
        unclear = near.any(-1) | (keep.sum(-1) != kept[:, 0])
        if values.shape[1] < V:
            unclear |= kept[:, 0] == values.shape[1]
        result = scores.masked_fill(~keep, warper.filter_value)
        if unclear.any():
            result[unclear] = warper(input_ids, scores[unclear])
        return result


# these depend on the row of scores only, so they run on all rows of a round at once
ROW_ALONE = (
    processors.EpsilonLogitsWarper,
    processors.EtaLogitsWarper,
    processors.InfNanRemoveLogitsProcessor,
    processors.LogitNormalization,
    processors.MinPLogitsWarper,
    processors.SuppressTokensLogitsProcessor,
    processors.TemperatureLogitsWarper,
    processors.TopKLogitsWarper,
    processors.TypicalLogitsWarper,
    TopP,
)
# `verify` applies these itself, in this order
FUSED = {
    processors.TemperatureLogitsWarper: "temperature",
    processors.TopKLogitsWarper: "top_k",
    processors.MinPLogitsWarper: "min_p",
}
REFUSED = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "runs the model itself",
    "SynthIDTextWatermarkLogitsProcessor": "keeps state from token to token",
    "EncoderRepetitionPenaltyLogitsProcessor": "needs all rows at once",
    "EncoderNoRepeatNGramLogitsProcessor": "needs all rows at once",
}


def split(listed: Sequence[Any], samples: bool) -> tuple[Sampling, list[Any]]:
    """Split processors into the sampling parameters of `verify` and those that run before it.

    Temperature, top-k and min-p are fused if they come last, in this order. Top-p is not: `verify`
    keeps all tokens that are equally likely at its border.
    """
    first = [TopP(one) if type(one) is processors.TopPLogitsWarper else one for one in listed]
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
    """Whether a warper sets dropped tokens to -inf and may keep a single token."""
    return (
        getattr(warper, "filter_value", -float("inf")) == -float("inf")
        and getattr(warper, "min_tokens_to_keep", 1) == 1
    )


class Chain:
    """The processors of one text, from the first that looks at its history on.

    A round's first row is processed for a token that will stand: by the processors themselves.
    Rows behind drafted tokens are processed by copies, since the tokens may be rejected. Rows whose
    tokens stood are then shown to the processors themselves, too, so that these see one call for
    each emitted token, in order, as in `generate`.

    Args:
        listed: the processors.
        padding: tokens before the prompt, which processors see.
        stops: ids that end the text; processors do not run behind them.
    """

    def __init__(self, listed: Sequence[Any], padding: list[int], stops: frozenset[int]) -> None:
        self.listed, self.padding, self.stops = listed, padding, stops
        self.may_keep_state = not all(map(is_stateless, listed))
        self.length = 0  # of the text, in the latest round
        self.called = 0  # rows of that round that the processors themselves have seen
        self.waiting: list[tuple[Tensor, Tensor]] = []  # its rows behind drafted tokens

    def advance(self, length: int) -> None:
        """Show the processors the rows of the latest round that stand in a text of this length."""
        stood = min(length - self.length, 1 + len(self.waiting))
        while 0 < self.called < stood:
            seen, scores = self.waiting[self.called - 1]
            self.called += 1
            process(self.listed, seen, scores)

    def __call__(self, text: list[int], drafted: Tensor, scores: Tensor) -> Tensor:
        """scores [K + 1, V] -> processed; rows that cannot count any more are left as they are"""
        if self.length == len(text):  # it has ended
            return scores
        self.advance(len(text))
        self.length, self.called, self.waiting = len(text), 1, []
        start = len(self.padding) + len(text)
        seen = torch.tensor([*self.padding, *text], device=drafted.device)
        seen = torch.cat([seen, drafted])[None]
        rows = [process(self.listed, seen[:, :start], scores[:1])]
        copies = self.listed
        for i, token in enumerate(drafted.tolist(), 1):
            if rows[-1][0, token] == -torch.inf or token in self.stops:
                break  # it is rejected, or ends the text
            given = seen[:, : start + i], scores[i : i + 1]
            try:
                if self.may_keep_state:
                    copies = copied(self.listed) if i == 1 else copies
                    self.waiting.append(given)
                rows.append(process(copies, *given))
            except Uncopyable as error:
                raise ValueError(
                    f"a logits processor keeps {error}, which cannot be copied: pass drafter=None"
                ) from error
            except Exception:
                if not self.may_keep_state:
                    raise
                break  # raised again, by `advance`, if this row counts
        return torch.cat([*rows, scores[len(rows) :]])


class Processing:
    """Logits processors applied to the K + 1 rows of each sequence, in their order.

    For row i of a sequence, processors see its text and the first i drafted tokens as the history.
    Every emitted token is therefore processed as in token-by-token decoding.

    Args:
        listed: the processors. With several sequences, each has copies of its own.
        padded: token rows as given to `generate`: processors see the padding too.
        prompts: the same rows without padding.
        stops: ids that end a text. Processors do not run after them.

    Attributes:
        rigid: what a processor keeps that cannot be copied, or None. It may be called once for each
            emitted token only, so no drafts may be made.

    Raises:
        ValueError: such a processor, and more than one sequence.
    """

    def __init__(
        self,
        listed: Sequence[Any],
        padded: list[list[int]],
        prompts: list[list[int]],
        stops: Sequence[int] = (),
    ) -> None:
        self.alone = [*takewhile(lambda one: type(one) in ROW_ALONE, listed)]
        rest = listed[len(self.alone) :]
        several, keeps = len(prompts) > 1, not all(map(is_stateless, rest))
        self.rigid: str | None = None
        try:
            copied(rest if keeps else [])
        except Uncopyable as error:
            self.rigid = str(error)
            if several:
                raise ValueError(
                    f"a logits processor keeps {error}, which cannot be copied, as a batch needs "
                    "it: decode the rows one by one, or give it a method fork()"
                ) from error
        self.lengths = [len(prompt) for prompt in prompts]
        self.chains: list[Chain] = []  # of each sequence, if there is anything behind `alone`
        for b, length in enumerate(self.lengths if rest else []):
            own = copied(rest) if several and keeps else rest
            padding = padded[b][: len(padded[b]) - length]
            self.chains.append(Chain([of_row(one, b) for one in own], padding, frozenset(stops)))

    def __call__(self, texts: list[list[int]], drafted: Tensor, logits: Tensor) -> Tensor:
        """logits [B, K + 1, V] in any float dtype -> processed scores in f32"""
        scores = logits.float()
        rows, none = scores.flatten(0, 1), drafted.new_empty(scores[..., 0].numel(), 0)
        for processor in self.alone:
            rows = processor(none, rows)
        scores = rows.view(scores.shape)
        each = zip(self.chains, texts, drafted, scores, strict=True) if self.chains else ()
        done = [chain(text, own, part) for chain, text, own, part in each]
        return torch.stack(done) if done else scores

    def advance(self, b: int, new: int) -> None:
        """Let the processors of sequence b see that so many new tokens of it stand."""
        if self.chains:
            self.chains[b].advance(self.lengths[b] + new)


def process(listed: Sequence[Any], seen: Tensor, scores: Tensor) -> Tensor:
    """The scores [1, V] of the token behind the ids [1, N], by one processor after another."""
    shape, result = scores.shape, scores.clone()
    for processor in listed:
        result = processor(seen, result)
        if not isinstance(result, Tensor) or result.shape != shape:
            came = list(result.shape) if isinstance(result, Tensor) else type(result).__name__
            raise ValueError(
                f"logits processor {name_of(processor)}: expected scores of shape {list(shape)} "
                f"back, got {came}"
            )
    return result.float()


def is_stateless(processor: Any) -> bool:
    """Whether it is one of transformers' classes, which keep no state, and calls no function of a
    user's."""
    kind = type(processor)
    own = kind.__module__.startswith("transformers.") or kind is TopP
    return own and kind is not processors.PrefixConstrainedLogitsProcessor


def name_of(processor: Any) -> str:
    return getattr(processor, "__name__", type(processor).__name__)


def of_row(processor: Any, b: int) -> Any:
    """The processor for row b of the batch, if it treats rows differently."""
    if isinstance(processor, processors.PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        return type(processor)(lambda _, ids: allowed(b, ids), num_beams=1)
    ignored = getattr(processor, "prompt_ignore_length", None)
    if isinstance(ignored, Tensor):  # [B], width of the left padding
        processor = copy(processor)
        processor.prompt_ignore_length = ignored[b : b + 1]
    return processor
