"""One reverse step of absorbing-state diffusion, row by row."""

from __future__ import annotations

import torch
from torch import Tensor

import specdiff_kernels._C as _C

from ..arguments import address, denoise_step_arguments
from ..reveal import Reveal
from ..types import Pending
from .scratch import scratch_for

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
    arguments = denoise_step_arguments(
        logits, draft, draft_ids, lengths, pool_rows, reveal, rate, step, entropies,
        temperature, top_k, top_p, min_p, seed, round, position, words, out=out,
    )  # fmt: skip
    _C.denoise_step(arguments, address(candidates), address(scratch), torch.get_num_threads())
