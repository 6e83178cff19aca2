"""One token per row, by integer inverse CDF or by the race of exponential variates."""

from __future__ import annotations

from torch import Tensor

from ..arguments import pack
from ..inputs import SampleInputs
from . import native
from .launch import launch


def sample(inputs: SampleInputs, *, out: Tensor, workspace: Tensor | None = None) -> None:
    launch(native.sample, pack(inputs, out), inputs.logits, len(inputs.logits), workspace)
