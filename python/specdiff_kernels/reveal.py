"""Reveal: which masked positions a reverse step reveals."""

from __future__ import annotations

from enum import IntEnum
from numbers import Integral, Real
from typing import Annotated, NamedTuple

from torch import Tensor

from .fields import F64, NOT_NEGATIVE, SIZE, Scalar, describe


class Order(IntEnum):
    """How a reverse step chooses the positions that it reveals; see `Reveal`."""

    ALL = 0
    CHUNK = 1
    MDLM = 2
    SEDD = 3
    FIRST_HITTING = 4
    ENTROPY = 5
    CONFIDENCE = 6


class Reveal(NamedTuple):
    """Which masked positions a reverse step reveals. Made by one of the methods below."""

    order: Annotated[Order, Scalar(Order, "int")]
    lo: Annotated[int, SIZE] = 0
    hi: Annotated[int, SIZE] = 0
    number: Annotated[int, SIZE] = 0
    rate: Annotated[float | Tensor, F64("N", NOT_NEGATIVE)] = 0.0

    @classmethod
    def all(cls) -> Reveal:
        """Everything that is still masked: the final denoising step, or the only one."""
        return cls(Order.ALL)

    @classmethod
    def chunk(cls, lo: int, hi: int) -> Reveal:
        """Positions lo <= i < hi. Raises ValueError unless they are integers, 0 <= lo <= hi."""
        if not (isinstance(lo, Integral) and isinstance(hi, Integral) and 0 <= lo <= hi):
            raise ValueError(f"chunk: expected integers 0 <= lo <= hi, got lo = {lo}, hi = {hi}")
        return cls(Order.CHUNK, lo=lo, hi=hi)

    @classmethod
    def mdlm(cls, rate: float | Tensor) -> Reveal:
        """Each position by itself with probability `rate`: the reverse posterior of MDLM
        (2406.07524, section 3).

        Args:
            rate: (alpha_s - alpha_t) / (1 - alpha_t), a number in [0, 1] or f64 [B].
        """
        if not isinstance(rate, Tensor) and isinstance(rate, Real) and rate > 1:
            raise ValueError(f"rate: expected a probability, in [0, 1], got {rate!r}")
        return cls(Order.MDLM, rate=checked_rate(rate))

    @classmethod
    def sedd(cls, rate: float | Tensor) -> Reveal:
        """Each position by itself with probability min(1, rate m), m = (1/V) sum_v exp(l_v).

        SEDD's analytic (Tweedie) and Euler steps (2310.16834, section 4.1) differ in the rate
        alone; `specdiff.drafters.noise` has both.

        Args:
            rate: a number or f64 [B].
        """
        return cls(Order.SEDD, rate=checked_rate(rate))

    @classmethod
    def first_hitting(cls) -> Reveal:
        """One position, uniformly at random (first-hitting sampler, 2409.02908)."""
        return cls(Order.FIRST_HITTING)

    @classmethod
    def lowest_entropy(cls, number: int) -> Reveal:
        """The `number` positions whose distribution has the least entropy; ties: the leftmost."""
        return cls(Order.ENTROPY, number=checked_number(number))

    @classmethod
    def highest_confidence(cls, number: int) -> Reveal:
        """The `number` positions whose *sampled* token is likeliest; ties: the leftmost.

        Makes the draft `value_dependent`.
        """
        return cls(Order.CONFIDENCE, number=checked_number(number))


def checked_rate(rate: float | Tensor) -> float | Tensor:
    if not isinstance(rate, Tensor) and not (isinstance(rate, Real) and rate >= 0):
        raise ValueError(f"rate: expected a number >= 0 or a tensor [B] float64, got {rate!r}")
    return rate


def checked_number(number: int) -> int:
    if not isinstance(number, Integral) or number < 0:
        raise ValueError(f"number: expected how many positions, an integer >= 0, got {number!r}")
    return number


describe(
    Reveal,
    order="an Order",
    lo="int, first position of a chunk",
    hi="int, position after the last of a chunk",
    number="int, positions to reveal, under the orders that count them",
    rate="a number or f64 [B], under the orders that draw positions",
)
