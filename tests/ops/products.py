"""Inputs of a linear layer on a few rows, and how errors are measured."""

from __future__ import annotations

import torch
from torch import Tensor

NAN = float("nan")
SHAPES = [(1, 1), (13, 7), (12, 8), (97, 33), (50, 577), (200, 1536)]  # [N, K]


def inputs(
    M: int, N: int, K: int, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor, Tensor]:
    """x [M, K], weight [N, K] of `dtype`, bias [N]"""
    random = torch.Generator().manual_seed(1000 * M + N + K)
    x = torch.randn(M, K, generator=random)
    return x, torch.randn(N, K, generator=random).to(dtype), torch.randn(N, generator=random)


def rms(x: Tensor) -> Tensor:
    """Root mean square over all entries."""
    return x.square().mean().sqrt()
