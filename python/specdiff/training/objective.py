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
            verification rejects, or "mix": (1 - w) kl + w tv, where w grows linearly from 0 at the
            share `tv_from` of the training to `tv_weight` at its end. TV is what counts, but its
            gradient vanishes where draft and target are far apart.
        position_decay: position i weighs position_decay^i, since a token counts only if all before
            it stand.
        tv_from, tv_weight: of "mix".
        anchors: drafts that are asked about in each text.

    Raises:
        ValueError: a field is out of range.
    """

    divergence: str = "mix"
    position_decay: float = 0.8
    tv_from: float = 0.6
    tv_weight: float = 0.5
    anchors: int = 64

    def __post_init__(self) -> None:
        if self.divergence not in DIVERGENCES:
            raise ValueError(
                f"divergence must be one of {', '.join(DIVERGENCES)}, got {self.divergence!r}"
            )
        if self.anchors < 1:
            raise ValueError(f"anchors must be at least 1, got {self.anchors}")
        for name in ("position_decay", "tv_from", "tv_weight"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be in [0, 1], got {getattr(self, name)}")

    def value(self, divergence: RowDivergence, progress: float) -> Tensor:
        """Per row, when this share of the training is done. -> [N]"""
        if self.divergence != "mix":
            return getattr(divergence, self.divergence)
        w = self.tv_weight * max(0.0, progress - self.tv_from) / max(1e-9, 1 - self.tv_from)
        return (1 - w) * divergence.kl + w * divergence.tv if w else divergence.kl
