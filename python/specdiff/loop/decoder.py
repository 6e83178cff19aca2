"""Decoder: whole texts from prompts, by sessions of rounds.

Every emitted token follows the target's distribution exactly, whatever the drafter proposes. The
lenient rule is the exception: `Stats.bias` says how far from it the text may be.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from numbers import Integral
from typing import Any, Protocol

from transformers import PreTrainedModel

from specdiff_kernels import Lenience, check_lenience, check_names, row_seeds

from .arguments import Prompts, answered, as_rows, check_prompts, strings, whole_number
from .capture import Captured
from .chooser import Chooser
from .drafter import Drafter, check_length
from .sampling import Sampling
from .session import Ends, Process, Session
from .settings import Settings
from .stats import Stats, Step
from .target import Target
from .trees import growth_of


class Tokenizer(Protocol):
    """The method of a tokenizer that stop strings and texts need. Hugging Face's have it."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


@dataclass(frozen=True)
class Generation:
    """A finished run.

    Attributes:
        sequences: prompt and new tokens of each row.
        new_tokens: the new tokens of each row, a stop token included.
        texts: `new_tokens` decoded and cut before the first stop string; None without tokenizer.
        stats: counts and times.
        logprobs: log-probabilities of `new_tokens` under the distribution that they were drawn
            from; None unless the option `logprobs` asked for them.
    """

    sequences: list[list[int]]
    new_tokens: list[list[int]]
    texts: list[str] | None
    stats: Stats
    logprobs: list[list[float]] | None = None


