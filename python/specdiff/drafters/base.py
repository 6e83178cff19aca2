"""What a drafter is: it learns what was committed and proposes what comes next.

The verifier needs nothing else, so anything that fills in a `Draft` honestly can draft.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

from specdiff_kernels import Draft

from ..sampling import Sampling


class News(NamedTuple):
    """What was committed since the drafter's last call; in the first call, the prompts."""

    tokens: Tensor  # i64 [B, N], right-padded
    counts: Tensor  # i64 [B], how many of them are real; 0 for rows that have finished
    hidden: Tensor | None  # [B, N, d], the target's lm head input at the position BEFORE each token


class Drafter(Protocol):
    """Proposes tokens for every row of a batch.

    Attributes:
        needs_hidden: whether `News.hidden` must be filled in.
        vocab_size: of the target it drafts for; None: any.
        block: tokens that it drafts per round unless told otherwise.
    """

    needs_hidden: bool
    vocab_size: int | None
    block: int

    def start(self, batch: int, capacity: int, sampling: Sampling) -> None:
        """Forget everything. `capacity`: most tokens a row can have, prompt included."""

    def draft(self, news: News, k: int, lengths: Tensor, seed: Tensor, round: Tensor) -> Draft:
        """Propose up to `lengths[b]` <= k tokens for row b.

        Args:
            news: tokens committed since the last call.
            k: width of the draft, at least 1.
            lengths: i64 [B], most tokens wanted per row; 0 for rows that have finished.
            seed: i64 [B], random bits of each sequence.
            round: i64 [B], which draft of its sequence this is.

        Returns:
            a Draft with tokens [B, k], whose `lengths` are at most those given.
        """
