"""Scratch memory of the C++ kernels."""

from __future__ import annotations

import torch
from torch import Tensor


def scratch_for(logits: Tensor, *truncations: Tensor | None) -> Tensor | None:
    """int64 [threads, V] if any row may be truncated."""
    if all(t is None for t in truncations):
        return None
    return logits.new_empty((torch.get_num_threads(), logits.shape[-1]), dtype=torch.int64)
