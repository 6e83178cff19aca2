"""One token per row, by integer inverse CDF or by the race of exponential variates."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import specdiff_kernels._C as _C

from ..arguments import sample_arguments


def sample(*args: Any, out: Tensor) -> None:
    _C.sample(sample_arguments(*args, out=out), torch.get_num_threads())
