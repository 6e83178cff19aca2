"""Objective: the divergence between draft and target, and the weights of draft positions."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specdiff_kernels import RowDivergence

DIVERGENCES = ("kl", "reverse_kl", "tv", "mix")


@dataclass(frozen=True)
class Objective:
    """Training objective of a draft network.

    Args:
        divergence: "kl" (target, draft), "reverse_kl" (draft, target), "tv" (the probability that
            verification rejects), or "mix": (1 - w) kl + w tv. There, w is 0 up to the share
            `tv_from` of the training and then grows linearly to `tv_weight`. TV determines the
            acceptance, but its gradient vanishes where draft and target are far apart.
        position_decay: position i has weight position_decay^i, since a token counts only if all
            before it are accepted.
        position_floor: minimum of these weights.
        tv_from, tv_weight: parameters of "mix".
        tv_ramp: share of the training in which w grows; 0: at once; None: up to the end.
        anchors: number of drafts in each text.

    Raises:
        ValueError: a field is out of range.
    """

    divergence: str = "mix"
    position_decay: float = 0.8
    position_floor: float = 0.0
    tv_from: float = 0.6
    tv_weight: float = 0.5
    tv_ramp: float | None = None
    anchors: int = 64

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ValueError(
                f"divergence must be one of {', '.join(DIVERGENCES)}, got {self.divergence!r}"
            )
        if self.anchors < 1:
            raise ValueError(f"anchors must be at least 1, got {self.anchors}")
        for name in ("position_decay", "position_floor", "tv_from", "tv_weight", "tv_ramp"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {value}")

    def position_weight(self, i: int) -> float:
        """Weight of position i, counted from the first drafted position."""
        return max(self.position_decay**i, self.position_floor)

    def value(self, divergence: RowDivergence, progress: float) -> Tensor:
        """Divergence of each row; `progress` is the finished share of the training. -> [N]"""
        if self.divergence != "mix":
            return getattr(divergence, self.divergence)
        w = self.share_of_tv(progress)
        return (1 - w) * divergence.kl + w * divergence.tv if w else divergence.kl

    def share_of_tv(self, progress: float) -> float:
        """The weight w of "mix"."""
        past = progress - self.tv_from
        if past < 0:
            return 0.0
        ramp = 1 - self.tv_from if self.tv_ramp is None else self.tv_ramp
        return self.tv_weight * (min(1.0, past / ramp) if ramp else 1.0)
