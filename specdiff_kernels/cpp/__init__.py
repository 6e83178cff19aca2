"""C++ backend for CPUs: hands addresses and sizes to the native module `_C`."""

import os

import specdiff_kernels._C as _C

from ..backends import BackendError
from .commit import commit
from .denoise_step import denoise_step
from .row_distribution import row_distribution
from .row_divergence import row_divergence, row_divergence_backward
from .sample import sample
from .skinny_linear import skinny_linear
from .verify import verify

__all__ = [
    "commit",
    "denoise_step",
    "row_distribution",
    "row_divergence",
    "row_divergence_backward",
    "sample",
    "skinny_linear",
    "verify",
    "workspace_size",
]

if isa := os.environ.get("SPECDIFF_CPU_ISA"):
    if isa not in _C.supported_isas():
        raise BackendError(
            f"SPECDIFF_CPU_ISA is {isa!r}; expected one of {', '.join(_C.supported_isas())}, "
            "which this processor has"
        )
    _C.use_isa(isa)


def workspace_size(rows: int, V: int) -> int:
    """No workspace is taken."""
    return 0
