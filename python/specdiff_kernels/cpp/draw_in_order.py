"""Positions drawn from left to right, each corrected for the token before it."""

from __future__ import annotations

import torch
from torch import Tensor

import specdiff_kernels._C as _C

from ..arguments import address, pack
from ..corrections import Correction
from ..ops.decoder_layer import Linear
from ..ops.draw_in_order import DrawInOrderInputs
from ..types import Pending
from .decoder_layer import weight
from .denoise_step import CANDIDATE_WORDS
from .scratch import scratch_for


def draw_in_order(inputs: DrawInOrderInputs, *, out: Pending) -> None:
    step, correction, anchor, hi = inputs
    B, K = out.tokens.shape
    codes = correction.codes
    drawn = codes.new_empty(_C.panels_size(B, codes.shape[1]))
    candidates = out.tokens.new_empty((B, K, CANDIDATE_WORDS))
    scratch = scratch_for(step.logits, step.sampling)
    ignored = torch.empty_like(out.entropy)  # what later steps say of entropies
    _C.draw_in_order(
        pack(step, out),
        [*numbers(correction, anchor), hi, ignored.data_ptr(), drawn.data_ptr()],
        candidates.data_ptr(),
        address(scratch),
        torch.get_num_threads(),
    )


def numbers(correction: Correction, anchor: Tensor) -> list[int]:
    """As native code takes them; the tensors have to stay."""
    codes, inner, W = correction
    V, r = codes.shape
    of_weight = weight(Linear(W, None), r)
    return [codes.data_ptr(), V, r, address(inner), *of_weight, anchor.data_ptr()]
