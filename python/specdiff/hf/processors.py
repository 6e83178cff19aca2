"""Logits processors of transformers' `generate`: those that `verify` applies, and those before it.

Processors of a text run on each row of logits that verification reads, with the drafted tokens
before it as the history.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from types import BuiltinFunctionType, CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase
from transformers.generation import logits_process as processors

from ..loop.sampling import Sampling


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
        values = scores.topk(min(self.LIKELIEST, V)).values  # [N, n], descending
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


class History:
    """A processor with a state, for one text: the state after each call of the latest round.

    Drafted tokens may be rejected, so the state goes on from the calls whose tokens stood: the
    processor is called as if token by token.
    """

    def __init__(self, processor: Any) -> None:
        self.states, self.length = [processor], 0

    def follow(self, length: int) -> bool:
        """Go on from the state of a text of this length. -> whether the text has grown"""
        stood = length - self.length if self.length else 0
        if self.length and not stood:
            return False
        self.states, self.length = [self.states[stood]], length
        return True

    def __call__(self, seen: Tensor, scores: Tensor) -> Tensor:
        processor = snapshot(self.states[-1])
        scores = processor(seen, scores)
        self.states.append(processor)
        return scores


class Processing:
    """Logits processors applied to the K + 1 rows of each sequence, in their order.

    For row i of a sequence, processors see its text and the first i drafted tokens as the history.
    Every emitted token is therefore processed as in token-by-token decoding.

    Args:
        listed: the processors.
        padded: token rows as given to `generate`: processors see the padding too.
        prompts: the same rows without padding.
        stops: ids that end a text. Processors do not run after them.

    Attributes:
        rigid: the first processor whose state cannot be copied, or None. It may be called once for
            each emitted token only, so no drafts may be made.

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
        self.listed = listed
        self.padded = padded
        self.stops = frozenset(stops)
        self.padding = [len(p) - len(q) for p, q in zip(padded, prompts, strict=True)]
        own = {n: one for n, one in enumerate(listed) if not is_transformers(one)}
        rigid = [n for n, one in own.items() if not can_be_copied(one)]
        self.rigid = own[rigid[0]] if rigid else None
        if rigid and len(prompts) > 1:
            raise ValueError(
                f"{name_of(self.rigid)} keeps what cannot be copied, which a batch needs: decode "
                "the rows one by one, or give it a method fork()"
            )
        # of each sequence, by the processor's place in the list
        self.histories = [
            {n: History(one) for n, one in own.items() if n not in rigid} for _ in prompts
        ]

    def __call__(self, texts: list[list[int]], drafted: Tensor, logits: Tensor) -> Tensor:
        """logits [B, K + 1, V] in any float dtype -> processed scores in f32"""
        scores = logits.float()
        B, Q, V = scores.shape
        for n, processor in enumerate(self.listed):
            if type(processor) in ROW_ALONE:
                none = drafted.new_empty(B * Q, 0)
                scores = processor(none, scores.reshape(B * Q, V)).view(B, Q, V)
            else:
                each = enumerate(texts)
                rows = [self._sequence(b, n, text, drafted[b], scores[b]) for b, text in each]
                scores = torch.stack(rows)
        return scores

    def _sequence(self, b: int, n: int, text: list[int], drafted: Tensor, scores: Tensor) -> Tensor:
        """Process the scores [K + 1, V] of one sequence by processor n, row by row."""
        history = self.histories[b].get(n)
        if history is not None and not history.follow(len(text)):
            return scores  # the text has ended
        processor = of_row(self.listed[n], b) if history is None else history
        seen = torch.tensor(self.padded[b][: self.padding[b]] + text, device=drafted.device)
        seen = torch.cat([seen, drafted])[None]
        start = seen.shape[1] - len(drafted)
        rows: list[Tensor] = []
        for i, row in enumerate(scores[:, None]):
            rows.append(processor(seen[:, : start + i], row.clone()))
            if i < len(drafted) and (
                rows[i][0, drafted[i]] == -torch.inf or int(drafted[i]) in self.stops
            ):
                break  # this token is rejected or ends the text, so no later row counts
        return torch.cat([*rows, scores[len(rows) :]])

    def settle(self, texts: list[list[int]]) -> None:
        """After the last round of a single text: leave processors as token by token would have."""
        if len(texts) > 1:
            return
        for n, history in self.histories[0].items():
            if history.follow(len(texts[0])) and hasattr(self.listed[n], "__dict__"):
                vars(self.listed[n]).update(vars(history.states[0]))


