"""Row distribution: logits -> max, scale, threshold, total, status."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..arguments import row_distribution_arguments
from ..types import RowDistribution
from . import native
from .launch import launch


def row_distribution(
    logits: Tensor, *args: Any, out: RowDistribution, workspace: Tensor | None = None
) -> None:
    arguments = row_distribution_arguments(logits, *args, out=out)
    N, V = logits.shape
    launch(native.row_distribution, arguments, logits.device, N, V, workspace)
