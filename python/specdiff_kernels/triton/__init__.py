"""Triton backend for GPUs; on a CPU it runs under Triton's interpreter."""

from __future__ import annotations

from ..backends import functions_of
from . import commit, denoise_step, row_distribution, sample, verify
from .arguments import workspace_size

FUNCTIONS = functions_of(commit, denoise_step, row_distribution, sample, verify) | {
    "workspace_size": workspace_size
}
