"""Row distribution: logits -> max, scale, threshold, total, status."""

from __future__ import annotations

import torch

import specdiff_kernels._C as _C

from ..arguments import address, pack
from ..inputs import RowDistributionInputs
from ..types import RowDistribution
from .scratch import scratch_for


def row_distribution(inputs: RowDistributionInputs, *, out: RowDistribution) -> None:
    scratch = scratch_for(inputs.logits, inputs.sampling)
    _C.row_distribution(pack(inputs, out), address(scratch), torch.get_num_threads())
