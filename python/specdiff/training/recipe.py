"""Recipe: steps, batch size, learning rates and seed of a training run."""

from __future__ import annotations

import math
from dataclasses import dataclass

MATRICES = ("adamw", "muon")


@dataclass(frozen=True)
class Recipe:
    """Training settings other than data and objective.

    Args:
        steps: optimiser steps.
        batch: texts per step, over all processes.
        accumulate: number of forward and backward passes per step. It does not change the result.
        learning_rate: peak learning rate. The rate rises from zero over the share `warmup` of the
            steps, stays at the peak up to the share `hold` of them, and falls along a cosine to
            `final` times the peak.
        vector_learning_rate: peak rate of parameters that are not matrices of linear layers; None:
            `learning_rate`.
        head_learning_rate: peak rate of the sequential head's W, which starts at zero and barely
            learns at a small rate.
        matrices: optimiser of the linear layers' matrices, except W: "adamw", or "muon"
            (torch.optim.Muon with momentum 0.95 and steps scaled like AdamW's). AdamW trains all
            other parameters.
        weight_decay: weight decay of all matrices except W.
        clip: maximum norm of the gradient.
        ema: decay of the weights' moving average. The run's result is the average; 0: the last
            weights.
        precision: "no" or "bf16", for the forward and the loss's matrix products.
        seed: seed of weights, batches and masks.
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
        """Learning rate of a step, counted from 0, for the peak rate `full`."""
        full = self.learning_rate if full is None else full
        warm = min(1.0, (step + 1) / max(1.0, self.warmup * self.steps))
        held = self.hold * self.steps
        angle = math.pi * max(0.0, step - held) / max(1.0, self.steps - held)
        return full * warm * (self.final + (1 - self.final) * (1 + math.cos(angle)) / 2)
