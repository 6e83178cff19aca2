"""Improvement: whether a drafter is better than another one, by more than chance.

Both draft behind the same anchors of the same held-out conversations, so that what is hard about
these cancels in the difference.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..drafters.network import DraftNetwork

SURE = 2.0  # standard errors


class Gain(NamedTuple):
    """Tokens a forward that one drafter gains over another."""

    tokens: float
    standard_error: float

    @property
    def sure(self) -> bool:
        """Whether it is more than two standard errors."""
        return self.tokens > SURE * self.standard_error


def gain(before: Tensor, after: Tensor) -> Gain:
    """What is gained in the mean, from tokens a forward in each of N conversations.

    Args:
        before, after: f32 [N], N at least 2, of the same conversations.

    Raises:
        ValueError: too few conversations, or not as many of both.

    Example:
        >>> gain(torch.tensor([1.5, 2.0, 1.8]), torch.tensor([1.7, 2.1, 2.0])).sure
        True
    """
    if before.shape != after.shape or before.ndim != 1 or len(before) < 2:
        raise ValueError(
            "before and after: expected tokens a forward of the same 2 conversations or more, got "
            f"shapes {list(before.shape)} and {list(after.shape)}"
        )
    difference = (after - before).double()
    error = difference.std() / len(difference) ** 0.5
    return Gain(float(difference.mean()), float(error))


@torch.no_grad()
def average(first: DraftNetwork, second: DraftNetwork) -> DraftNetwork:
    """The mean of the weights of two drafters that were trained apart from one start.

    Raises:
        ValueError: they are of different shapes, or draft different tokens.
    """
    if first.config != second.config:
        raise ValueError(
            f"drafters to be averaged must have one configuration, got {first.config} and "
            f"{second.config}"
        )
    if not torch.equal(first.draft_ids, second.draft_ids):
        raise ValueError("drafters to be averaged must draft the same tokens: train both from one")
    mean = DraftNetwork(first.config, first.draft_ids)
    weights = zip(mean.parameters(), first.parameters(), second.parameters(), strict=True)
    for into, one, other in weights:
        into.copy_((one + other) / 2)
    return mean
