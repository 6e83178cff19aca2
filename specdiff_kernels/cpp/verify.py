"""Verification of a draft, row by row for as long as something may be accepted."""

from __future__ import annotations

import torch
from torch import Tensor

import specdiff_kernels._C as _C

from ..arguments import address, verify_arguments
from ..records import Record
from ..types import Draft, Lenience, Verified
from .scratch import scratch_for

PREFIX_WORDS = 6  # int64s that the block rule keeps of each prefix


def verify(
    target_logits: Tensor,
    draft: Draft,
    rule: str,
    record: Record,
    lenience: Lenience | None,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor | None,
    round: Tensor | None,
    position: Tensor | None,
    words: Tensor | None,
    *,
    out: Verified,
) -> None:
    scratch = scratch_for(target_logits, top_k, top_p, min_p)
    prefixes = None
    if rule == "block":
        prefixes = out.emitted.new_empty((*out.emitted.shape, PREFIX_WORDS))
    arguments = verify_arguments(
        target_logits, draft, rule, record, lenience, temperature, top_k, top_p, min_p,
        seed, round, position, words, out=out,
    )  # fmt: skip
    _C.verify(arguments, address(prefixes), address(scratch), torch.get_num_threads())
