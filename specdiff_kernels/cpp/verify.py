"""Verification of a draft by the token rule, row by row up to the first rejection."""

from __future__ import annotations

import torch
from torch import Tensor

import specdiff_kernels._C as _C

from ..types import Draft, Verified
from .pointers import NO_LOGITS, address, addresses, logits_view, scratch_for


def verify(
    target_logits: Tensor,
    draft: Draft,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor | None,
    round: Tensor | None,
    words: Tensor | None,
    *,
    out: Verified,
) -> None:
    scratch = scratch_for(target_logits, top_k, top_p, min_p)
    _C.verify(
        logits_view(target_logits),
        target_logits.shape[0],
        target_logits.shape[1] - 1,
        *addresses((draft.tokens, draft.tau, draft.rows)),
        NO_LOGITS if draft.logits is None else logits_view(draft.logits),
        0 if draft.logits is None else draft.logits.shape[0],
        addresses(draft.law or (None,) * 5),
        *addresses((draft.draft_ids, draft.lengths)),
        draft.value_dependent,
        addresses((temperature, top_k, top_p, min_p)),
        addresses((words, seed, round)),
        *addresses(out),
        address(scratch),
        torch.get_num_threads(),
    )
