"""Verification of a draft, row by row for as long as something may be accepted."""

from __future__ import annotations

import torch

import specdiff_kernels._C as _C

from ..arguments import address, pack
from ..inputs import VerifyInputs
from ..types import Verified
from .scratch import scratch_for

PREFIX_WORDS = 6  # int64s that the block rule keeps of each prefix


def verify(inputs: VerifyInputs, *, out: Verified) -> None:
    scratch, prefixes = scratch_for(inputs.target_logits, inputs.sampling), None
    if inputs.rule == "block":
        prefixes = out.emitted.new_empty((*out.emitted.shape, PREFIX_WORDS))
    threads = torch.get_num_threads()
    _C.verify(pack(inputs, out), address(prefixes), address(scratch), threads)
