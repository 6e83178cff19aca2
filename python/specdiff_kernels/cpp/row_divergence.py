"""How far the draft's distribution is from the target's, and its gradient, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

import specdiff_kernels._C as _C

from ..arguments import pack
from ..inputs import RowDivergenceBackwardInputs, RowDivergenceInputs
from ..types import Divergences


def row_divergence(inputs: RowDivergenceInputs, *, out: Divergences) -> None:
    _C.row_divergence(pack(inputs, out), torch.get_num_threads())


def row_divergence_backward(inputs: RowDivergenceBackwardInputs, *, out: Tensor) -> None:
    _C.row_divergence_backward(pack(inputs, out), torch.get_num_threads())
