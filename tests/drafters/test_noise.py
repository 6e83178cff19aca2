"""Noise schedules against their definitions, in 50 digits where floats are short of them."""

from __future__ import annotations

import math
from decimal import Context, Decimal, localcontext
from itertools import pairwise

import pytest

from specdiff.drafters.noise import Geometric, LogLinear, ancestral_rate, euler_rate, times

SCHEDULES = [LogLinear(), LogLinear(0.2), Geometric(), Geometric(1e-3, 1.0), Geometric(1e-9, 900)]
PAIRS = [(1.0, 0.0), (1.0, 0.75), (0.5, 0.49), (0.2, 1e-5), (1e-3, 1e-5), (2e-5, 1e-5)]


def precise(noise, t: float) -> Decimal:
    """sigma(t) in the current decimal context."""
    time = Decimal(t)
    if isinstance(noise, LogLinear):
        return -(1 - (1 - Decimal(noise.eps)) * time).ln()
    low, high = Decimal(noise.sigma_min).ln(), Decimal(noise.sigma_max).ln()
    return ((1 - time) * low + time * high).exp()


@pytest.mark.parametrize("noise", SCHEDULES, ids=repr)
@pytest.mark.parametrize("t", [1e-5, 0.01, 0.3, 0.77, 1.0])
def test_sigma_alpha_and_rate_agree(noise, t):
    assert noise.sigma(t) == pytest.approx(float(precise(noise, t)), rel=1e-12)
    assert noise.alpha(t) == pytest.approx(math.exp(-noise.sigma(t)), rel=1e-12)
    with localcontext(Context(prec=50)):
        h = 1e-12
        slope = (precise(noise, t) - precise(noise, t - h)) / (Decimal(t) - Decimal(t - h))
    assert noise.sigma_rate(t) == pytest.approx(float(slope), rel=1e-8)


def test_defaults_are_those_of_the_public_code():
    assert LogLinear().alpha(1.0) == pytest.approx(1e-3)
    assert (Geometric().sigma(0.0), Geometric().sigma(1.0)) == pytest.approx((1e-4, 20.0))


@pytest.mark.parametrize("noise", SCHEDULES, ids=repr)
@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_rates_are_exact(noise, t, s):
    with localcontext(Context(prec=50)):
        now, then = (-precise(noise, t)).exp(), (-precise(noise, s)).exp()
        ancestral = (then - now) / (1 - now)
        euler = (Decimal(t) - Decimal(s)) * now / (1 - now)
    assert ancestral_rate(noise, t, s) == pytest.approx(float(ancestral), rel=1e-9)
    assert euler_rate(noise, t, s) == pytest.approx(float(euler) * noise.sigma_rate(t), rel=1e-9)
    assert 0 <= ancestral_rate(noise, t, s) <= 1


@pytest.mark.parametrize("noise", SCHEDULES[:2], ids=repr)
@pytest.mark.parametrize(("t", "s"), PAIRS)
def test_under_log_linear_noise_euler_is_exact(noise, t, s):
    assert euler_rate(noise, t, s) == pytest.approx(ancestral_rate(noise, t, s), rel=1e-9)
    assert euler_rate(noise, t, s) == pytest.approx((t - s) / t, rel=1e-9)


def test_an_euler_step_can_promise_more_than_a_probability():
    assert euler_rate(Geometric(), 0.5, 0.0) > 1


@pytest.mark.parametrize("noise", SCHEDULES, ids=repr)
@pytest.mark.parametrize("steps", [1, 3, 16])
def test_steps_compose_to_the_marginal(noise, steps):
    """Staying masked through all steps has the probability that the definition gives at once."""
    stays = 1.0
    for t, s in times(steps):
        stays *= 1 - ancestral_rate(noise, t, s)
        marginal = math.expm1(-noise.sigma(s)) / math.expm1(-noise.sigma(1.0))
        assert stays == pytest.approx(marginal, rel=1e-9, abs=1e-14)


@pytest.mark.parametrize("steps", [1, 2, 7, 1024])
def test_times(steps):
    pairs = times(steps)
    assert len(pairs) == steps
    assert pairs[0][0] == 1.0 and pairs[-1][1] == 1e-5
    assert all(s == t for (_, s), (t, _) in pairwise(pairs))
    assert [t - s for t, s in pairs] == pytest.approx([(1 - 1e-5) / steps] * steps)


@pytest.mark.parametrize("eps", [0.0, 1.0, -0.1, math.nan])
def test_bad_eps(eps):
    with pytest.raises(ValueError, match=r"eps must be in \(0, 1\), got"):
        LogLinear(eps)


@pytest.mark.parametrize("sigmas", [(0.0, 1.0), (2.0, 1.0), (1.0, 1.0), (1.0, math.inf)])
def test_bad_sigmas(sigmas):
    with pytest.raises(ValueError, match=r"0 < sigma_min < sigma_max, got"):
        Geometric(*sigmas)


@pytest.mark.parametrize("rate", [ancestral_rate, euler_rate])
@pytest.mark.parametrize(("t", "s"), [(0.5, 0.5), (0.2, 0.3), (1.1, 0.5), (0.5, -0.1)])
def test_bad_times(rate, t, s):
    with pytest.raises(ValueError, match=rf"0 <= s < t <= 1, got t={t}, s={s}"):
        rate(LogLinear(), t, s)


def test_bad_steps():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        times(0)
