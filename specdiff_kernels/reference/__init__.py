"""The specification: every op by its equations, in plain PyTorch, on any device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import commit, denoise_step, row_distribution, row_divergence, sample, skinny_linear, verify


def workspace_size(rows: int, V: int) -> int:
    """No workspace is taken."""
    return 0


FUNCTIONS: dict[str, Callable[..., Any]] = {
    "commit": commit.commit,
    "denoise_step": denoise_step.denoise_step,
    "row_distribution": row_distribution.row_distribution,
    "row_divergence": row_divergence.row_divergence,
    "row_divergence_backward": row_divergence.row_divergence_backward,
    "sample": sample.sample,
    "skinny_linear": skinny_linear.skinny_linear,
    "verify": verify.verify,
    "workspace_size": workspace_size,
}
