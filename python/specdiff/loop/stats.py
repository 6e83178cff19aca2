"""Stats: the steps of a run as they come, and its counts and times in total."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import torch

STAGES = ("prefill", "draft", "target", "verify", "commit")


class Step(NamedTuple):
    """Results of the rounds since the last step, with a list entry per row.

    That is one round, unless the host looks less often. Entries of finished rows are [] and 0.
    """

    tokens: list[list[int]]
    accepted: list[int]
    drafted: list[int]
    finished: list[bool]
    stats: Stats
    logprobs: list[list[float]] | None = None


for _name, _text in {
    "tokens": "kept tokens of each row; of one round: drafted ones, then at most one more",
    "accepted": "how many of them were drafted",
    "drafted": "tokens proposed to the target",
    "finished": "whether the row has ended by now",
    "stats": "totals so far, the same object in every step",
    "logprobs": "log-probabilities of the tokens; None: they were not asked for",
}.items():
    getattr(Step, _name).__doc__ = _text


@dataclass
class Stats:
    """Totals over a run. Prefill counts in `seconds` only, not as a target forward."""

    target_forwards: int = 0  # rounds
    row_forwards: int = 0  # rounds times the rows that were active in them
    tokens: int = 0  # kept, of all rows
    drafted: int = 0
    accepted: int = 0
    bias: float = 0.0  # total variation spent by a lenient rule, of all rows; 0 under the others
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
        self.seconds[stage] = self.seconds.get(stage, 0.0) + now(device) - start

    def count(self, drafted: Sequence[int], accepted: Sequence[int], kept: Sequence[int]) -> None:
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


def now(device: torch.device) -> float:
    """Seconds, once the device has done what was asked of it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
