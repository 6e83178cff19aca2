"""CUDA backend: hands addresses and sizes to the native module `_C_cuda`."""

from __future__ import annotations

from ..backends import functions_of
from . import commit, denoise_step, row_distribution, sample, verify
from .launch import fault
from .native import workspace_size

__all__ = ["FUNCTIONS", "fault"]

FUNCTIONS = functions_of(commit, denoise_step, row_distribution, sample, verify) | {
    "workspace_size": workspace_size
}
