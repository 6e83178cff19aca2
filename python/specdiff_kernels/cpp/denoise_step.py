"""One reverse step of absorbing-state diffusion, row by row."""

from __future__ import annotations

import torch

import specdiff_kernels._C as _C

from ..arguments import address, pack
from ..inputs import DenoiseStepInputs
from ..types import Pending
from .scratch import scratch_for

CANDIDATE_WORDS = 2  # int64s kept of each position


def denoise_step(inputs: DenoiseStepInputs, *, out: Pending) -> None:
    scratch = scratch_for(inputs.logits, inputs.sampling)
    candidates = out.tokens.new_empty((*out.tokens.shape, CANDIDATE_WORDS))
    threads = torch.get_num_threads()
    _C.denoise_step(pack(inputs, out), address(candidates), address(scratch), threads)
