"""The decoding loop: draft, one target forward over K + 1 tokens, verify, commit, repeat.

Every emitted token follows the target's law exactly, whatever the drafter proposes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from numbers import Integral
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdiff_kernels import Committed, Draft, check_names, check_status, commit, verify

from .adaptive import AdaptiveK
from .drafters.base import Drafter, Draws, News
from .sampling import Sampling, row_seeds
from .target import Target

STAGES = ("prefill", "draft", "target", "verify", "commit")


class Tokenizer(Protocol):
    """What stop strings and texts need of a tokenizer; any Hugging Face tokenizer has it."""

    def decode(self, token_ids: list[int], *, skip_special_tokens: bool) -> str: ...


class Step(NamedTuple):
    """What one round brought, a list entry per row; [] and 0 for rows that had finished."""

    tokens: list[list[int]]  # kept tokens: drafted ones first, then at most one of the target's
    accepted: list[int]  # how many of them were drafted
    drafted: list[int]  # tokens proposed to the target
    finished: list[bool]  # after this round
    stats: Stats  # totals so far, the same object in every step


@dataclass
class Stats:
    """Totals over a run. Prefill counts in `seconds` alone, not as a target forward."""

    target_forwards: int = 0  # rounds
    row_forwards: int = 0  # rounds times the rows that were active in them
    tokens: int = 0  # kept, of all rows
    drafted: int = 0
    accepted: int = 0
    examined_at: list[int] = field(default_factory=list)  # by draft position
    accepted_at: list[int] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @property
    def tokens_per_forward(self) -> float:
        """Mean number of tokens that a sequence gains from one target forward."""
        return self.tokens / self.row_forwards if self.row_forwards else 0.0

    @property
    def acceptance(self) -> list[float]:
        """By draft position: share accepted, among those whose predecessors were all accepted."""
        return [a / e for a, e in zip(self.accepted_at, self.examined_at, strict=True)]

    @property
    def stage_ms(self) -> dict[str, float]:
        """Milliseconds per stage, over the whole run."""
        return {stage: 1e3 * seconds for stage, seconds in self.seconds.items()}

    @property
    def tokens_per_second(self) -> float:
        total = sum(self.seconds.values())
        return self.tokens / total if total else 0.0

    @contextmanager
    def time(self, stage: str, device: torch.device) -> Iterator[None]:
        """Add the wall time of a block to a stage, waiting for CUDA on both sides."""
        start = now(device)
        yield
        self.seconds[stage] += now(device) - start

    def count(self, drafted: list[int], accepted: list[int], kept: list[int]) -> None:
        """Add a round. A token that a stop or a limit then cut off was examined all the same."""
        self.target_forwards += 1
        self.row_forwards += sum(n > 0 for n in kept)
        self.tokens += sum(kept)
        for proposed, passed in zip(drafted, accepted, strict=True):
            examined = min(passed + 1, proposed)
            grow = examined - len(self.examined_at)
            self.examined_at += [0] * grow
            self.accepted_at += [0] * grow
            self.drafted += proposed
            self.accepted += passed
            for i in range(examined):
                self.examined_at[i] += 1
                self.accepted_at[i] += i < passed


@dataclass(frozen=True)
class Generation:
    """A finished run.

    Attributes:
        sequences: prompt and new tokens of each row.
        new_tokens: the new tokens of each row, a stop token included.
        texts: `new_tokens` decoded and cut before the first stop string; None without tokenizer.
        stats: counts and times.
    """

    sequences: list[list[int]]
    new_tokens: list[list[int]]
    texts: list[str] | None
    stats: Stats


Prompts = Tensor | Sequence[int] | Sequence[Sequence[int]]


class Decoder:
    """Decodes batches of ragged prompts with one target and one drafter.

    Args:
        target: the model whose law the text follows.
        drafter: what proposes tokens; None is plain decoding by the same implementation.
        k: most tokens drafted per round, at least 1; None: the drafter's own choice; an AdaptiveK
            chooses anew in every round. Fewer near the end of a row.
        rule: how `specdiff_kernels.verify` judges a draft: "token", "block", "greedy" or "coupled".
            With "coupled" the text is that of plain decoding under this rule with the same seed.
        record: which recorded laws count, see `specdiff_kernels.verify`; None: all that may.
        backend: of the ops; None chooses.
        tokenizer: with `decode`, as Hugging Face's; needed for stop strings and texts.

    Raises:
        ValueError: k does not fit the context, the drafter's vocabulary is not the target's, or
            no such rule or record.

    Example:
        >>> decoder = Decoder(Target(model), PromptLookup(), k=5)
        >>> decoder.generate([1, 2, 3], max_new_tokens=32).new_tokens
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter | None = None,
        k: int | AdaptiveK | None = None,
        rule: str = "token",
        *,
        record: str | None = None,
        backend: str | None = None,
        tokenizer: Tokenizer | None = None,
    ) -> None:
        check_names(rule, record)
        self.k = 0
        self.adaptive = None
        if drafter is not None:
            self.adaptive = k if isinstance(k, AdaptiveK) else None
            most = k.most if isinstance(k, AdaptiveK) else k
            self.k = drafter.block if most is None else most
            check_drafter(target, drafter, self.k)
        self.target = target
        self.drafter = drafter
        self.rule = rule
        self.record = record
        self.backend = backend
        self.tokenizer = tokenizer

    @torch.inference_mode()
    def stream(
        self,
        prompts: Prompts,
        *,
        max_new_tokens: int = 128,
        sampling: Sampling | None = None,
        seed: int | Sequence[int] = 0,
        stop_tokens: Sequence[int] | None = None,
        stop_strings: Sequence[str] = (),
    ) -> Iterator[Step]:
        """Decode, yielding after every round. Rows that have finished idle until all have.

        A row's prompt and continuation together never exceed the target's context.

        Args:
            prompts: token ids: one prompt, or a batch whose rows may differ in length.
            max_new_tokens: at least 1.
            sampling: None is greedy.
            seed: one int, from which each row gets its own (see `row_seeds`), or one per row.
            stop_tokens: ids that end a row and are kept; None: the model's own end of sequence.
            stop_strings: text that ends a row; it keeps its tokens up to the one completing it.
                Special tokens are not part of the text: name them in stop_tokens.

        Raises:
            ValueError: a prompt, limit, seed or stop string cannot be used.
            LawError: the target's or drafter's logits define no law; names the row and reason.
        """
        target, drafter, device = self.target, self.drafter, self.target.device
        prompts = as_rows(prompts)
        check_prompts(target, prompts, max_new_tokens)
        if stop_strings and self.tokenizer is None:
            raise ValueError("stop_strings need a tokenizer: pass tokenizer=... to Decoder")
        sampling = sampling or Sampling()
        ends = target.stop_tokens if stop_tokens is None else tuple(stop_tokens)
        stops = torch.tensor(ends, dtype=torch.int64, device=device)
        seeds = torch.tensor(row_seeds(seed, len(prompts)), device=device)
        needs_hidden = drafter is not None and drafter.needs_hidden
        stats = Stats()

        # the cache holds all tokens of a row but its last, so that every round is alike
        tokens, counts = pad(prompts, device)  # [B, N], [B]
        lengths = [len(row) - 1 for row in prompts]
        limits = [min(len(row) + max_new_tokens, target.context_limit) - 1 for row in prompts]
        cache = target.new_cache(len(prompts), max(limits))
        limit = torch.tensor(limits, device=device)
        with stats.time("prefill", device):
            before = target.prefill(tokens, counts - 1, cache, keep_hidden=needs_hidden)
        last = tokens.gather(1, counts[:, None] - 1)  # [B, 1]
        news = News(tokens, counts, before)
        if drafter is not None:
            drafter.start(len(prompts), max(limits) + 1, sampling)
        if self.adaptive is not None:
            self.adaptive.start(len(prompts))

        round = torch.zeros_like(counts)
        finished = torch.zeros_like(counts, dtype=torch.bool)
        new: list[list[int]] = [[] for _ in prompts]
        done = [False] * len(prompts)
        while not all(done):
            # a row drafts at most one token less than it may still emit
            most = self._most(len(done))
            room = [
                0 if over else min(k, end - length - 1)
                for over, k, end, length in zip(done, most, limits, lengths, strict=True)
            ]
            position = cache.lengths + 1 if self.rule == "coupled" else None
            with stats.time("draft", device):
                draft, drafted = self._draft(news, room, Draws(seeds, round, position))
            with stats.time("target", device):
                ahead = draft.tokens.clamp(0, target.vocab_size - 1)  # verify reports bad ids
                logits, hidden = target.forward(torch.cat([last, ahead], 1), cache)
            with stats.time("verify", device):
                verified = verify(
                    logits, draft, *sampling.parameters,
                    rule=self.rule, record=self.record if max(room) else None,
                    seed=seeds, round=round, position=position, backend=self.backend,
                )  # fmt: skip
                check_status(verified.status.masked_fill(finished, 0), "sequence")
            with stats.time("commit", device):
                committed = commit(
                    cache.lengths, verified.emitted,
                    stop_tokens=stops, limit=limit, finished=finished, backend=self.backend,
                )  # fmt: skip
                if stop_strings and self.tokenizer is not None:
                    text = partial(self.tokenizer.decode, skip_special_tokens=True)
                    committed = stop_at(stop_strings, text, committed, verified.emitted, new)
                lengths = committed.lengths.tolist()
                cache.set_lengths(committed.lengths, max(lengths))

            finished, round = committed.finished, round + 1
            emitted = verified.emitted.clamp(min=0)  # [B, K + 1]
            end = emitted.gather(1, (committed.kept[:, None] - 1).clamp(min=0))
            last = torch.where(committed.kept[:, None] > 0, end, last)
            news = News(emitted, committed.kept, hidden if needs_hidden else None)

            done, kept = finished.tolist(), committed.kept.tolist()
            accepted = verified.accepted.tolist()
            stats.count(drafted, accepted, kept)
            if self.adaptive is not None:
                self.adaptive.update(drafted, accepted)
            fresh = [row[:n] for row, n in zip(emitted.tolist(), kept, strict=True)]
            for row, more in zip(new, fresh, strict=True):
                row += more
            stood = [min(a, n) for a, n in zip(accepted, kept, strict=True)]
            yield Step(fresh, stood, drafted, done, stats)

    def generate(self, prompts: Prompts, **options: Any) -> Generation:
        """Run `stream`, whose options it takes, to the end.

        Example:
            >>> decoder.generate([[1, 2, 3], [4, 5]], max_new_tokens=8, seed=1).sequences
        """
        prompts = as_rows(prompts)
        new: list[list[int]] = [[] for _ in prompts]
        for step in self.stream(prompts, **options):
            for row, more in zip(new, step.tokens, strict=True):
                row += more
        texts = None
        if self.tokenizer is not None:
            decoded = (self.tokenizer.decode(row, skip_special_tokens=True) for row in new)
            texts = [cut(text, options.get("stop_strings", ())) for text in decoded]
        sequences = [row + more for row, more in zip(prompts, new, strict=True)]
        return Generation(sequences, new, texts, step.stats)

    def _most(self, batch: int) -> list[int]:
        """Most tokens that each row may draft in the coming round."""
        if self.adaptive is None:
            return [self.k] * batch
        return self.adaptive.choose(self.k)

    def _draft(self, news: News, room: list[int], draws: Draws) -> tuple[Draft, list[int]]:
        """A draft as wide as its longest row, and its lengths; width 0 without room or drafter."""
        lengths = torch.tensor(room, device=draws.seed.device)
        if self.drafter is None or max(room) == 0:
            none = torch.empty(len(room), 0, dtype=torch.int64, device=lengths.device)
            return Draft(none, none.int(), none, lengths=lengths), room
        # always as wide, so that a row's draft does not depend on the room of its batch mates
        draft = self.drafter.draft(news, self.k, lengths, draws)
        if self.adaptive is not None:
            if draft.entangled:
                raise ValueError(
                    "k must be a number with a drafter that keeps entangled tokens: they have to "
                    "be examined, whatever was accepted before"
                )
            draft = self.adaptive.withhold(draft)
        drafted = draft.lengths.tolist() if draft.lengths is not None else [self.k] * len(room)
        if any(have > want for have, want in zip(drafted, room, strict=True)):
            raise ValueError(f"the drafter proposed {drafted} tokens where {room} were wanted")
        width = max(drafted)
        narrow = draft._replace(
            tokens=draft.tokens[:, :width], tau=draft.tau[:, :width], rows=draft.rows[:, :width]
        )
        return narrow, drafted


