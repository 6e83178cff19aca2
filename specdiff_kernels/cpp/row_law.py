"""Row law: logits -> max, scale, threshold, total, status."""

from __future__ import annotations

import torch
from torch import Tensor

import specdiff_kernels._C as _C

from ..arguments import address, row_law_arguments
from ..types import RowLaw
from .scratch import scratch_for


def row_law(logits: Tensor, temperature: Tensor, *cuts: Tensor | None, out: RowLaw) -> None:
    """cuts: top_k, top_p, min_p"""
    scratch = scratch_for(logits, *cuts)
    arguments = row_law_arguments(logits, temperature, *cuts, out=out)
    _C.row_law(arguments, address(scratch), torch.get_num_threads())
