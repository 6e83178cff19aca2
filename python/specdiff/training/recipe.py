"""Recipe: how long, how fast and from which seed a drafter is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Recipe:
    """What decides a training run beside its data and its objective.

    Args:
        steps: optimiser steps.
        batch: texts in a step, over all processes.
        accumulate: forwards and backwards that they are read in; the result is the same.
        learning_rate: of a cosine over all steps that ends at zero; it rises from zero over the
            share `warmup` of them.
        weight_decay: of matrices.
        clip: most length of the gradient.
        ema: decay of the averaged weights, which are what is kept in the end; 0: the last ones.
        precision: "no" or "bf16", of the forward.
        seed: of weights, batches and masks.
        save_every: steps between checkpoints.

    Raises:
        ValueError: a field is out of range.
    """

    steps: int = 4000
    batch: int = 4
    accumulate: int = 1
    learning_rate: float = 1e-3
    warmup: float = 0.04
    weight_decay: float = 0.05
    clip: float = 1.0
    ema: float = 0.999
    precision: str = "no"
    seed: int = 0
    save_every: int = 200

    def __post_init__(self) -> None:
        for name in ("steps", "batch", "accumulate", "save_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch % self.accumulate:
            raise ValueError(
                f"batch must be a multiple of accumulate = {self.accumulate}, got {self.batch}"
            )
        for name in ("learning_rate", "weight_decay", "warmup"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name} must be at least 0, got {getattr(self, name)}")
        if self.clip <= 0:
            raise ValueError(f"clip must be above 0, got {self.clip}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        if self.precision not in ("no", "bf16"):
            raise ValueError(f"precision must be 'no' or 'bf16', got {self.precision!r}")

    def rate(self, step: int) -> float:
        """Learning rate of a step, counted from 0."""
        warm = min(1.0, (step + 1) / max(1.0, self.warmup * self.steps))
        return self.learning_rate * warm * (1 + math.cos(math.pi * step / self.steps)) / 2