def generate(
    target: Target | PreTrainedModel,
    drafter: Drafter | None,
    input_ids: Prompts,
    *,
    k: int | AdaptiveK | None = None,
    rule: str = "token",
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
    decoder = Decoder(target, drafter, k, rule, record=record, backend=backend, tokenizer=tokenizer)
    return decoder.generate(input_ids, **options)


def check_drafter(target: Target, drafter: Drafter, k: int) -> None:
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}; for plain decoding pass drafter=None")
    if k >= target.context_limit:
        raise ValueError(
            f"k must be below the target's context of {target.context_limit} tokens, got {k}"
        )
    if drafter.vocab_size not in (None, target.vocab_size):
        raise ValueError(
            f"the drafter's vocabulary has {drafter.vocab_size} tokens and the target's "
            f"{target.vocab_size}: a drafter must share the target's tokenizer"
        )


def check_prompts(target: Target, prompts: list[list[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    for b, row in enumerate(prompts):
        if not row:
            raise ValueError(f"prompt {b} is empty: give it at least one token, such as the bos")
        if min(row) < 0 or max(row) >= target.vocab_size:
            raise ValueError(
                f"prompt {b} has ids from {min(row)} to {max(row)}, outside the target's "
                f"vocabulary [0, {target.vocab_size}): was it made with another tokenizer?"
            )
        if len(row) >= target.context_limit:
            raise ValueError(
                f"prompt {b} has {len(row)} tokens and leaves no room in the target's context of "
                f"{target.context_limit}: shorten it"
            )


def as_rows(prompts: Prompts) -> list[list[int]]:
    """One prompt or a batch of them, as tensors or sequences of ids -> lists of ints."""
    rows: Any = prompts.tolist() if isinstance(prompts, Tensor) else prompts
    if len(rows) and isinstance(rows[0], Integral):
        rows = [rows]
    return [[int(token) for token in row] for row in rows]


def pad(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-pad with 0. -> tokens i64 [B, N], counts i64 [B]"""
    counts = [len(row) for row in rows]
    tokens = [row + [0] * (max(counts) - len(row)) for row in rows]
    return torch.tensor(tokens, device=device), torch.tensor(counts, device=device)


def stop_at(
    strings: Sequence[str],
    text: Callable[[list[int]], str],
    committed: Committed,
    emitted: Tensor,
    new: list[list[int]],
) -> Committed:
    """Let each row keep its tokens up to the first that completes one of `strings`, and finish.

    Args:
        text: what tokens spell.
        committed, emitted: of this round.
        new: tokens that each row gained in earlier rounds.
    """
    kept, finished = committed.kept.tolist(), committed.finished.tolist()
    for b, tokens in enumerate(emitted.tolist()):
        for n in range(1, kept[b] + 1):
            spelt = text(new[b] + tokens[:n])
            if any(string in spelt for string in strings):
                kept[b], finished[b] = n, True
                break
    fewer = torch.tensor(kept, device=emitted.device)
    return Committed(
        lengths=committed.lengths - committed.kept + fewer,
        kept=fewer,
        finished=torch.tensor(finished, device=emitted.device),
    )


def cut(text: str, strings: Sequence[str]) -> str:
    """`text` up to the first of `strings`."""
    starts = [text.index(string) for string in strings if string in text]
    return text[: min(starts, default=len(text))]


def now(device: torch.device) -> float:
    """Seconds, once the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
