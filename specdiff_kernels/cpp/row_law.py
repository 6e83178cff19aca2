"""Row law: logits -> max, scale, threshold, total, status."""

from __future__ import annotations

import torch
from torch import Tensor

import specdiff_kernels._C as _C

from ..types import RowLaw
from .pointers import address, addresses, logits_view, scratch_for


def row_law(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    *,
    out: RowLaw,
) -> None:
    scratch = scratch_for(logits, top_k, top_p, min_p)
    _C.row_law(
        logits_view(logits),
        logits.shape[0],
        addresses((temperature, top_k, top_p, min_p)),
        addresses(out),
        address(scratch),
        torch.get_num_threads(),
    )
