"""Objective: which divergence between draft and target is made small, and where."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from specdiff_kernels import RowDivergence

DIVERGENCES = ("kl", "reverse_kl", "tv", "mix")


@dataclass(frozen=True)
class Objective:
    """What is made small at every position of a draft.

    Args:
        divergence: "kl" (target, draft), "reverse_kl" (draft, target), "tv", the probability that
            verification rejects, or "mix": (1 - w) kl + w tv, where w is 0 up to the share
            `tv_from` of the training and grows linearly to `tv_weight`. TV is what counts, but its
            gradient vanishes where draft and target are far apart.
        position_decay: position i weighs position_decay^i, since a token counts only if all before
            it stand.
        position_floor: but no less than this.
        tv_from, tv_weight: of "mix".
        tv_ramp: share of the training over which its w grows, 0: at once; None: up to the end.
        anchors: drafts that are asked about in each text.

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
        """Of position i, counted from the first that is drafted."""
        return max(self.position_decay**i, self.position_floor)

    def value(self, divergence: RowDivergence, progress: float) -> Tensor:
        """Per row, when this share of the training is done. -> [N]"""
        if self.divergence != "mix":
            return getattr(divergence, self.divergence)
        w = self.share_of_tv(progress)
        return (1 - w) * divergence.kl + w * divergence.tv if w else divergence.kl

    def share_of_tv(self, progress: float) -> float:
        """The w of "mix"."""
        past = progress - self.tv_from
        if past < 0:
            return 0.0
        ramp = 1 - self.tv_from if self.tv_ramp is None else self.tv_ramp
        return self.tv_weight * (min(1.0, past / ramp) if ramp else 1.0)
