"""A number that changes with a weight, from 64 of its values."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

PLACES = 16
RUN = 4  # values side by side, for one line of cache
# Place i lies at these multiples of i, modulo 2^32, as fractions of the rows and of the columns.
# They were searched for: a block of neighbouring rows and columns that is an eighth of a weight
# holds a place, and so does each second, third or fourth row of the usual sizes.
ROWS, COLUMNS = 0x69E22929, 0xF13AF3DF
WORD, PLACE = 0x9E3779B97F4A7C15, 0xD1342543DE82EF95


def fingerprint(weight: Tensor) -> int:
    """Of where an f32 [N, K] lies, of its shape and strides, and of the bits in 16 runs of it.

    A run is 4 values that are neighbours in memory. Where a change takes each row with probability
    p, it is missed with (1 - p)^16: 2^-16 for half of them. With each column it is (1 - p)^64. A
    product of two vectors, half of each zero, leaves a run out with 1/2 + 1/2 2^-4, all of them
    with 4e-5. (Of a transposed weight these are columns and rows.) Other bits give the same number
    with probability 2^-64.
    """
    total = fold((weight.data_ptr(), *weight.shape, *weight.stride()))
    if weight.numel() == 0:
        return total
    bits = weight.detach().view(torch.int32)
    if bits.stride(0) < bits.stride(1):
        bits = bits.t()
    for row, columns in runs(*bits.shape):
        total = (total * PLACE + fold(bits[row, columns].tolist())) % 2**64
    return total


def watch(weights: Sequence[Tensor]) -> Callable[[], int]:
    """A function that gives one number for all of them, for as long as they lie where they are."""
    return lambda: fold(fingerprint(weight) for weight in weights)


def runs(N: int, K: int) -> Iterator[tuple[int, slice]]:
    length = min(RUN, K)
    for i in range(1, PLACES + 1):
        row = N * (i * ROWS % 2**32) >> 32
        column = (K - length + 1) * (i * COLUMNS % 2**32) >> 32
        first = column - column % RUN
        yield row, slice(first, first + length)


def fold(words: Iterable[int]) -> int:
    return reduce(lambda total, word: (total * WORD + word) % 2**64, words, 0)
