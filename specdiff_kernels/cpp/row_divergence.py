"""How far the draft's distribution is from the target's, and its gradient, row by row."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import specdiff_kernels._C as _C

from ..arguments import row_divergence_arguments, row_divergence_backward_arguments


def row_divergence(*args: Any, out: Sequence[Tensor]) -> None:
    _C.row_divergence(row_divergence_arguments(*args, out=out), torch.get_num_threads())


def row_divergence_backward(*args: Any, out: Tensor) -> None:
    arguments = row_divergence_backward_arguments(*args, out=out)
    _C.row_divergence_backward(arguments, torch.get_num_threads())
