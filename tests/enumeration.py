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


def first_word(changed: Callable[[Tensor], Tensor], n: int) -> list[int]:
    """For each of n independent draws the smallest word at which `changed` holds, or 2^64.

    changed: int64 patterns [n] -> bool [n], False below some word and True from there on.

    Interpreted ops are slow: there the reference finds the words, and the op in question has to
    change at each of them.
    """
    if not is_slow():
        return bisect(changed, n)
    with use_backend("reference"):
        words = bisect(changed, n)
    before = changed(patterns([max(word - 1, 0) for word in words])).tolist()
    there = changed(patterns([min(word, WORDS - 1) for word in words])).tolist()
    assert before == [word == 0 for word in words]
    assert there == [word < WORDS for word in words]
    return words


def bisect(changed: Callable[[Tensor], Tensor], n: int) -> list[int]:
    below = torch.zeros(n, dtype=torch.int64)  # the largest word before the change, bit by bit
    for bit in range(63, -1, -1):
        higher = below | patterns([1 << bit])
        below = torch.where(changed(higher), below, higher)
    at_zero = changed(torch.zeros_like(below)).tolist()
    return [0 if zero else word % WORDS + 1
            for zero, word in zip(at_zero, below.tolist(), strict=True)]  # fmt: skip


def probabilities(tokens: Callable[[Tensor], Tensor], n: int, V: int) -> list[list[Fraction]]:
    """Distributions of n independent draws whose token grows with the word. -> [n][V]"""
    edges = [[0] * n]
    for v in range(1, V):
        edges.append(first_word(lambda words, v=v: tokens(words) >= v, n))
    edges.append([WORDS] * n)
    return [[Fraction(edges[v + 1][i] - edges[v][i], WORDS) for v in range(V)] for i in range(n)]
