"""Recipe: how long, how fast and from which seed a drafter is trained."""

from __future__ import annotations

import math
from dataclasses import dataclass

MATRICES = ("adamw", "muon")


@dataclass(frozen=True)
class Recipe:
    """What decides a training run beside its data and its objective.

    Args:
        steps: optimiser steps.
        batch: texts in a step, over all processes.
        accumulate: forwards and backwards that they are read in; the result is the same.
        learning_rate: the full one. It rises from zero over the share `warmup` of the steps, stays
            up to the share `hold` of them, and falls along a cosine to `final` of it.
        vector_learning_rate: the full one of what is no linear layer's matrix; None:
            `learning_rate`.
        head_learning_rate: the full one of a sequential head's W, which begins at zero and at a
            small rate barely learns.
        matrices: what trains the linear layers' matrices, but for that W: "adamw", or "muon"
            (torch.optim.Muon with a momentum of 0.95 and steps as long as AdamW's). All else is
            AdamW's.
        weight_decay: of all matrices but that W.
        clip: most length of the gradient.
        ema: decay of the averaged weights, which are what is kept in the end; 0: the last ones.
        precision: "no" or "bf16", of the forward and the loss's products.
        seed: of weights, batches and masks.
        save_every: steps between checkpoints.

    Raises:
        ValueError: a field is out of range.
    """

    steps: int = 4000
    batch: int = 4
    accumulate: int = 1
    learning_rate: float = 1e-3
    vector_learning_rate: float | None = None
    head_learning_rate: float = 3e-3
    matrices: str = "adamw"
    warmup: float = 0.04
    hold: float = 0.0
    final: float = 0.0
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
        rates = ("learning_rate", "vector_learning_rate", "head_learning_rate")
        for name in (*rates, "weight_decay", "warmup"):
            if (value := getattr(self, name)) is not None and value < 0:
                raise ValueError(f"{name} must be at least 0, got {value}")
        for name in ("hold", "final"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")
        if self.matrices not in MATRICES:
            raise ValueError(
                f"matrices must be one of {', '.join(MATRICES)}, got {self.matrices!r}"
            )
        if self.clip <= 0:
            raise ValueError(f"clip must be above 0, got {self.clip}")
        if not 0 <= self.ema < 1:
            raise ValueError(f"ema must be in [0, 1), got {self.ema}")
        if self.precision not in ("no", "bf16"):
            raise ValueError(f"precision must be 'no' or 'bf16', got {self.precision!r}")

    def rate(self, step: int, full: float | None = None) -> float:
        """Learning rate of a step, counted from 0, where `full` is the full one."""
        full = self.learning_rate if full is None else full
        warm = min(1.0, (step + 1) / max(1.0, self.warmup * self.steps))
        held = self.hold * self.steps
        angle = math.pi * max(0.0, step - held) / max(1.0, self.steps - held)
        return full * warm * (self.final + (1 - self.final) * (1 + math.cos(angle)) / 2)
