"""The exact sampling distribution in plain PyTorch: weights, random words, integer draws.

This is the specification. Every float operation below is one IEEE operation of its own, or a fused
multiply-add written as one in fp64; every sum is a sum of integers. So any backend can reproduce it
bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ..types import Purpose, RowDistribution

LOG2_E = 1.4426950408889634
LN_2 = 0.6931471805599453
SQRT_HALF = 0x3FE6A09E667F3BCD  # the bits of sqrt(1/2)
ARTANH_TERMS = (17, 15, 13, 11, 9, 7, 5, 3, 1)  # artanh s = s + s^3/3 + s^5/5 + ...
EXP_DEGREE = 13  # of the exponential's Taylor polynomial on [0, ln 2)
ONE = 1 << 44  # the weight of a greedy row's token, and the most that any token has
NOTHING = -100  # an exponent whose weight is 0
MASK32 = 0xFFFFFFFF
# 2^f on [-1/2, 1/2], relative error at most 1.72e-7, value 1 at 0; highest power first, in f32
EXP2: tuple[float, ...] = tuple(
    torch.tensor(
        [
            0.001326472731307149,
            0.009671512991189957,
            0.05550733581185341,
            0.24022242426872253,
            0.6931470036506653,
            1.0,
        ],
        dtype=torch.float32,
    ).tolist()
)


def exponents(logits: Tensor, distribution: RowDistribution) -> tuple[Tensor, Tensor]:
    """log2 of weights over 2^44 in two parts: an integer and the rest, in [-1/2, 1/2].

    [N, V] logits -> n i64, f f32 [N, V]. n is NOTHING and f is 0 where no weight is left. Logits
    above the distribution's own maximum count as that.
    """
    offset, shift = (part[:, None] for part in distribution.origin())
    x = torch.minimum(logits.float(), distribution.max[:, None])
    t = (x - offset).double() * distribution.scale.double()[:, None]  # exact
    k = t.round()  # to even
    inside = k - shift >= -46  # false for NaN too
    n = torch.where(inside, k - shift, NOTHING).long()
    return n, torch.where(inside, t - k, 0.0).float()  # t - k: a multiply-add, rounded once


def exp2_fraction(f: Tensor) -> Tensor:
    """2^f for f in [-1/2, 1/2], by Horner's rule with fused multiply-adds. f32 -> f32

    A product of two f32 is exact in fp64. The sum there, rounded once more to f32, may differ from
    a fused multiply-add in a step, but for no f in the last one (docs/numerics.md).
    """
    p = torch.full_like(f, EXP2[0])
    for coefficient in EXP2[1:]:
        p = (p.double() * f.double() + coefficient).float()
    return p


def weights(logits: Tensor, distribution: RowDistribution) -> Tensor:
    """Integer weights of every token. [N, V] logits -> i64 [N, V]; a row without distribution gets
    0."""
    columns = torch.arange(logits.shape[-1], device=logits.device)
    greedy = (columns == distribution.threshold[:, None]).long() * ONE
    n, f = exponents(logits, distribution)
    e = (exp2_fraction(f).double() * power(n + 44)).to(torch.int64)
    e = torch.where(e < distribution.threshold[:, None], torch.zeros_like(e), e)
    e = torch.where(distribution.scale[:, None] == 0, greedy, e)
    return torch.where(distribution.status[:, None] == 0, e, torch.zeros_like(e))


def power(n: Tensor) -> Tensor:
    """2^n. i64 -> f64"""
    return ((n + 1023) << 52).view(torch.float64)


def probability(weight: Tensor, total: Tensor) -> Tensor:
    """fl64(e * fl64(1 / Z))."""
    return weight.double() * (1.0 / total.double())


def shift32(x: Tensor) -> Tensor:
    """High half of the 64-bit patterns in x, as an unsigned number."""
    return (x >> 32) & MASK32


def mulhi(word: Tensor, total: Tensor) -> Tensor:
    """High 64 bits of the 128-bit product of unsigned `word` and total < 2^63."""
    u1, u0 = shift32(word), word & MASK32
    z1, z0 = shift32(total), total & MASK32
    carry = shift32(u0 * z0)
    w = u1 * z0 + carry  # wraps modulo 2^64, read back as unsigned halves
    x = u0 * z1 + (w & MASK32)
    return u1 * z1 + shift32(w) + shift32(x)


def unit(word: Tensor) -> Tensor:
    """u = (word >> 11) * 2^-53, f64 in [0, 1)."""
    return ((word >> 11) & ((1 << 53) - 1)).double() * 2.0**-53


def draw(e: Tensor, word: Tensor) -> Tensor:
    """The first v with e[0] + ... + e[v] > mulhi(word, sum e). [N, V], [N] -> i64 [N]."""
    cumulative = e.cumsum(-1)
    r = mulhi(word, cumulative[:, -1])
    return (cumulative <= r[:, None]).sum(-1)


def philox(key: Tensor, counter: Sequence[Tensor | int]) -> tuple[Tensor, ...]:
    """Philox4x32-10 (Salmon et al., SC 2011). key i64 [N], counter of four -> four i64 [N] < 2^32.

    Example:
        >>> [f"{int(x):08x}" for x in philox(torch.zeros(1, dtype=torch.int64), (0, 0, 0, 0))]
        ['6627e8d5', 'e169c58d', 'bc57ac4c', '9b00dbd8']
    """
    k0, k1 = key & MASK32, shift32(key)
    c0, c1, c2, c3 = (
        torch.as_tensor(c, device=key.device) + torch.zeros_like(key) for c in counter
    )
    c0, c1, c2, c3 = (c & MASK32 for c in (c0, c1, c2, c3))
    for _ in range(10):
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            shift32(high) ^ c1 ^ k0,
            high & MASK32,
            shift32(low) ^ c3 ^ k1,
            low & MASK32,
        )
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


def random_word(
    seed: Tensor | None,
    slot: Tensor | int | None,
    round: Tensor | None,
    purpose: Tensor | int,
    step: Tensor | int = 0,
) -> Tensor:
    """The 64-bit word of (seed, slot, round, purpose, step), an int64 pattern. -> i64 [N]"""
    if seed is None or slot is None or round is None:
        raise ValueError("seed, slot, round: expected tensors, got None; or pass words")
    low, high, _, _ = philox(seed, (slot, round, purpose, step))
    return low | (high << 32)


def log(x: Tensor) -> Tensor:
    """Natural logarithm of positive normal numbers, f64, relative error at most 1e-15.

    x = 2^k z with z in [sqrt(1/2), sqrt(2)); ln z = 2 artanh(s), s = (z - 1) / (z + 1).
    """
    bits = x.contiguous().view(torch.int64)
    k = (bits - SQRT_HALF) >> 52
    z = (bits - (k << 52)).view(torch.float64)
    s = (z - 1.0) / (z + 1.0)
    w = s * s
    p = torch.full_like(w, 1.0 / ARTANH_TERMS[0])
    for n in ARTANH_TERMS[1:]:
        p = p * w
        p = p + 1.0 / n
    p = p * (s + s)
    return k.double() * LN_2 + p


def exp2(t: Tensor) -> Tensor:
    """2^t in f64 for t cut to [-1000, 1000], relative error at most 1e-12."""
    t = t.clamp(-1000.0, 1000.0)
    n = t.floor()
    y = (t - n) * LN_2
    p = torch.full_like(y, 1.0 / math.factorial(EXP_DEGREE))
    for k in range(EXP_DEGREE - 1, -1, -1):
        p = p * y
        p = p + 1.0 / math.factorial(k)
    return p * power(n.long())


def mean_exp(distribution: RowDistribution, V: int) -> Tensor:
    """m = (1/V) sum_v exp(l_v) from the untruncated distribution at temperature 1. -> f64 [N]"""
    offset, shift = distribution.origin()
    total = distribution.total.double()
    share = total * 2.0**-44 / torch.full_like(total, V)  # CUDA multiplies by 1 / a Python number
    highest = distribution.max.double()
    above = (distribution.max - offset).double() * distribution.scale.double() - shift
    return exp2(highest * LOG2_E - above) * share


def entropy(logits: Tensor, distribution: RowDistribution) -> Tensor:
    """Entropy in nats of untruncated distributions at temperature 1, to about 1e-3. [N, V] -> f64
    [N]

    ln(Z / e(m)) + ln 2 sum_v e(v) (-t(v)) / Z, where t counts from the largest logit m. The sum is
    over integers: e in units of 2^16, t of 2^-10.
    """
    highest = distribution.max[:, None]
    t = (logits.float() - highest) * distribution.scale[:, None]
    spread = (-t.nan_to_num(neginf=-46.0).clamp(min=-46.0) * 1024.0).to(torch.int64)
    S = ((weights(logits, distribution) >> 16) * spread).sum(-1)
    Z = distribution.total.double()
    share = Z / weights(highest, distribution)[:, 0].double()
    return log(share) + S.double() / Z * (64.0 * LN_2)


def exponential(word: Tensor) -> Tensor:
    """E = -ln u, u = ((word >> 11) + 1) 2^-53 in (0, 1], f64."""
    u = (((word >> 11) & ((1 << 53) - 1)) + 1).double() * 2.0**-53
    return 0.0 - log(u)


def race(e: Tensor, words: Tensor) -> Tensor:
    """argmin_v E_v / e_v over e_v > 0: token v wins with probability e_v / sum e. -> i64 [N]

    The Gumbel race: -ln(E_v / e_v) = ln e_v + Gumbel noise. e, words: i64 [N, V].
    """
    times = exponential(words) / e.double()
    return torch.where(e > 0, times, float("inf")).argmin(-1)


def race_words(seed: Tensor | None, position: Tensor | None, ids: Tensor) -> Tensor:
    """The words of token ids at sequences' absolute positions. [N], [N], [V] -> i64 [N, V]"""
    if seed is None or position is None:
        raise ValueError("seed, position: expected tensors, got None; or pass words")
    key = seed[:, None].expand(len(seed), len(ids))
    c0, c1, c2, c3 = philox(key, (ids >> 1, position[:, None], Purpose.COUPLED, 0))
    return torch.where(ids & 1 == 0, c0 | (c1 << 32), c2 | (c3 << 32))
