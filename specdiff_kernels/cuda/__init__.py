"""CUDA backend: hands addresses and sizes to the native module `_C_cuda`."""

from .commit import commit
from .denoise_step import denoise_step
from .launch import fault
from .native import workspace_size
from .row_distribution import row_distribution
from .sample import sample
from .verify import verify

__all__ = [
    "commit",
    "denoise_step",
    "fault",
    "row_distribution",
    "sample",
    "verify",
    "workspace_size",
]
