"""Are a draft's records those of the logits that it points at? The same on every backend, in the
reference's integers."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from ..reference.numerics import LOG2_E
from ..reference.row_distribution import TEMPERATURE_RANGE
from ..reference.verify import draft_lengths, draft_weights
from ..types import Draft, RowDistribution, Status, Verified

OF_ALL_CALLS = os.environ.get("SPECDIFF_CHECK", "0") not in ("", "0")
SCALES = sorted(torch.tensor(LOG2_E).div(t).item() for t in TEMPERATURE_RANGE)


@torch.no_grad()
def refuse_records(draft: Draft, V: int, verified: Verified) -> None:
    """Give sequences whose records are not those of their logits a status, and no verdict."""
    fault = record_faults(draft, V)
    refused = (verified.status == Status.OK.value) & (fault != Status.OK.value)
    verified.accepted.masked_fill_(refused, 0)
    verified.emitted.masked_fill_(refused[:, None], -1)
    verified.status.copy_(torch.where(refused, fault, verified.status))
    verified.bias.masked_fill_(refused, 0.0)


def record_faults(draft: Draft, V: int) -> Tensor:
    """The first fault of each sequence's recorded tokens, one position at a time. -> i32 [B]"""
    B, K = draft.tokens.shape
    fault = torch.zeros(B, dtype=torch.int32, device=draft.tokens.device)
    if draft.logits is None or draft.distribution is None or len(draft.logits) == 0:
        return fault  # the op itself refuses what is recorded of no logits
    lengths = draft_lengths(draft, B, K)
    for i in range(K):
        recorded = (draft.rows[:, i] >= 0) & (i < lengths)
        row = draft.rows[:, i].clamp(0, len(draft.logits) - 1)
        distribution = RowDistribution(*(field[row] for field in draft.distribution))
        e, _, found = draft_weights(draft, i, recorded, V)
        own = is_of(distribution, draft.logits[row], e.sum(-1))
        found = torch.where((found == Status.OK.value) & ~own, int(Status.RECORD), found)
        fault = torch.where(recorded & (fault == Status.OK.value), found, fault)
    return fault


def is_of(distribution: RowDistribution, logits: Tensor, total: Tensor) -> Tensor:
    """Whether distributions may be those of rows of logits.

    Args:
        logits: [N, V], the rows.
        total: i64 [N], the sums of their weights by these distributions.

    Returns:
        bool [N]. The largest logit and the total have to be the row's, a greedy token its first
        largest; the scale has to be that of a temperature.
    """
    highest, first = logits.float().max(-1)
    low, high = SCALES
    scale = distribution.scale
    scaled = (scale >= low) & (scale <= high)
    fits = torch.where(scale == 0, distribution.threshold == first, scaled)
    return fits & (distribution.max == highest) & (distribution.total == total) & (total > 0)
