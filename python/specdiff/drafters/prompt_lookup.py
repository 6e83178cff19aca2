"""PromptLookup: the continuation of the last n-gram where it occurred before.

Costs nothing and needs no model; good where the output repeats the input. Saxena,
https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdiff_kernels import Draft

from ..loop.drafter import Drafter, Draws, News
from ..loop.sampling import RowSampling


class Row:
    """Tokens of one sequence, and where each n-gram was last continued."""

    def __init__(self, max_ngram: int) -> None:
        self.max_ngram = max_ngram
        self.tokens: list[int] = []
        self.continued: dict[tuple[int, ...], int] = {}

    def append(self, token: int) -> None:
        position = len(self.tokens)
        for n in range(1, min(self.max_ngram, position) + 1):
            self.continued[tuple(self.tokens[-n:])] = position
        self.tokens.append(token)

    def propose(self, length: int) -> list[int]:
        for n in range(min(self.max_ngram, len(self.tokens)), 0, -1):
            start = self.continued.get(tuple(self.tokens[-n:]))
            if start is not None:
                return self.tokens[start : start + length]
        return []


class PromptLookup(Drafter):
    """Drafts what followed the most recent earlier occurrence of the row's last n-gram.

    The longest n-gram that occurred before is used; without one the row drafts nothing. Tokens are
    one-hot (no draft distribution), which `verify` accepts with the target's own probability.

    Args:
        max_ngram: longest n-gram to look for, at least 1.

    Example:
        >>> decoder = Decoder(target, PromptLookup())
    """

    vocab_size: int | None = None
    block = 8

    def __init__(self, max_ngram: int = 3) -> None:
        if max_ngram < 1:
            raise ValueError(f"max_ngram must be at least 1, got {max_ngram}")
        self.max_ngram = max_ngram

    def start(self, batch: int, capacity: int, sampling: RowSampling) -> None:
        self.rows = [Row(self.max_ngram) for _ in range(batch)]

    def forget(self, rows: list[int]) -> None:
        for b in rows:
            self.rows[b] = Row(self.max_ngram)

    def draft(self, news: News, k: int, lengths: Tensor, draws: Draws) -> Draft:
        B = len(self.rows)
        proposals = []
        wanted = lengths.tolist()
        committed = zip(news.tokens.tolist(), news.counts.tolist(), strict=True)
        for b, (tokens, count) in enumerate(committed):
            for token in tokens[:count]:
                self.rows[b].append(token)
            proposals.append(self.rows[b].propose(wanted[b]))
        padded = [p + [0] * (k - len(p)) for p in proposals]
        device = lengths.device
        return Draft(
            tokens=torch.tensor(padded, device=device),
            tau=torch.zeros(B, k, dtype=torch.int32, device=device),
            rows=torch.full((B, k), -1, device=device),
            lengths=torch.tensor([len(p) for p in proposals], device=device),
        )
