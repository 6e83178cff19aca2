"""Verification of a tree, row by row where a path leads."""

from __future__ import annotations

import torch

import specdiff_kernels._C as _C

from ..arguments import address, pack
from ..inputs import VerifyTreeInputs
from ..trees import VerifiedTree


def verify_tree(inputs: VerifyTreeInputs, *, out: VerifiedTree) -> None:
    scratch, threads = None, torch.get_num_threads()
    if inputs.rule == "rejection" or inputs.sampling.truncates:
        V = inputs.target_logits.shape[-1]
        scratch = out.emitted.new_empty((threads, 2, V))
    _C.verify_tree(pack(inputs, out), address(scratch), threads)
