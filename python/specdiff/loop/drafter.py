"""Drafter: the base class of everything that learns committed tokens and proposes the next ones.

The verifier needs no more: anything that fills in a `Draft` honestly can draft.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from specdiff_kernels import Draft, Tree

from .sampling import RowSampling
from .trees import Growth


class News(NamedTuple):
    """Tokens that were committed since the drafter's last call. In the first call of a row, that is
    its prompt, or the rest of it that `Drafter.read` was not told.

    The loop writes the memory again in every round: copy what has to be remembered.
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
    """Keys of a round's random numbers."""

    seed: Tensor  # i64 [B], random bits of each sequence
    round: Tensor  # i64 [B], which draft of its sequence this is
    position: Tensor | None = None  # i64 [B], of the first drafted token, if draws are coupled


class Drafter(ABC):
    """Proposes tokens for every row of a batch.

    Attributes:
        vocab_size: of the target that it drafts for; None: any.
        block: tokens that it drafts per round unless told otherwise.
        most: the largest K that it can draft; None: any.
        steps: T, the reverse steps that it takes per round, which may be set between rounds; None:
            it takes none.
        needs_hidden: whether `News.hidden` must be filled in. It is then told prompts by `read`.
        target_layers: layers whose residual streams `News.hidden` is to hold, counted from 1, after
            the embedding. The lm head's input always comes last and is not listed.
        reads: whether it is told prompts by `read`, without states. Otherwise they are in the news
            of `draft`, beside what other rows' last round brought.
        capturable: whether its rounds can be captured in CUDA graphs, see `draft`.
        grows: whether it has `tree`.

    Example:
        >>> class Zeros(Drafter):
        ...     vocab_size, block = None, 4
        ...
        ...     def draft(self, news, k, lengths, draws):
        ...         return Draft.guesses(lengths.new_zeros(len(lengths), k), lengths)
    """

    vocab_size: int | None = None
    block: int = 4
    most: int | None = None
    steps: int | None = None
    needs_hidden: bool = False
    target_layers: tuple[int, ...] = ()
    reads: bool = False
    capturable: bool = False
    grows: bool = False

    def start(self, batch: int, capacity: int, sampling: RowSampling) -> None:  # noqa: B027
        """Forget everything.

        Args:
            batch: rows.
            capacity: most tokens that a row can have, prompt included.
            sampling: of the rows; `sampling.parameters` are what the ops take. They change in place
                when a row is admitted.
        """

    def forget(self, rows: list[int]) -> None:  # noqa: B027
        """Forget these rows: other sequences take their places."""

    def read(self, rows: slice, news: News) -> None:
        """Learn what was committed to some rows, without drafting.

        Prompts come in chunks if the drafter needs states: those of a whole prompt would fill the
        memory. 512 tokens of SmolLM2 with four states each are 4.7 MB a row in fp32. The last token
        of a prompt is left for `draft`, as is the last one committed.

        Args:
            rows: of the batch.
            news: of these rows alone. For prompts, `longest` is at least the tokens that they have
                now. A drafter that `reads` is told each row once, before the row has tokens.
        """
        raise NotImplementedError(f"{type(self).__name__} reads prompts, but has no `read`")

    @abstractmethod
    def draft(self, news: News, k: int, lengths: Tensor, draws: Draws) -> Draft:
        """Propose up to `lengths[b]` <= k tokens for row b.

        A round can be captured in a CUDA graph if this neither waits for the device, when told
        `news.longest`, nor keeps what it remembers in other memory from call to call.

        Args:
            news: tokens committed since the last call.
            k: width of the draft, at least 1. It changes between rounds only if a chooser does.
            lengths: i64 [B], most tokens wanted per row; 0 for rows that have finished.
            draws: keys of its random numbers, as the ops take them.

        Returns:
            a Draft of at most k columns, whose `lengths` are at most those given.
        """

    def tree(self, news: News, k: int, growth: Growth, lengths: Tensor, draws: Draws) -> Tree:
        """Propose a tree for every row, of paths of up to `lengths[b]` <= k tokens for row b.

        Args:
            growth: how many nodes, and whether the likeliest tokens are taken or some are drawn.
            news, k, lengths, draws: as of `draft`.

        Returns:
            a Tree of at most `growth.nodes` columns.
        """
        raise NotImplementedError(f"{type(self).__name__} drafts chains alone: leave tree out")


def check_length(drafter: Drafter, k: int) -> None:
    """Raise ValueError unless a drafter can draft k tokens."""
    if drafter.most is not None and not 1 <= k <= drafter.most:
        raise ValueError(f"k must be in [1, {drafter.most}] for this drafter, got {k}")


def draft_status(draft: Draft | Tree) -> Tensor:
    """Why a draft lacks tokens that it was to have: the status of its distributions. i32 [B]

    Position i of row b was drawn from row b K + i of the pool, as `denoise_step` has it, and each
    row of a batch of trees has as many rows of the pool, as `build_tree` has it; a draft made
    otherwise is thought to be sound. `verify` reports such a token, -1, without the reason.
    """
    B, K = draft.tokens.shape
    if isinstance(draft, Tree):
        if draft.distribution is None or B == 0 or draft.distribution.status.numel() % B:
            return draft.tokens.new_zeros(B, dtype=torch.int32)
        return draft.distribution.status.view(B, -1).amax(1)
    if draft.distribution is None or draft.distribution.status.numel() != B * K or K == 0:
        return draft.tokens.new_zeros(B, dtype=torch.int32)
    missing = draft.tokens < 0
    if draft.lengths is not None:
        missing &= torch.arange(K, device=missing.device) < draft.lengths[:, None]
    return (draft.distribution.status.view(B, K) * missing).amax(1)
