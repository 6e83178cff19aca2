"""Tensors as the addresses and sizes that native code takes."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NO_LOGITS = (0, 0, 0, 0, 0)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def addresses(tensors: Iterable[Tensor | None]) -> list[int]:
    return [address(tensor) for tensor in tensors]


def logits_view(logits: Tensor) -> tuple[int, int, int, int, int]:
    """[N, V] or [B, N, V] -> (address, dtype, V, batch stride, row stride)"""
    batch_stride = logits.stride(0) if logits.ndim == 3 else 0
    dtype = DTYPES[logits.dtype]
    return logits.data_ptr(), dtype, logits.shape[-1], batch_stride, logits.stride(-2)


def scratch_for(logits: Tensor, *truncations: Tensor | None) -> Tensor | None:
    """int64 [threads, V] if any row may be truncated."""
    if all(t is None for t in truncations):
        return None
    return logits.new_empty((torch.get_num_threads(), logits.shape[-1]), dtype=torch.int64)
