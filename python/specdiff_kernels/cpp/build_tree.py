"""A tree of drafted tokens, sequence by sequence."""

from __future__ import annotations

import torch

import specdiff_kernels._C as _C

from ..arguments import address, pack
from ..corrections import Corrected
from ..inputs import BuildTreeInputs
from ..trees import Grown
from .draw_in_order import numbers


def build_tree(inputs: BuildTreeInputs, *, out: Grown, corrected: Corrected | None = None) -> None:
    threads, Vd = torch.get_num_threads(), inputs.logits.shape[1]
    memory = out.tokens.new_empty(threads, _C.build_tree_memory(inputs.N, Vd))
    base, correction, drawn = None, [], None
    if corrected is not None:
        base, codes = corrected.logits, corrected.correction.codes
        correction = numbers(corrected.correction, corrected.anchor)
        drawn = codes.new_empty(threads, codes.shape[1])
    _C.build_tree(
        pack(inputs, out), len(out.tokens), address(base), correction, address(drawn),
        address(memory), threads,
    )  # fmt: skip
