"""A linear layer on a few rows: the weight is read once."""

from __future__ import annotations

import torch
from torch import Tensor

import specdiff_kernels._C as _C

from ..arguments import address
from ..fields import DTYPES
from ..inputs import SkinnyLinearInputs


def skinny_linear(inputs: SkinnyLinearInputs, *, out: Tensor) -> None:
    x, weight, N, bias = inputs
    M, K = x.shape
    # where x is laid out anew
    scratch = x.new_empty(_C.panels_size(M, K)) if M > 1 else None
    _C.skinny_linear(
        x.data_ptr(), M, K, x.stride(0),
        weight.data_ptr(), DTYPES[weight.dtype], weight.ndim == 3, N, weight.stride(0),
        address(bias), out.data_ptr(), address(scratch), torch.get_num_threads(),
    )  # fmt: skip