def is_transformers(processor: Any) -> bool:
    """Whether it is one of transformers' classes, which keep no state."""
    return type(processor) is TopP or type(processor).__module__.startswith("transformers.")


def name_of(processor: Any) -> str:
    return getattr(processor, "__name__", type(processor).__name__)


# nothing that a processor holds of these changes from call to call
SHARED = (nn.Module, PreTrainedTokenizerBase, ModuleType, BuiltinFunctionType, type)
FROZEN = {("xgrammar", "CompiledGrammar"), ("xgrammar", "TokenizerInfo")}  # cannot be copied


def can_be_copied(processor: Any) -> bool:
    try:
        snapshot(processor)
    except Exception:  # whatever its parts raise
        return False
    return True


def snapshot(processor: Any) -> Any:
    """A copy of a processor with its state. What has a method `fork`, as grammar matchers have, is
    forked; functions keep copies of what they close over."""
    memo: dict[int, Any] = {}
    fork(processor, memo, set())
    return copy.deepcopy(processor, memo)


def fork(value: Any, memo: dict[int, Any], seen: set[int]) -> None:
    """Note in `memo` how to copy the parts of a value that `deepcopy` would copy wrongly."""
    if id(value) in seen:
        return
    seen.add(id(value))
    kind = type(value).__module__.partition(".")[0], type(value).__name__
    parts: list[Any] = []
    if isinstance(value, SHARED) or kind in FROZEN:
        memo[id(value)] = value
    elif callable(getattr(value, "fork", None)):
        memo[id(value)] = value.fork()
    elif isinstance(value, torch.Generator):
        memo[id(value)] = value.clone_state()
    elif isinstance(value, FunctionType):
        memo[id(value)] = with_own_cells(value, memo, seen)
    elif isinstance(value, (list, tuple, set, frozenset)):
        parts = [*value]
    elif isinstance(value, dict):
        parts = [*value.values()]
    elif isinstance(value, MethodType):
        parts = [value.__self__]
    elif hasattr(value, "__dict__") and not isinstance(value, Tensor):
        parts = [*vars(value).values()]
    for part in parts:
        fork(part, memo, seen)


def with_own_cells(function: FunctionType, memo: dict[int, Any], seen: set[int]) -> FunctionType:
    """The function over copies of what it closes over."""
    if not function.__closure__:
        return function
    contents = [cell.cell_contents for cell in function.__closure__]
    for content in contents:
        fork(content, memo, seen)
    cells = tuple(CellType(copy.deepcopy(content, memo)) for content in contents)
    own = FunctionType(
        function.__code__, function.__globals__, function.__name__, function.__defaults__, cells
    )
    own.__kwdefaults__ = function.__kwdefaults__
    return own


def of_row(processor: Any, b: int) -> Any:
    """The processor for row b of the batch, if it treats rows differently."""
    if isinstance(processor, processors.PrefixConstrainedLogitsProcessor):
        allowed = processor._prefix_allowed_tokens_fn
        return type(processor)(lambda _, ids: allowed(b, ids), num_beams=1)
    ignored = getattr(processor, "prompt_ignore_length", None)
    if isinstance(ignored, Tensor):  # [B], width of the left padding
        processor = copy.copy(processor)
        processor.prompt_ignore_length = ignored[b : b + 1]
    return processor
