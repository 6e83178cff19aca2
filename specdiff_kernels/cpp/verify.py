"""Verification of a draft, row by row for as long as something may be accepted."""

from __future__ import annotations

import torch
from torch import Tensor

import specdiff_kernels._C as _C

from ..records import RULES, Record
from ..types import Draft, Verified
from .pointers import NO_LOGITS, address, addresses, logits_view, scratch_for

PREFIX_WORDS = 6  # int64s that the block rule keeps of each prefix


def verify(
    target_logits: Tensor,
    draft: Draft,
    rule: str,
    record: Record,
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
    _C.verify(
        logits_view(target_logits),
        target_logits.shape[0],
        target_logits.shape[1] - 1,
        addresses((draft.tokens, draft.tau, draft.rows)),
        NO_LOGITS if draft.logits is None else logits_view(draft.logits),
        0 if draft.logits is None else draft.logits.shape[0],
        addresses(draft.law or (None,) * 5),
        addresses((draft.draft_ids, draft.lengths)),
        (RULES.index(rule), int(record), draft.final_step),
        addresses((temperature, top_k, top_p, min_p)),
        addresses((words, seed, round, position)),
        addresses(out),
        address(prefixes),
        address(scratch),
        torch.get_num_threads(),
    )
