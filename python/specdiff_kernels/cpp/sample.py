"""One token per row, by integer inverse CDF or by the race of exponential variates."""

from __future__ import annotations

import torch
from torch import Tensor

import specdiff_kernels._C as _C

from ..arguments import pack
from ..inputs import SampleInputs


def sample(inputs: SampleInputs, *, out: Tensor) -> None:
    _C.sample(pack(inputs, out), torch.get_num_threads())
