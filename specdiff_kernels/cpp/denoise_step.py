"""One reverse step of absorbing-state diffusion, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

import specdiff_kernels._C as _C

from ..reveal import Reveal
from ..types import Pending
from .pointers import address, addresses, logits_view, scratch_for

CANDIDATE_WORDS = 2  # int64s kept of each position


def denoise_step(
    logits: Tensor,
    draft: Pending,
    draft_ids: Tensor | None,
    lengths: Tensor | None,
    pool_rows: Tensor,
    reveal: Reveal,
    rate: Tensor,
    step: int,
    entropies: bool,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor | None,
    round: Tensor | None,
    position: Tensor | None,
    words: Tensor | None,
    *,
    out: Pending,
) -> None:
    scratch = scratch_for(logits, top_k, top_p, min_p)
    candidates = out.tokens.new_empty((*out.tokens.shape, CANDIDATE_WORDS))
    _C.denoise_step(
        logits_view(logits),
        len(logits),
        *draft.tokens.shape,
        addresses((draft.tokens, draft.tau, draft.rows, *draft.law)),
        addresses((draft_ids, lengths, pool_rows)),
        (int(reveal.order), reveal.lo, reveal.hi, reveal.number, address(rate)),
        step,
        entropies,
        addresses((temperature, top_k, top_p, min_p)),
        addresses((words, seed, round, position)),
        addresses((out.tokens, out.tau, out.rows, *out.law, out.entropy)),
        address(candidates),
        address(scratch),
        torch.get_num_threads(),
    )
