"""A linear layer on a few rows: the weight is read once."""

from __future__ import annotations

import torch
from torch import Tensor

import specdiff_kernels._C as _C

from ..arguments import DTYPES, address


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> None:
    (M, K), N = x.shape, weight.shape[0]
    _C.skinny_linear(
        x.data_ptr(), M, K, x.stride(0),
        weight.data_ptr(), DTYPES[weight.dtype], N, weight.stride(0),
        address(bias), out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip
