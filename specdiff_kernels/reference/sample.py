"""One token per row, by integer inverse CDF."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import RowLaw
from .numerics import draw, random_word, weights


def sample(
    logits: Tensor,
    law: RowLaw,
    seed: Tensor | None,
    round: Tensor | None,
    slot: Tensor | None,
    purpose: int,
    words: Tensor | None,
    draft_ids: Tensor | None,
    *,
    out: Tensor,
) -> None:
    """[N, V] logits and their law -> i64 [N], -1 where the row has no law."""
    word = words if words is not None else random_word(seed, slot, round, purpose)
    column = draw(weights(logits, law), word).clamp(max=logits.shape[-1] - 1)
    token = column if draft_ids is None else draft_ids[column]
    out.copy_(torch.where(law.status == 0, token, -1))
