"""Noise schedules of absorbing-state diffusion, and the rates at which reverse steps unmask.

At time t in [0, 1] a token is unmasked with probability alpha(t) = exp(-sigma(t)), else masked
(SEDD, arXiv 2310.16834; MDLM, arXiv 2406.07524). A reverse step t -> s reveals a masked position
with probability rate * m, where m = (1/V) sum_v exp(l_v) of the network's outputs l at that
position. MDLM normalises its outputs, so there m = 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

END = 1e-5  # time at which sampling stops, as in the public code of SEDD and MDLM


class Noise(Protocol):
    """A noise schedule: total noise sigma, its derivative, and alpha = exp(-sigma)."""

    def alpha(self, t: float) -> float: ...

    def sigma(self, t: float) -> float: ...

    def sigma_rate(self, t: float) -> float: ...


@dataclass(frozen=True)
class LogLinear:
    """alpha(t) = 1 - (1 - eps) t: the expected number of masks is linear in t.

    Args:
        eps: alpha at t = 1, in (0, 1).

    Raises:
        ValueError: `eps` is out of range.

    Example:
        >>> LogLinear().sigma(0.5)
        0.6921476...
    """

    eps: float = 1e-3

    def __post_init__(self) -> None:
        if not 0 < self.eps < 1:
            raise ValueError(f"eps must be in (0, 1), got {self.eps}")

    def alpha(self, t: float) -> float:
        return 1 - (1 - self.eps) * t

    def sigma(self, t: float) -> float:
        return -math.log1p(-(1 - self.eps) * t)

    def sigma_rate(self, t: float) -> float:
        return (1 - self.eps) / self.alpha(t)


@dataclass(frozen=True)
class Geometric:
    """sigma(t) = sigma_min^(1 - t) sigma_max^t.

    Args:
        sigma_min, sigma_max: total noise at t = 0 and t = 1, 0 < sigma_min < sigma_max.

    Raises:
        ValueError: not 0 < sigma_min < sigma_max, or not finite.
    """

    sigma_min: float = 1e-4
    sigma_max: float = 20.0

    def __post_init__(self) -> None:
        if not 0 < self.sigma_min < self.sigma_max < math.inf:
            raise ValueError(
                "sigma_min and sigma_max must be finite with 0 < sigma_min < sigma_max, "
                f"got {self.sigma_min} and {self.sigma_max}"
            )

    def alpha(self, t: float) -> float:
        return math.exp(-self.sigma(t))

    def sigma(self, t: float) -> float:
        return self.sigma_min ** (1 - t) * self.sigma_max**t

    def sigma_rate(self, t: float) -> float:
        return self.sigma(t) * math.log(self.sigma_max / self.sigma_min)


def ancestral_rate(noise: Noise, t: float, s: float) -> float:
    """(alpha(s) - alpha(t)) / (1 - alpha(t)): rate of the exact reverse step t -> s.

    rate * m is the reveal probability of SEDD's analytic sampler (Tweedie tau-leaping), which is
    the staggered score times the transposed transition. With m = 1 it is the reveal probability of
    MDLM's ancestral sampler.

    Args:
        noise: the schedule.
        t, s: start and end of the step, 0 <= s < t <= 1.

    Returns:
        the rate, in (0, 1].

    Raises:
        ValueError: not 0 <= s < t <= 1.
    """
    check_times(t, s)
    now, then = noise.sigma(t), noise.sigma(s)
    return math.exp(-then) * math.expm1(then - now) / math.expm1(-now)


def euler_rate(noise: Noise, t: float, s: float) -> float:
    """(t - s) sigma'(t) / (exp(sigma(t)) - 1): rate of SEDD's Euler step t -> s.

    Under LogLinear noise it equals `ancestral_rate`. Under other noise it can exceed 1 for large
    steps; the caller caps the probability.

    Args:
        noise: the schedule.
        t, s: start and end of the step, 0 <= s < t <= 1.

    Raises:
        ValueError: not 0 <= s < t <= 1.
    """
    check_times(t, s)
    sigma = noise.sigma(t)
    return (t - s) * noise.sigma_rate(t) * math.exp(-sigma) / -math.expm1(-sigma)


def times(steps: int) -> list[tuple[float, float]]:
    """Reverse steps (t, s): the network is evaluated at t, and s is the next t.

    The steps have equal length and go from 1 down to END = 1e-5. The last step must reveal all
    remaining masks.

    Args:
        steps: number of steps, at least 1.

    Raises:
        ValueError: `steps` is below 1.

    Example:
        >>> times(2)
        [(1.0, 0.500005), (0.500005, 1e-05)]
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    starts = [1 - i * (1 - END) / steps for i in range(steps)]
    return list(pairwise([*starts, END]))


def check_times(t: float, s: float) -> None:
    if not 0 <= s < t <= 1:
        raise ValueError(f"t and s: expected 0 <= s < t <= 1, got t={t}, s={s}")
