"""Improvement: tests whether a drafter is significantly better than another one.

Both draft after the same anchors of the same held-out conversations. The difficulty of these
positions cancels in the difference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..drafters.network import DraftNetwork

SURE = 2.0  # standard errors


class Gain(NamedTuple):
    """Gain in tokens per forward of one drafter over another."""

    tokens: float
    standard_error: float

    @property
    def sure(self) -> bool:
        """Whether the gain exceeds two standard errors."""
        return self.tokens > SURE * self.standard_error


def gain(before: Tensor, after: Tensor) -> Gain:
    """Mean gain, from the tokens per forward in each of N conversations.

    Args:
        before, after: f32 [N], N >= 2, tokens per forward in the same conversations.

    Raises:
        ValueError: N is below 2, or the shapes differ.

    Example:
        >>> gain(torch.tensor([1.5, 2.0, 1.8]), torch.tensor([1.7, 2.1, 2.0])).sure
        True
    """
    if before.shape != after.shape or before.ndim != 1 or len(before) < 2:
        raise ValueError(
            "before and after: expected tokens per forward of the same 2 conversations or more, "
            f"got shapes {list(before.shape)} and {list(after.shape)}"
        )
    difference = (after - before).double()
    error = difference.std() / len(difference) ** 0.5
    return Gain(float(difference.mean()), float(error))


@torch.no_grad()
def average(first: DraftNetwork, second: DraftNetwork) -> DraftNetwork:
    """Average the weights of two drafters that were trained separately from the same start.

    Raises:
        ValueError: they have different shapes or draft vocabularies.
    """
    if first.config != second.config:
        raise ValueError(
            f"drafters to average must have the same configuration, got {first.config} and "
            f"{second.config}"
        )
    if not torch.equal(first.draft_ids, second.draft_ids):
        raise ValueError(
            "drafters to average must have the same draft vocabulary: train both from the same "
            "initial drafter"
        )
    mean = DraftNetwork(first.config, first.draft_ids)
    weights = zip(mean.parameters(), first.parameters(), second.parameters(), strict=True)
    for into, one, other in weights:
        into.copy_((one + other) / 2)
    return mean