class Decoder:
    """Decodes batches of ragged prompts with one target and one drafter.

    Args:
        target: the model whose distribution the text follows.
        drafter: what proposes tokens; None is plain decoding by the same implementation.
        k: most tokens drafted per round, at least 1; fewer near the end of a row. None: the
            drafter's own block. An AdaptiveK or a Planner chooses anew in every round.
        rule: how `specdiff_kernels.verify` judges a draft: "token", "block", "greedy", "coupled" or
            "lenient". With "coupled" the text is that of plain decoding under this rule with the
            same seed. With "lenient" the text does not follow the target's distribution exactly:
            the total variation between the two is at most the mean of `Stats.bias`.
        tree: drafts are trees, with paths of up to k tokens, under rule "token", "greedy" or
            "coupled". A number of nodes: the likeliest tokens, best first, which is good for greedy
            text and low temperatures. Or the parent of each place for which a token is drawn, -1
            for the text's last token: `(-1, -1, 0)` draws two tokens behind the text and one behind
            the first of them. None: drafts are chains.
        lenience: how lenient the lenient rule is, see `specdiff_kernels.Lenience`; an amount for
            each row of the batch, or one for all.
        record: which recorded distributions count, see `specdiff_kernels.verify`; None: all valid
            ones.
        backend: of the ops; None chooses.
        tokenizer: with `decode`, as Hugging Face's; needed for stop strings and texts. None: the
            target's own, if it has one.

    Raises:
        ValueError, TypeError: k does not fit the context, the drafter's vocabulary is not the
            target's, no such rule or record, or a lenience without its rule, or vice versa.

    Example:
        >>> decoder = Decoder(Target(model), PromptLookup(), k=5)
        >>> decoder.generate([1, 2, 3], max_new_tokens=32).new_tokens
    """

    @answered
    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        k: int | Chooser | None = None,
        rule: str = "token",
        *,
        tree: int | Sequence[int] | None = None,
        lenience: Lenience | None = None,
        record: str | None = None,
        backend: str | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        check_names(rule, record)
        check_lenience(rule, lenience)
        if isinstance(target, PreTrainedModel):
            raise ValueError("target is a model: pass specdiff.Target(model)")
        if not isinstance(target, Target):
            raise TypeError(
                f"target must be a specdiff.Target, got {target!r}: Target.load takes a name or a "
                "folder"
            )
        if isinstance(drafter, PreTrainedModel):
            raise ValueError("drafter is a model: pass specdiff.drafters.Autoregressive(model)")
        if not isinstance(drafter, Drafter | None):
            raise TypeError(
                f"drafter must be a specdiff.drafters.Drafter or None, got {drafter!r}: "
                "specdiff.drafters.load_drafter takes a name or a folder"
            )
        most = 0
        if drafter is not None:
            most = longest_draft(drafter, k)
            check_fits(target, drafter, most)
        growth = None
        if tree is not None and drafter is not None:
            growth = growth_of(tree, rule)
            check_grows(drafter, k, record)
        chooser = k if drafter is not None and isinstance(k, Chooser) else None
        self.settings = Settings(
            target, drafter, most, chooser, growth, rule, lenience, record, backend
        )
        self.tokenizer: Tokenizer | None = tokenizer or target.tokenizer
        self._k, self._tree, self._tokenizer = k, tree, tokenizer

    @property
    def target(self) -> Target:
        """The model whose distribution the text follows."""
        return self.settings.target

    @property
    def drafter(self) -> Drafter | None:
        """Proposes tokens; None: plain decoding."""
        return self.settings.drafter

    def replace(self, **changes: Any) -> Decoder:
        """A decoder like this one, but for some arguments of the constructor.

        Example:
            >>> decoder = decoder.replace(k=8)
        """
        settings = self.settings
        arguments = {
            "target": settings.target,
            "drafter": settings.drafter,
            "k": self._k,
            "rule": settings.rule,
            "tree": self._tree,
            "lenience": settings.lenience,
            "record": settings.record,
            "backend": settings.backend,
            "tokenizer": self._tokenizer,
        }
        return Decoder(**{**arguments, **changes})

    @answered
    def stream(
        self,
        prompts: Prompts,
        *,
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
    ) -> Iterator[Step]:
        """Decode, and yield a step whenever the host looks: after every round, unless told
        otherwise. Finished rows idle until all rows have finished.

        A row's prompt and continuation together never exceed the target's context.

        Args:
            prompts: token ids: one prompt, or a batch whose rows may differ in length.
            max_new_tokens: at least 1.
            sampling: None is greedy.
            seed: one int, from which each row gets its own (see `row_seeds`), or one per row.
            stop_tokens: ids that end a row and are kept; None: the model's own end of sequence.
            stop_strings: one or several texts that end a row. The row keeps the tokens up to the
                one that completes it. Special tokens are not part of the text: name them in
                stop_tokens.
            logprobs, look_every, capture, block_size, blocks, process: as of `open`.
            ends: as of `open`, but not beside stop strings.

        Raises:
            ValueError, TypeError: a prompt, limit, seed or stop string cannot be used.
            DistributionError: the target's or drafter's logits define no distribution; names the
                row and reason.
        """
        rows = as_rows(prompts)
        check_prompts(self.target, rows, max_new_tokens)
        if texts := strings("stop_strings", stop_strings):
            if self.tokenizer is None:
                raise ValueError("stop_strings need a tokenizer: pass tokenizer=... to Decoder")
            if ends is not None:
                raise ValueError("ends cannot be given beside stop_strings: let it look for them")
            ends = partial(spells, self.tokenizer, texts)
        seeds = row_seeds(seed, len(rows))
        longest = min(max(map(len, rows)) + max_new_tokens, self.target.context_limit)

        def steps() -> Iterator[Step]:
            session = self.open(
                len(rows), longest, sampling=sampling, stop_tokens=stop_tokens, logprobs=logprobs,
                look_every=look_every, capture=capture, block_size=block_size, blocks=blocks,
                process=process, ends=ends,
            )  # fmt: skip
            session.admit(rows, max_new_tokens=max_new_tokens, seed=seeds)
            while not all(session.done):
                yield session.step()

        return steps()

    @answered
    def open(
        self,
        rows: int,
        capacity: int,
        *,
        sampling: Sampling | None = None,
        stop_tokens: Sequence[int] | None = None,
        logprobs: bool = False,
        look_every: int | None = None,
        capture: bool | Captured = False,
        block_size: int | None = None,
        blocks: int | None = None,
        process: Process | None = None,
        ends: Ends | None = None,
    ) -> Session:
        """Open a session: a batch of empty places for prompts that come and go. A drafter serves
        one session at a time.

        Args:
            rows: places.
            capacity: most tokens of a row, prompt included; at most the target's context.
            sampling: None is greedy.
            stop_tokens: ids that end a row and are kept; None: the model's own end of sequence.
            logprobs: whether steps bring the log-probabilities of their tokens.
            look_every: rounds between two looks of the host; None: 1 on a CPU, 8 on a GPU.
            capture: whether rounds are captured in CUDA graphs, or the `Captured` that does it.
            block_size: positions in a block of a paged cache; None: the cache is dense.
            blocks: of a paged cache's pool; None: as many as all rows can fill.
            process: a function of (texts, drafted tokens [B, K], logits [B, K + 1, V]) that returns
                other logits; it sees each round.
            ends: a function of (row, its new tokens) that says whether the row ends there.

        Raises:
            ValueError, TypeError: an argument out of its range, or one that does not go with
                another.

        Example:
            >>> session = decoder.open(rows=8, capacity=512, block_size=16)
        """
        whole_number("rows", rows, 1)
        whole_number("capacity", capacity, 2, self.target.context_limit, ", the target's context")
        return Session(
            self.settings, rows, capacity - 1, Sampling() if sampling is None else sampling,
            self.target.stop_tokens if stop_tokens is None else stop_tokens,
            process=process, ends=ends, logprobs=logprobs, look_every=look_every, capture=capture,
            block_size=block_size, blocks=blocks,
        )  # fmt: skip

    @answered
    def generate(
        self,
        prompts: Prompts,
        *,
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
        """Run `stream` to the end, with the same arguments.

        Example:
            >>> decoder.generate([[1, 2, 3], [4, 5]], max_new_tokens=8, seed=1).sequences
        """
        prompts = as_rows(prompts)
        new: list[list[int]] = [[] for _ in prompts]
        chances: list[list[float]] = [[] for _ in prompts]
        for step in self.stream(
            prompts, max_new_tokens=max_new_tokens, sampling=sampling, seed=seed,
            stop_tokens=stop_tokens, stop_strings=stop_strings, logprobs=logprobs,
            look_every=look_every, capture=capture, block_size=block_size, blocks=blocks,
            process=process, ends=ends,
        ):  # fmt: skip
            extend(new, step.tokens)
            extend(chances, step.logprobs or [[] for _ in prompts])
        texts = None
        if self.tokenizer is not None:
            decoded = (self.tokenizer.decode(row, skip_special_tokens=True) for row in new)
            texts = [cut(text, strings("stop_strings", stop_strings)) for text in decoded]
        sequences = [row + more for row, more in zip(prompts, new, strict=True)]
        return Generation(sequences, new, texts, step.stats, chances if logprobs else None)


def longest_draft(drafter: Drafter, k: int | Chooser | None) -> int:
    """The largest K: a number as it is, else the chooser's or the drafter's own."""
    most = k.most if isinstance(k, Chooser) else k
    if most is None:
        return drafter.block
    if not isinstance(most, Integral) or isinstance(most, bool):
        raise TypeError(f"k must be an integer, a chooser such as AdaptiveK(), or None, got {k!r}")
    return int(most)


def check_grows(drafter: Drafter, k: int | Chooser | None, record: str | None) -> None:
    """Raise ValueError unless the drafter makes trees, and nothing else speaks against them."""
    if not drafter.grows:
        raise ValueError(f"tree: {type(drafter).__name__} drafts chains alone; leave tree out")
    if isinstance(k, Chooser):
        raise ValueError(f"tree: k must be a number, got a {type(k).__name__}")
    if record is not None:
        raise ValueError(f"tree: all records of a tree count; leave record={record!r} out")


def check_fits(target: Target, drafter: Drafter, k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}; for plain decoding pass drafter=None")
    if k >= target.context_limit:
        raise ValueError(
            f"k must be below the target's context of {target.context_limit} tokens, got {k}"
        )
    check_length(drafter, k)
    if drafter.vocab_size not in (None, target.vocab_size):
        raise ValueError(
            f"the drafter's vocabulary has {drafter.vocab_size} tokens and the target's "
            f"{target.vocab_size}: a drafter must share the target's tokenizer"
        )


def extend(rows: list[list[Any]], more: list[list[Any]]) -> None:
    """Each row by its own part."""
    for row, part in zip(rows, more, strict=True):
        row += part


def spells(tokenizer: Tokenizer, wanted: Sequence[str], row: int, tokens: list[int]) -> bool:
    """Whether the text of a row's new tokens holds a wanted string."""
    text = tokenizer.decode(tokens, skip_special_tokens=True)
    return any(string in text for string in wanted)


def cut(text: str, ends: Sequence[str]) -> str:
    """A text up to the first of these strings."""
    starts = [text.index(string) for string in ends if string in text]
    return text[: min(starts, default=len(text))]
