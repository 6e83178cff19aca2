"""Scratch memory of the C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inputs import Sampling


def scratch_for(logits: Tensor, sampling: Sampling) -> Tensor | None:
    """int64 [threads, V] if any row may be truncated."""
    if not sampling.truncates:
        return None
    return logits.new_empty((torch.get_num_threads(), logits.shape[-1]), dtype=torch.int64)
