"""Rows: the state of a session on the host and on the device, and the log between the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass
class HostRows:
    """The rows of a session as the host knows them: as they were when it last looked."""

    texts: list[list[int]]  # prompt and new tokens
    prompts: list[int]  # tokens of the prompt
    done: list[bool]  # whether the place is free
    lengths: list[int]  # cached positions: all tokens but the last
    limits: list[int]  # the largest length that a row may reach
    used: list[bool]  # whether the place ever had a prompt

    @classmethod
    def empty(cls, rows: int) -> HostRows:
        return cls(
            [[] for _ in range(rows)], [0] * rows, [True] * rows, [0] * rows, [0] * rows,
            [False] * rows,
        )  # fmt: skip

    def admit(self, places: range, prompts: Sequence[Sequence[int]], limits: Sequence[int]) -> None:
        """Begin texts at free places."""
        for b, prompt, limit in zip(places, prompts, limits, strict=True):
            self.texts[b], self.prompts[b] = list(prompt), len(prompt)
            self.lengths[b], self.limits[b] = len(prompt) - 1, limit
            self.done[b] = False

    def new(self, row: int) -> list[int]:
        """The tokens of a row behind its prompt."""
        return self.texts[row][self.prompts[row] :]

    def left(self) -> int:
        """The fewest tokens that a row under way may still emit; 0 without any."""
        rows = zip(self.limits, self.lengths, self.done, strict=True)
        return min((limit - length for limit, length, over in rows if not over), default=0)


class DeviceRows:
    """The rows of a session on the device. Every round reads and writes the same memory.

    Attributes:
        lengths: i64 [B], cached positions of each row.
        limit: i64 [B], the largest length that a row may reach.
        seeds, round: i64 [B], keys of the row's random numbers.
        finished: bool [B].
        last: i64 [B, 1], the last token of each row, which is not in the cache yet.
        stops: i64 [S], tokens that end a row.
    """

    def __init__(self, rows: int, stop_tokens: Sequence[int], device: torch.device) -> None:
        zeros = torch.zeros(rows, dtype=torch.int64, device=device)
        self.lengths, self.limit, self.seeds, self.round = (zeros.clone() for _ in range(4))
        self.finished = torch.ones_like(zeros, dtype=torch.bool)
        self.last = zeros[:, None].clone()
        self.stops = torch.tensor(tuple(stop_tokens), dtype=torch.int64, device=device)

    def admit(
        self,
        rows: slice,
        tokens: Tensor,
        counts: Tensor,
        limits: Sequence[int],
        seeds: Sequence[int],
    ) -> None:
        """Begin rows with prompts [n, N] of `counts` [n] tokens, all cached but their last."""
        device = self.lengths.device
        self.lengths[rows] = counts - 1
        self.limit[rows] = torch.tensor(limits, device=device)
        self.seeds[rows] = torch.tensor(seeds, device=device)
        self.round[rows] = 0
        self.finished[rows] = False
        self.last[rows] = tokens.gather(1, counts[:, None] - 1)

    def advance(self, last: Tensor) -> None:
        """Note the last tokens [B] that stand; -1: none does. `commit` advances the lengths."""
        last = last[:, None]
        self.last.copy_(torch.where(last < 0, self.last, last))
        self.round += 1


class Round(NamedTuple):
    """One round of all rows, as the host reads it from the log: a list entry for each row."""

    emitted: list[list[int]]
    logprobs: list[list[float]] | None
    kept: list[int]
    accepted: list[int]
    drafted: list[int]
    wanted: list[int]
    status: list[int]


class Log:
    """Rounds that the host has not looked at yet, in memory of the device.

    Args:
        rounds: between two looks.
        rows: B.
        width: most tokens that a round emits, K + 1.
        device: of the session.
        logprobs: whether log-probabilities are logged.
        bias: whether the bias of a lenient rule is logged.
    """

    def __init__(
        self,
        rounds: int,
        rows: int,
        width: int,
        device: torch.device,
        *,
        logprobs: bool,
        bias: bool,
    ) -> None:
        self.slot = torch.zeros(1, dtype=torch.int64, device=device)
        self.emitted = torch.empty(rounds, rows, width, dtype=torch.int64, device=device)
        # kept, accepted, drafted, wanted, status
        self.counts = torch.empty(rounds, 5, rows, dtype=torch.int64, device=device)
        numbers = partial(torch.zeros, dtype=torch.float64, device=device)
        self.logprobs = numbers(rounds, rows, width) if logprobs else None
        self.biases = numbers(rounds, rows) if bias else None

    def write(
        self, emitted: Tensor, counts: Tensor, logprobs: Tensor | None, bias: Tensor | None
    ) -> None:
        """Add a round: emitted [B, Q], counts [5, B], log-probabilities [B, Q], bias [B]."""
        for log, entry in (
            (self.emitted, emitted),
            (self.counts, counts),
            (self.logprobs, logprobs),
            (self.biases, bias),
        ):
            if log is not None and entry is not None:  # right-padded to the log's width
                padding = log.shape[-1] - entry.shape[-1]
                log.index_copy_(0, self.slot, F.pad(entry, (0, padding))[None])
        self.slot.add_(1).remainder_(len(self.emitted))

    def read(self) -> list[Round]:
        """The rounds since the last look."""
        emitted, counts = self.emitted.tolist(), self.counts.tolist()
        logprobs = [None] * len(emitted) if self.logprobs is None else self.logprobs.tolist()
        return [
            Round(tokens, chances, *count)
            for tokens, chances, count in zip(emitted, logprobs, counts, strict=True)
        ]

    def bias(self) -> float:
        """The bias of all rows in these rounds."""
        return 0.0 if self.biases is None else float(self.biases.sum())
