"""C++ backend for CPUs: hands addresses and sizes to the native module `_C`."""

from __future__ import annotations

import os

import specdiff_kernels._C as _C

from ..backends import BackendError, functions_of, no_workspace
from . import (
    build_tree,
    cached_attention,
    commit,
    decoder_layer,
    denoise_step,
    draw_in_order,
    fingerprint,
    row_distribution,
    row_divergence,
    sample,
    skinny_linear,
    verify,
    verify_tree,
)

if isa := os.environ.get("SPECDIFF_CPU_ISA"):
    if isa not in _C.supported_isas():
        raise BackendError(
            f"SPECDIFF_CPU_ISA is {isa!r}; expected one of {', '.join(_C.supported_isas())}, "
            "which this processor has"
        )
    _C.use_isa(isa)


FUNCTIONS = functions_of(
    build_tree,
    cached_attention,
    commit,
    decoder_layer,
    denoise_step,
    draw_in_order,
    fingerprint,
    row_distribution,
    row_divergence,
    sample,
    skinny_linear,
    verify,
    verify_tree,
) | {
    "gated_mlp": decoder_layer.gated_mlp,
    "row_divergence_backward": row_divergence.row_divergence_backward,
    "row_norm": decoder_layer.row_norm,
    "watch": fingerprint.watch,
    "workspace_size": no_workspace,
}
