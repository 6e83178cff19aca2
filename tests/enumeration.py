"""Exact probabilities of an op's outcomes, found from the outside.

Every outcome is monotone in each random word, so bisection over the 2^64 words of one draw finds
where it changes, and the lengths of the intervals are the probabilities.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

import torch
from torch import Tensor

from specdiff_kernels import use_backend
from tests.ops.interpreter import is_slow

WORDS = 2**64


def patterns(words: list[int]) -> Tensor:
    """Unsigned 64-bit words as an int64 tensor of the same bits."""
    return torch.tensor([w - WORDS if w >= WORDS // 2 else w for w in words], dtype=torch.int64)


def first_word(
    changed: Callable[[Tensor], Tensor], n: int, expected: list[int] | None = None
) -> list[int]:
    """For each of n independent draws the smallest word at which `changed` holds, or 2^64.

    changed: int64 patterns [n] -> bool [n], False below some word and True from there on.
    expected: words that should be the answer. If they are, this takes two calls of `changed`.

    Interpreted ops are slow: there the reference finds the words, and the op in question has to
    change at each of them.
    """
    if expected is not None and changes_at(changed, expected):
        return expected
    if not is_slow():
        return bisect(changed, n)
    with use_backend("reference"):
        words = bisect(changed, n)
    assert changes_at(changed, words)
    return words


def changes_at(changed: Callable[[Tensor], Tensor], words: list[int]) -> bool:
    """Whether these are the smallest words at which `changed` holds, or 2^64."""
    before = changed(patterns([max(word - 1, 0) for word in words])).tolist()
    there = changed(patterns([min(word, WORDS - 1) for word in words])).tolist()
    return before == [word == 0 for word in words] and there == [word < WORDS for word in words]


def bisect(changed: Callable[[Tensor], Tensor], n: int) -> list[int]:
    below = torch.zeros(n, dtype=torch.int64)  # the largest word before the change, bit by bit
    for bit in range(63, -1, -1):
        higher = below | patterns([1 << bit])
        below = torch.where(changed(higher), below, higher)
    at_zero = changed(torch.zeros_like(below)).tolist()
    return [0 if zero else word % WORDS + 1
            for zero, word in zip(at_zero, below.tolist(), strict=True)]  # fmt: skip


def probabilities(
    tokens: Callable[[Tensor], Tensor], n: int, V: int, expected: list[list[int]] | None = None
) -> list[list[Fraction]]:
    """Distributions of n independent draws whose token grows with the word. -> [n][V]

    expected: [n][V - 1], where the tokens 1, 2, .. should begin.
    """
    edges = [[0] * n]
    for v in range(1, V):
        begin = None if expected is None else [words[v - 1] for words in expected]
        edges.append(first_word(lambda words, v=v: tokens(words) >= v, n, begin))
    edges.append([WORDS] * n)
    return [[Fraction(edges[v + 1][i] - edges[v][i], WORDS) for v in range(V)] for i in range(n)]
