"""Philox against its published vectors, and the integer arithmetic against Python's."""

from __future__ import annotations

import math
from decimal import Decimal, getcontext
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specdiff_kernels import RowDistribution
from specdiff_kernels.reference.numerics import (
    EXP2,
    exp2,
    exp2_fraction,
    log,
    mulhi,
    philox,
    weights,
)
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


def rounded(x: Fraction, bits: int = 24) -> Fraction:
    """To a float's significand, ties to even; far from overflow and subnormal numbers."""
    if x == 0:
        return x
    exponent = math.frexp(x)[1]
    unit = Fraction(2) ** (exponent - bits)
    return round(x / unit) * unit


def some_fractions(n: int) -> torch.Tensor:
    """fp32 numbers in [-1/2, 1/2]: of all magnitudes, and neighbours of the ends."""
    generator = torch.Generator().manual_seed(0)
    even = torch.rand(n, generator=generator) - 0.5
    small = even * 2.0 ** -torch.randint(1, 40, (n,), generator=generator)
    end = torch.tensor(0.5).view(torch.int32) - torch.arange(n // 2, dtype=torch.int32)
    end = end.view(torch.float32)
    return torch.cat((even, small, end, -end, torch.zeros(1)))


def fused_chain(f: float, coefficients: list[float]) -> tuple[Fraction, int]:
    """Horner's rule by fused multiply-adds, and in how many of its steps fp64 in between would have
    made a difference."""
    x, p = Fraction(f), Fraction(coefficients[0])
    differing = 0
    for coefficient in coefficients[1:]:
        exact = p * x + Fraction(coefficient)
        differing += rounded(rounded(exact, 53)) != rounded(exact)
        p = rounded(exact)
    return p, differing


def test_fp64_ends_where_fused_multiply_adds_do():
    """A sample of what benchmarks/prove_weights.py runs through."""
    f = some_fractions(600)
    coefficients = torch.tensor(EXP2).tolist()
    want = [float(fused_chain(x, coefficients)[0]) for x in f.tolist()]
    assert exp2_fraction(f).tolist() == want


def test_fp64_can_differ_from_a_fused_multiply_add():
    """So the chain's end has to be looked at. f was found by searching."""
    assert fused_chain(float.fromhex("0x1.9d95f4p-23"), torch.tensor(EXP2).tolist())[1] > 0


def test_2_to_a_fraction_is_accurate():
    f = some_fractions(200_000)
    error = exp2_fraction(f).double() / torch.exp2(f.double()) - 1
    assert error.abs().max() < 1.72e-7
    assert exp2_fraction(torch.zeros(1)) == 1


def row_with(largest: float, temperature: float = 1.0) -> RowDistribution:
    """The distribution of a row as far as its weights need it, before anything is cut off."""
    scale = torch.tensor([math.log2(math.e)]) / temperature
    zero = torch.zeros(1, dtype=torch.int64)
    return RowDistribution(torch.tensor([largest]), scale, zero, zero, zero.int())


@pytest.mark.parametrize("largest", [0.0, 1e-3, 7.25, -300.0, 2.0**19, 1e30, 1e-39])
@pytest.mark.parametrize("temperature", [0.7, 1.0, 1e-3, 2.0**95, 2.0**-95])
def test_weights_are_as_exact_as_said(largest, temperature):
    """Against integers of any length: 1.83e-7, where the maximum is far away 2^-24 of the exponent
    more, and less than one unit."""
    distribution = row_with(largest, temperature)
    c = Fraction(distribution.scale.item())
    m = Fraction(distribution.max.item())
    far = abs(m * c) > 2**20
    N = 0 if far else 2 * math.ceil(m * c / 2 - Fraction(1, 2**31))
    steps = torch.linspace(0, 50, 301, dtype=torch.float64) / float(c)
    logits = (largest - steps).float().clamp(max=distribution.max.item())
    found = weights(logits[None], distribution)[0]
    for x, e in zip(logits.tolist(), found.tolist(), strict=True):
        t = (Fraction(x) - m) * c if far else Fraction(x) * c - N
        exact = 2.0 ** (44 + float(t)) if t > -60 else 0.0
        error = 1.83e-7 + (float(abs(t)) * math.log(2) * 2.0**-24 if far else 0)
        assert abs(e - exact) <= error * exact + 1, (x, e, exact)
    highest = weights(distribution.max[None], distribution).item()
    assert 2**42 <= highest <= 2**44


def test_logits_of_16_bits_keep_their_order():
    """Strictly monotone weights are not promised, but distinct logits of 16 bits never swap."""
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).float()
        every = every[every.isfinite()].unique()
        for temperature in (0.05, 0.3, 0.7, 1.0, 1.3, 2.0, 100.0):
            for largest in (-5.0, 3.0, 30.0, 200.0):
                row = every[every <= largest]
                e = weights(row[None], row_with(row[-1].item(), temperature))[0]
                assert (e[1:] >= e[:-1]).all()


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
