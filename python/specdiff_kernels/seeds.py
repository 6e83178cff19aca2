"""Seeds: one number for a batch, from which each row gets its own."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from numbers import Integral

import torch
from torch import Tensor

SEED_STRIDE = 0x9E3779B97F4A7C15  # odd, so all rows of a batch get different keys
WORD = 1 << 64


def row_seeds(seed: int | Sequence[int], batch: int) -> list[int]:
    """One 64-bit seed per sequence, as the int64 with the same bits.

    An int gives row b the seed `seed + b * SEED_STRIDE` modulo 2^64: row 0 keeps the seed itself,
    and no two rows share one. A sequence of ints is used as it is. The ops do the same with a seed
    that is an int.

    Raises:
        ValueError: as many seeds as rows are needed.
        TypeError: a seed that is no integer.

    Example:
        >>> row_seeds(7, 2)
        [7, -7046029254386353124]
    """
    try:
        if isinstance(seed, Integral):
            seeds = [int(seed) + b * SEED_STRIDE for b in range(batch)]
        else:
            seeds = [operator.index(s) for s in seed]  # type: ignore[union-attr]
    except TypeError:
        raise TypeError(
            f"seed: expected an integer, or one for each of {batch} sequences, got {seed!r}"
        ) from None
    if len(seeds) != batch:
        raise ValueError(
            f"seed: expected an integer, or one for each of {batch} sequences, got {len(seeds)}"
        )
    return [signed(s) for s in seeds]


def seeds_for(seed: int, rows: int, device: torch.device) -> Tensor:
    """`row_seeds` of an int, made on the device. -> i64 [rows]"""
    if not -WORD // 2 <= seed < WORD // 2:  # a compiler's symbol stays as it is
        seed = signed(seed)
    return torch.arange(rows, device=device) * signed(SEED_STRIDE) + seed


def signed(word: int) -> int:
    return (word + WORD // 2) % WORD - WORD // 2
