"""PromptLookup: drafts the continuation of an earlier occurrence of the last n-gram.

It needs no model and costs almost nothing. It works well if the output repeats the input. Saxena,
https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdiff_kernels import Draft

from ..loop.drafter import Drafter, Draws, News
from ..loop.sampling import RowSampling


class History:
    """Tokens of one sequence, and the position after the last occurrence of each n-gram."""

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
    """Drafts the tokens after the most recent earlier occurrence of a row's last n-gram.

    The longest n-gram that occurred before is used. If there is none, the row drafts nothing.
    Tokens are one-hot: they have no draft distribution, and `verify` accepts them with the target's
    probability.

    Args:
        max_ngram: length of the longest n-gram to look for, at least 1.

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
        self.rows = [History(self.max_ngram) for _ in range(batch)]

    def forget(self, rows: list[int]) -> None:
        for b in rows:
            self.rows[b] = History(self.max_ngram)

    def draft(self, news: News, k: int, lengths: Tensor, draws: Draws) -> Draft:
        proposals = []
        wanted = lengths.tolist()
        committed = zip(news.tokens.tolist(), news.counts.tolist(), strict=True)
        for b, (tokens, count) in enumerate(committed):
            for token in tokens[:count]:
                self.rows[b].append(token)
            proposals.append(self.rows[b].propose(wanted[b]))
        padded = [p + [0] * (k - len(p)) for p in proposals]
        device = lengths.device
        return Draft.guesses(
            torch.tensor(padded, device=device),
            torch.tensor([len(p) for p in proposals], device=device),
        )
