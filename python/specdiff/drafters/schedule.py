"""Schedules: the positions that each reverse step of a diffusion drafter reveals."""

from __future__ import annotations

from specdiff_kernels import Reveal

from .noise import Noise, ancestral_rate, euler_rate, times

ORDERS = (
    "analytic",
    "euler",
    "ancestral",
    "first-hitting",
    "left-to-right",
    "entropy",
    "confidence",
)


def schedule(order: str, steps: int, k: int, noise: Noise) -> list[Reveal]:
    """The reveals of T reverse steps over K positions. The last step reveals all remaining masks.

    Args:
        order: "analytic" or "euler" (SEDD's samplers), "ancestral" (MDLM's), "first-hitting" (one
            random position a step), "left-to-right" (chunks), "entropy" (positions of least
            entropy), "confidence" (positions whose sampled token is most probable).
        steps: T.
        k: K.
        noise: noise of the drafter's training; it sets the rates of the first three orders.

    Raises:
        ValueError: the order is unknown, or `steps` is below 1.

    Example:
        >>> from specdiff.drafters.noise import LogLinear
        >>> [reveal.order.name for reveal in schedule("entropy", 2, 8, LogLinear())]
        ['ENTROPY', 'ALL']
    """
    if order not in ORDERS:
        raise ValueError(f"order must be one of {', '.join(ORDERS)}, got {order!r}")
    early = times(steps)[:-1]
    if order == "analytic":
        first = [Reveal.sedd(ancestral_rate(noise, t, s)) for t, s in early]
    elif order == "euler":
        first = [Reveal.sedd(euler_rate(noise, t, s)) for t, s in early]
    elif order == "ancestral":
        first = [Reveal.mdlm(ancestral_rate(noise, t, s)) for t, s in early]
    elif order == "first-hitting":
        first = [Reveal.first_hitting() for _ in early]
    else:
        chunks = [chunk(k, steps, step) for step in range(steps - 1)]
        kind = {"entropy": Reveal.lowest_entropy, "confidence": Reveal.highest_confidence}
        if order == "left-to-right":
            first = [Reveal.chunk(lo, hi) for lo, hi in chunks]
        else:
            first = [kind[order](hi - lo) for lo, hi in chunks]
    return [*first, Reveal.all()]


def chunk(k: int, steps: int, step: int) -> tuple[int, int]:
    """Positions [lo, hi) that reverse step s of T reveals: floor(k s / T), floor(k (s + 1) / T)."""
    return k * step // steps, k * (step + 1) // steps
