"""Philox against its published vectors, and the integer arithmetic against Python's."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext

import torch
from hypothesis import given
from hypothesis import strategies as st

from specdiff_kernels.reference.numerics import exp2, exp2_weight, log, mulhi, philox
from specdiff_kernels.reference.row_distribution import ceil_share

WORDS = st.integers(0, 2**64 - 1)


def signed(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word


def test_philox_known_answers():
    """kat_vectors of Random123, philox4x32 with 10 rounds."""
    ones = 0xFFFFFFFF
    pi = (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344)
    pi_key = 0x299F31D0 << 32 | 0xA4093822
    for key, counter, expected in [
        (0, (0, 0, 0, 0), "6627e8d5 e169c58d bc57ac4c 9b00dbd8"),
        (2**64 - 1, (ones, ones, ones, ones), "408f276d 41c83b0e a20bc7c6 6d5451fd"),
        (pi_key, pi, "d16cfe09 94fdcceb 5001e420 24126ea1"),
    ]:
        words = philox(torch.tensor([signed(key)]), counter)
        assert " ".join(f"{int(word):08x}" for word in words) == expected


@given(WORDS, st.integers(0, 2**63 - 1))
def test_mulhi(word, total):
    assert int(mulhi(torch.tensor([signed(word)]), torch.tensor([total]))) == word * total >> 64


@given(st.floats(2.0**-30, 1, width=32), st.integers(1, 2**63 - 1))
def test_ceil_share(share, total):
    """top_p is read as a multiple of 2^-31; the product is then exact."""
    expected = max(1, -(-int(share * 2**31) * total // 2**31))
    result = ceil_share(torch.tensor([share], dtype=torch.float32), torch.tensor([total]))
    assert int(result) == expected


def test_exp2_weight_bounds():
    """Relative error of the polynomial and of rounding f = t - floor(t), plus one unit."""
    t = torch.linspace(-70, 0, 2_000_003, dtype=torch.float32)
    e = exp2_weight(t)
    exact = torch.exp2(t.double() + 44)
    bound = 1.7e-7 + math.log(2) * 2.0**-25
    assert ((e.double() - exact).abs() <= bound * exact + 1).all()
    assert (e[1:] >= e[:-1]).all()
    assert int(exp2_weight(torch.zeros(1))) == 1 << 44
    assert (e[t < -45] == 0).all()


def relative_errors(have: torch.Tensor, exact: list[Decimal]) -> list[float]:
    return [float(abs(Decimal(x) - e) / abs(e)) for x, e in zip(have.tolist(), exact, strict=True)]


def test_log_and_exp2_are_accurate():
    """Against 40 decimal digits, most closely where the logarithm is near 0."""
    getcontext().prec = 40
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(2000, generator=generator, dtype=torch.float64)
    near_one = 1 - x[:500] * 2.0 ** -torch.arange(500).remainder(53).double()
    powers = x.clone()[:500] * 2.0 ** torch.arange(-250, 250).double()
    x = torch.cat((x, near_one[near_one < 1], powers))
    assert max(relative_errors(log(x), [Decimal(v).ln() for v in x.tolist()])) < 1e-15
    assert log(torch.ones(1, dtype=torch.float64)).item() == 0
    t = torch.linspace(-1000, 1000, 3001, dtype=torch.float64)
    exact = [(Decimal(v) * Decimal(2).ln()).exp() for v in t.tolist()]
    assert max(relative_errors(exp2(t), exact)) < 1e-12
    assert torch.equal(
        exp2(torch.tensor([-3.0, 0.0, 5.0]).double()), torch.tensor([0.125, 1, 32]).double()
    )
