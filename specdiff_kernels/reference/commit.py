"""Per-row lengths after a round: stop tokens, limits, rollback."""

from __future__ import annotations

import torch
from torch import Tensor

from ..types import Committed


def commit(
    lengths: Tensor,
    emitted: Tensor,
    stop_tokens: Tensor | None,
    limit: Tensor | None,
    finished: Tensor | None,
    *,
    out: Committed,
) -> None:
    """[B] lengths and [B, N] emitted tokens -> Committed."""
    N = emitted.shape[1]
    column = torch.arange(N, device=emitted.device)
    kept = (emitted >= 0).long().cumprod(-1).sum(-1)  # tokens before the padding
    done = torch.zeros_like(kept, dtype=torch.bool) if finished is None else finished
    kept = torch.where(done, 0, kept)
    if limit is not None:
        kept = torch.minimum(kept, (limit - lengths).clamp(min=0))
    if stop_tokens is not None:
        stops = (emitted[:, :, None] == stop_tokens).any(-1) & (column < kept[:, None])
        first = torch.where(stops, column, N).amin(-1)
        kept = torch.minimum(kept, first + 1)
        done = done | (first < N)
    if limit is not None:
        done = done | (lengths + kept >= limit)
    out.lengths.copy_(lengths + kept)
    out.kept.copy_(kept)
    out.finished.copy_(done)
