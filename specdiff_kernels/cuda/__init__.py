"""CUDA backend: hands addresses and sizes to the native module `_C_cuda`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import commit, denoise_step, row_distribution, sample, verify
from .launch import fault
from .native import workspace_size

__all__ = ["FUNCTIONS", "fault"]

FUNCTIONS: dict[str, Callable[..., Any]] = {
    "commit": commit.commit,
    "denoise_step": denoise_step.denoise_step,
    "row_distribution": row_distribution.row_distribution,
    "sample": sample.sample,
    "verify": verify.verify,
    "workspace_size": workspace_size,
}
