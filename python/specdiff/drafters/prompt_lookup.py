"""PromptLookup: drafts the continuation of an earlier occurrence of the last n-gram.

It needs no model and costs almost nothing. It works well if the output repeats the input. Saxena,
https://github.com/apoorvumang/prompt-lookup-decoding
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from specdiff_kernels import Draft, Tree
from specdiff_kernels.trees import ROOT

from ..loop.drafter import Drafter, Draws, News
from ..loop.sampling import RowSampling
from ..loop.trees import Growth

MOST = 64  # occurrences of an n-gram that a tree looks at


class History:
    """Tokens of one sequence, and the positions after each occurrence of each n-gram."""

    def __init__(self, max_ngram: int) -> None:
        self.max_ngram = max_ngram
        self.tokens: list[int] = []
        self.continued: dict[tuple[int, ...], list[int]] = {}

    def append(self, token: int) -> None:
        position = len(self.tokens)
        for n in range(1, min(self.max_ngram, position) + 1):
            self.continued.setdefault(tuple(self.tokens[-n:]), []).append(position)
        self.tokens.append(token)

    def proposals(self, length: int) -> Iterator[list[int]]:
        """What followed the last n-gram before: of the longest one first, the latest first. Of each
        no more than the latest MOST: in a long text of repetitions they are as many as tokens."""
        for n in range(min(self.max_ngram, len(self.tokens)), 0, -1):
            for start in self.continued.get(tuple(self.tokens[-n:]), [])[: -MOST - 1 : -1]:
                yield self.tokens[start : start + length]

    def tree(self, nodes: int, length: int) -> tuple[list[int], list[int]]:
        """Tokens and parents of all proposals together, in their order, as far as there is room."""
        tokens: list[int] = []
        parents: list[int] = []
        known: dict[tuple[int, int], int] = {}  # node by its parent and token
        for proposal in self.proposals(length):
            parent = ROOT
            for token in proposal:
                if (parent, token) not in known:
                    if len(tokens) == nodes:
                        return tokens, parents
                    known[parent, token] = len(tokens)
                    tokens.append(token)
                    parents.append(parent)
                parent = known[parent, token]
        return tokens, parents


class PromptLookup(Drafter):
    """Drafts the tokens after the most recent earlier occurrence of a row's last n-gram.

    The longest n-gram that occurred before is used. If there is none, the row drafts nothing. A
    tree holds what followed its other occurrences as well, and those of shorter n-grams.
    Tokens are one-hot: they have no draft distribution, and `verify` accepts them with the target's
    probability.

    Args:
        max_ngram: length of the longest n-gram to look for, at least 1.

    Example:
        >>> decoder = Decoder(target, PromptLookup())
    """

    vocab_size: int | None = None
    block = 8
    grows = True

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
        self.learn(news)
        wanted = lengths.tolist()
        proposals = [next(row.proposals(n), []) for row, n in zip(self.rows, wanted, strict=True)]
        padded = [p + [0] * (k - len(p)) for p in proposals]
        device = lengths.device
        return Draft.guesses(
            torch.tensor(padded, device=device),
            torch.tensor([len(p) for p in proposals], device=device),
        )

    def tree(self, news: News, k: int, growth: Growth, lengths: Tensor, draws: Draws) -> Tree:
        if growth.shape is not None:
            raise ValueError(
                "a shape has tokens drawn, and prompt lookup draws none: give tree a number of "
                "nodes"
            )
        self.learn(news)
        grown = [
            row.tree(growth.nodes, length)
            for row, length in zip(self.rows, lengths.tolist(), strict=True)
        ]
        padding = [[-1] * (growth.nodes - len(tokens)) for tokens, _ in grown]
        tokens, parents = (
            torch.tensor([each[i] + rest for each, rest in zip(grown, padding, strict=True)])
            for i in (0, 1)
        )
        return Tree.guesses(tokens.to(lengths.device), parents.to(lengths.device))

    def learn(self, news: News) -> None:
        """Append what was committed to the rows."""
        committed = zip(news.tokens.tolist(), news.counts.tolist(), strict=True)
        for row, (tokens, count) in zip(self.rows, committed, strict=True):
            for token in tokens[:count]:
                row.append(token)
