"""C++ backend for CPUs: hands addresses and sizes to the native module `_C`."""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import specdiff_kernels._C as _C

from ..backends import BackendError
from . import commit, denoise_step, row_distribution, row_divergence, sample, skinny_linear, verify

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
