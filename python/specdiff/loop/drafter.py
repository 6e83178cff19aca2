"""What a drafter is: it learns what was committed and proposes what comes next.

The verifier needs nothing else, so anything that fills in a `Draft` honestly can draft.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from specdiff_kernels import Draft

from .sampling import Sampling


class News(NamedTuple):
    """What was committed since the drafter's last call; in the first call, the prompts, or what is
    left of them where `Drafter.read` was told the rest.

    The loop uses the memory again: what is to be remembered has to be copied.
    """

    tokens: Tensor  # i64 [B, N], right-padded
    counts: Tensor  # i64 [B], how many of them are real; 0 for rows that have finished
    # [B, N, (n + 1) d], the target's states at the position BEFORE each token, side by side: the
    # residual streams behind the n layers that the drafter asks for, and last the lm head's input
    hidden: Tensor | None
    longest: int | None = None  # at least the tokens that any row has, these included, if the
    # drafter must not wait for the device; None: it may look


def joined(parts: Sequence[News]) -> News:
    """News of several rounds as those of one, each row's tokens in order."""
    last = parts[-1]
    N = sum(part.tokens.shape[1] for part in parts)
    counts = torch.zeros_like(last.counts)
    tokens = last.tokens.new_zeros(len(counts), N)
    hidden = (
        None
        if last.hidden is None
        else last.hidden.new_zeros(len(counts), N, last.hidden.shape[-1])
    )
    for part in parts:
        # padding is written as well, and over it what comes later
        at = counts[:, None] + torch.arange(part.tokens.shape[1], device=counts.device)
        tokens.scatter_(1, at, part.tokens)
        if hidden is not None and part.hidden is not None:
            hidden.scatter_(1, at[..., None].expand_as(part.hidden), part.hidden)
        counts = counts + part.counts
    return News(tokens, counts, hidden, last.longest)


class Draws(NamedTuple):
    """What keys the random numbers of a round."""

    seed: Tensor  # i64 [B], random bits of each sequence
    round: Tensor  # i64 [B], which draft of its sequence this is
    position: Tensor | None = None  # i64 [B], of the first drafted token, if draws are coupled


class Drafter(Protocol):
    """Proposes tokens for every row of a batch.

    Attributes:
        needs_hidden: whether `News.hidden` must be filled in; it is a `StateDrafter` then.
        vocab_size: of the target it drafts for; None: any.
        block: tokens that it drafts per round unless told otherwise.
        capturable: left out or False unless its rounds can be captured, see `draft`.
        most: left out unless K has a limit.
        steps: left out unless it takes T reverse steps a round, which may be set between rounds.
    """

    needs_hidden: bool
    vocab_size: int | None
    block: int

    def start(self, batch: int, capacity: int, sampling: Sampling) -> None:
        """Forget everything. `capacity`: most tokens a row can have, prompt included."""

    def forget(self, rows: list[int]) -> None:
        """Other sequences take the places of these rows; their prompts are in the next news."""

    def draft(self, news: News, k: int, lengths: Tensor, draws: Draws) -> Draft:
        """Propose up to `lengths[b]` <= k tokens for row b.

        A round can be captured in a CUDA graph if this neither waits for the device, when told
        `news.longest`, nor keeps what it remembers in other memory from call to call.

        Args:
            news: tokens committed since the last call.
            k: width of the draft, at least 1 and the same in every round.
            lengths: i64 [B], most tokens wanted per row; 0 for rows that have finished.
            draws: keys of its random numbers, as the ops take them.

        Returns:
            a Draft of at most k columns, whose `lengths` are at most those given.
        """


class StateDrafter(Drafter, Protocol):
    """A drafter with `needs_hidden`: it reads the target's states.

    Attributes:
        target_layers: layers whose residual streams `News.hidden` is to hold, counted from 1, after
            the embedding; left out if the lm head's input will do.
    """

    def read(self, rows: slice, news: News) -> None:
        """Learn what was committed to some rows, without drafting.

        Prompts come in chunks, since all their states together would fill the memory: 512 tokens of
        SmolLM2 with four states each are 4.7 MB a row in fp32. The last token of a prompt is left
        for `draft`, as is the last one committed.

        Args:
            rows: of the batch.
            news: of these rows alone; `longest` is at least the tokens that they have now.
        """


def draft_status(draft: Draft) -> Tensor:
    """Why a draft lacks tokens that it was to have: the status of its distributions. i32 [B]

    Position i of row b was drawn from row b K + i of the pool, as `denoise_step` has it; a draft
    made otherwise is thought to be sound. `verify` reports such a token, -1, without the reason.
    """
    B, K = draft.tokens.shape
    if draft.distribution is None or draft.distribution.status.numel() != B * K or K == 0:
        return draft.tokens.new_zeros(B, dtype=torch.int32)
    missing = draft.tokens < 0
    if draft.lengths is not None:
        missing &= torch.arange(K, device=missing.device) < draft.lengths[:, None]
    return (draft.distribution.status.view(B, K) * missing).amax(1)
