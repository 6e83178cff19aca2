"""One token per row, by integer inverse CDF or by the race of exponential variates."""

from __future__ import annotations

import torch
from torch import Tensor

import specdiff_kernels._C as _C

from ..types import RowLaw
from .pointers import address, addresses, logits_view


def sample(
    logits: Tensor,
    law: RowLaw,
    seed: Tensor | None,
    round: Tensor | None,
    slot: Tensor | None,
    purpose: int,
    position: Tensor | None,
    words: Tensor | None,
    draft_ids: Tensor | None,
    *,
    out: Tensor,
) -> None:
    _C.sample(
        logits_view(logits),
        logits.shape[0],
        addresses(law),
        addresses((words, seed, round, position)),
        address(slot),
        purpose,
        address(draft_ids),
        address(out),
        torch.get_num_threads(),
    )
