"""Row law: logits -> max, scale, threshold, total, status."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..arguments import row_law_arguments
from ..types import RowLaw
from . import native
from .launch import launch


def row_law(logits: Tensor, *args: Any, out: RowLaw, workspace: Tensor | None = None) -> None:
    arguments = row_law_arguments(logits, *args, out=out)
    N, V = logits.shape
    launch(native.row_law, arguments, logits.device, N, V, workspace)
