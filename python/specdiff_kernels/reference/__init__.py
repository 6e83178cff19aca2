"""The specification: every op by its equations, in plain PyTorch, on any device."""

from __future__ import annotations

from ..backends import functions_of, no_workspace
from . import (
    build_tree,
    cached_attention,
    commit,
    decoder_layer,
    denoise_step,
    fingerprint,
    row_distribution,
    row_divergence,
    sample,
    skinny_linear,
    verify,
    verify_tree,
)

FUNCTIONS = functions_of(
    build_tree,
    cached_attention,
    commit,
    decoder_layer,
    denoise_step,
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
