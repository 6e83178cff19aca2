"""One token per row, by integer inverse CDF or by the race of exponential variates."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inputs import SampleInputs
from .numerics import draw, race, race_words, random_word, weights


def sample(inputs: SampleInputs, *, out: Tensor) -> None:
    """[N, V] logits and their distribution -> i64 [N], -1 where the row has no distribution."""
    logits, distribution, random, slot, purpose, draft_ids = inputs
    words, seed, round, position = random
    V = logits.shape[-1]
    e = weights(logits, distribution)
    if position is not None:
        ids = torch.arange(V, device=e.device) if draft_ids is None else draft_ids
        column = race(e, race_words(seed, position, ids) if words is None else words)
    else:
        word = random_word(seed, slot, round, purpose) if words is None else words
        column = draw(e, word).clamp(max=V - 1)
    token = column if draft_ids is None else draft_ids[column]
    out.copy_(torch.where(distribution.status == 0, token, -1))
