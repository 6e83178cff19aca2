"""One token per row, by integer inverse CDF or by the race of exponential variates."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from ..arguments import sample_arguments
from . import native
from .launch import launch


def sample(logits: Tensor, *args: Any, out: Tensor, workspace: Tensor | None = None) -> None:
    arguments = sample_arguments(logits, *args, out=out)
    N, V = logits.shape
    launch(native.sample, arguments, logits.device, N, V, workspace)
