"""Triton backend for GPUs; on a CPU it runs under Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import commit, denoise_step, row_distribution, sample, verify
from .arguments import workspace_size

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "commit": commit.commit,
    "denoise_step": denoise_step.denoise_step,
    "row_distribution": row_distribution.row_distribution,
    "sample": sample.sample,
    "verify": verify.verify,
    "workspace_size": workspace_size,
}
