"""Sampling: temperature, top-k, top-p and min-p of a sequence or of each row."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Sampling:
    """The distribution that every emitted token follows, given its prefix.

    Applied in this order, as transformers does: temperature, top-k, top-p, min-p.

    Args:
        temperature: 0 (default) is greedy: the lowest-index argmax.
        top_k: keep the k likeliest tokens, and all ties with the k-th; None: all.
        top_p: keep the likeliest tokens that together hold this share; None: all.
        min_p: drop tokens less likely than this share of the likeliest; None: none.

    Raises:
        ValueError: a value outside its range.

    Example:
        >>> Sampling(temperature=0.8, top_p=0.95).greedy
        False
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def __post_init__(self) -> None:
        t = self.temperature
        if not (within(t, 0, 0) or within(t, 2.0**-95, 2.0**95)):
            raise ValueError(f"temperature must be 0 (greedy) or in [2^-95, 2^95], got {t!r}")
        k = self.top_k
        if k is not None and not (isinstance(k, Integral) and within(k, 1, 2**63 - 1)):
            raise ValueError(f"top_k must be an integer of at least 1, got {k!r}; None: all tokens")
        if self.top_p is not None and not within(self.top_p, 2.0**-149, 1):
            raise ValueError(f"top_p must be in (0, 1], got {self.top_p!r}; None keeps all tokens")
        if self.min_p is not None and not within(self.min_p, 0, 1):
            raise ValueError(f"min_p must be in [0, 1], got {self.min_p!r}; None drops no token")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    @property
    def parameters(self) -> tuple[float, int | None, float | None, float | None]:
        """(temperature, top_k, top_p, min_p), as the ops take them."""
        return self.temperature, self.top_k, self.top_p, self.min_p

    @property
    def rule(self) -> str:
        """The exact rule of `specdiff_kernels.verify` that accepts most: block verification
        (2403.10444), which reads every row of a draft; token by token where that is as good."""
        return "token" if self.greedy else "block"


def within(value: Any, low: float, high: float) -> bool:
    """Whether it is a number in [low, high]; a bool is none."""
    number = isinstance(value, Real) and not isinstance(value, bool)
    return number and low <= value <= high


class RowSampling:
    """The parameters of each row of a session, in memory that every round reads.

    A parameter that no row has used so far stays None, which is cheaper for the ops.

    Args:
        common: of all rows, until `admit` gives them their own.
        rows: B.
        device: of the session.
    """

    def __init__(self, common: Sampling, rows: int, device: torch.device) -> None:
        self.each = [common] * rows
        self.common = common
        self.tensors: dict[str, Tensor] = {}  # by name, those that some row has used
        self.device = device
        self._write(slice(0, rows), self.each)

    @property
    def parameters(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """temperature f32, top_k i64, top_p f32 and min_p f32 [B], as the ops take them."""
        get = self.tensors.get
        return self.tensors["temperature"], get("top_k"), get("top_p"), get("min_p")

    @property
    def greedy(self) -> bool:
        """Whether all rows are, those of free places too."""
        return all(sampling.greedy for sampling in self.each)

    def without_greedy(self) -> tuple[Tensor | None, ...]:
        """`parameters`, but those of greedy rows are of temperature 1 without truncation."""
        greedy = self.tensors["temperature"] == 0
        return tuple(
            self.tensors[name].masked_fill(greedy, off) if name in self.tensors else None
            for name, (_, off) in ROW_PARAMETERS.items()
        )

    def admit(self, rows: slice, each: Sequence[Sampling]) -> bool:
        """Change some rows' parameters. Returns whether `parameters` are other tensors now."""
        before = len(self.tensors)
        self._write(rows, each)
        self.each[rows] = each
        return len(self.tensors) > before

    def _write(self, rows: slice, each: Sequence[Sampling]) -> None:
        for name, (dtype, off) in ROW_PARAMETERS.items():
            values = [getattr(sampling, name) for sampling in each]
            if name not in self.tensors:
                if all(value is None for value in values):
                    continue
                whole = torch.full((len(self.each),), off, dtype=dtype, device=self.device)
                self.tensors[name] = whole
            filled = [off if value is None else value for value in values]
            self.tensors[name][rows] = torch.tensor(filled, dtype=dtype, device=self.device)


# name -> dtype, and the value that turns it off
ROW_PARAMETERS: dict[str, tuple[torch.dtype, float]] = {
    "temperature": (torch.float32, 1.0),
    "top_k": (torch.int64, 0),
    "top_p": (torch.float32, 1.0),
    "min_p": (torch.float32, 0.0),
}
