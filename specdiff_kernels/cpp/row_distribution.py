"""Row distribution: logits -> max, scale, threshold, total, status."""

from __future__ import annotations

import torch
from torch import Tensor

import specdiff_kernels._C as _C

from ..arguments import address, row_distribution_arguments
from ..types import RowDistribution
from .scratch import scratch_for


def row_distribution(
    logits: Tensor, temperature: Tensor, *cuts: Tensor | None, out: RowDistribution
) -> None:
    """cuts: top_k, top_p, min_p"""
    scratch = scratch_for(logits, *cuts)
    arguments = row_distribution_arguments(logits, temperature, *cuts, out=out)
    _C.row_distribution(arguments, address(scratch), torch.get_num_threads())
