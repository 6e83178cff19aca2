"""Row distribution: logits -> max, scale, threshold, total, status."""

from __future__ import annotations

from torch import Tensor

from ..arguments import pack
from ..inputs import RowDistributionInputs
from ..types import RowDistribution
from . import native
from .launch import launch


def row_distribution(
    inputs: RowDistributionInputs, *, out: RowDistribution, workspace: Tensor | None = None
) -> None:
    launch(native.row_distribution, pack(inputs, out), inputs.logits, len(inputs.logits), workspace)
