"""Fused kernels for speculative decoding with a diffusion drafter: the ops and their values.

    from specdiff_kernels import Draft, commit, row_law, sample, verify

`python -m specdiff_kernels` prints which backends run here.
"""

from .backends import BackendError, available_backends, use_backend
from .ops import commit, row_law, sample, skinny_linear, verify
from .types import (
    MAX_VOCABULARY,
    Committed,
    Draft,
    LawError,
    Purpose,
    RowLaw,
    Status,
    Verified,
    check_status,
)

__all__ = [
    "MAX_VOCABULARY",
    "BackendError",
    "Committed",
    "Draft",
    "LawError",
    "Purpose",
    "RowLaw",
    "Status",
    "Verified",
    "available_backends",
    "check_status",
    "commit",
    "row_law",
    "sample",
    "skinny_linear",
    "use_backend",
    "verify",
]
