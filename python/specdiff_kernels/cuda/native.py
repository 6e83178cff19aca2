"""The native module, which can be imported without a driver."""

from specdiff_kernels._C_cuda import (
    commit,
    denoise_step,
    fault,
    row_distribution,
    sample,
    verify,
    workspace_size,
)

__all__ = [
    "commit",
    "denoise_step",
    "fault",
    "row_distribution",
    "sample",
    "verify",
    "workspace_size",
]
