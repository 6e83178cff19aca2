"""Positions drawn from left to right, each corrected for the token before it."""

from __future__ import annotations

import torch

import specdiff_kernels._C as _C

from ..arguments import address, pack
from ..ops.decoder_layer import Linear
from ..ops.draw_in_order import DrawInOrderInputs
from ..types import Pending
from .decoder_layer import weight
from .denoise_step import CANDIDATE_WORDS
from .scratch import scratch_for


def draw_in_order(inputs: DrawInOrderInputs, *, out: Pending) -> None:
    step, (codes, inner, W), anchor, hi = inputs
    B, K = out.tokens.shape
    V, r = codes.shape
    drawn = codes.new_empty(_C.panels_size(B, r))
    candidates = out.tokens.new_empty((B, K, CANDIDATE_WORDS))
    scratch = scratch_for(step.logits, step.sampling)
    ignored = torch.empty_like(out.entropy)  # what later steps say of entropies
    _C.draw_in_order(
        pack(step, out),
        [
            codes.data_ptr(), V, r, address(inner), *weight(Linear(W, None), r),
            anchor.data_ptr(), hi, ignored.data_ptr(), drawn.data_ptr(),
        ],
        candidates.data_ptr(),
        address(scratch),
        torch.get_num_threads(),
    )  # fmt: skip
