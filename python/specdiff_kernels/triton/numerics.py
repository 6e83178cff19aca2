"""The exact sampling distribution on a GPU: weights, random words, accept rule, logarithm.

Every float operation is one IEEE operation, fused where `tl.fma` says so: kernels are launched with
`enable_fp_fusion=False`, divide fp32 by `tl.div_rn`, and call no other function of a maths library
than `floor`.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import triton
import triton.language as tl

from ..lenience import KINDS
from ..reference.numerics import ARTANH_TERMS, EXP2, EXP_DEGREE, SQRT_HALF
from ..types import Purpose

ONE = tl.constexpr(1 << 44)  # the weight of a greedy row's token, and the most that any token has
INTEGERS = tl.constexpr(1.5 * 2**23)  # from half of it on floats are integers
POWER = tl.constexpr(EXP2)  # 2^f on [-1/2, 1/2], highest power first
LOG2_E = tl.constexpr(1.4426950408889634)
LN_2 = tl.constexpr(0.6931471805599453)
SQRT_HALF_BITS = tl.constexpr(SQRT_HALF)
ARTANH = tl.constexpr(tuple(1.0 / n for n in ARTANH_TERMS))
LAST_OF_ARTANH = tl.constexpr(len(ARTANH_TERMS) - 1)
EXPONENTIAL = tl.constexpr(tuple(1.0 / math.factorial(n) for n in range(EXP_DEGREE, -1, -1)))
LAST_OF_EXPONENTIAL = tl.constexpr(EXP_DEGREE)
COUPLED = tl.constexpr(int(Purpose.COUPLED))
LENIENCE = tl.constexpr(list(KINDS).index("lenience"))
ADDITIVE = tl.constexpr(list(KINDS).index("additive"))


class Weigher(NamedTuple):
    """The terms by which the logits of a row are weighed, unless it is greedy: the weight is
    floor(2^(44 + (l - offset) scale - shift)), up to rounding."""

    scale: Any
    offset: Any
    shift: Any
    least: Any  # a logit less the offset is cut to the range from here, where a weight is 0,
    most: Any  # to here
    threshold: Any


@triton.jit
def weigher_of(distribution):
    highest = distribution.max.to(tl.float64) * distribution.scale.to(tl.float64)
    near = (highest >= -1048576.0) & (highest <= 1048576.0)  # 2^20
    half = tl.where(near, highest * 0.5, 0.0)
    up = -tl.floor(4.656612873077393e-10 - half)  # ceil(half - 2^-31)
    shift = (up * 2.0).to(tl.float32)
    offset = tl.where(near, 0.0, distribution.max)
    scale, most = distribution.scale, distribution.max - offset
    # 1 / the largest power of two that is at most the scale
    coarse = (0x7F000000 - (scale.to(tl.int32, bitcast=True) & 0x7F800000)).to(
        tl.float32, bitcast=True
    )
    return Weigher(scale, offset, shift, most - 64.0 * coarse, most, distribution.threshold)


@triton.jit
def moved(l, by):
    """Logits less the offset, which hardly any row has."""
    if by.offset != 0.0:
        l = l - by.offset
    return l


@triton.jit
def own_weight(l, by):
    """Integer weight of a logit of the weigher's own row, before the threshold. -> i64"""
    return power(tl.maximum(moved(l, by), by.least), by).to(tl.int64)  # NaN counts as the lowest


@triton.jit
def power(x, by):
    """2^(44 + exponent) of a cut logit, not yet an integer. -> f32"""
    magic = INTEGERS + 44.0 - by.shift
    z = tl.fma(x, by.scale, magic)  # an integer
    f = tl.fma(x, by.scale, magic - z)
    p = tl.fma(f, POWER[0], POWER[1])
    p = tl.fma(p, f, POWER[2])
    p = tl.fma(p, f, POWER[3])
    p = tl.fma(p, f, POWER[4])
    p = tl.fma(p, f, POWER[5])
    bits = p.to(tl.int32, bitcast=True) + (z.to(tl.int32, bitcast=True) << 23)
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def sampled_weight(l, by):
    """Integer weight of a logit under a distribution that is not greedy. -> i64"""
    x = tl.minimum(tl.maximum(moved(l, by), by.least), by.most)
    e = power(x, by).to(tl.int64)
    return tl.where(e < by.threshold, 0, e)


@triton.jit
def weight(l, column, distribution):
    """Integer weight of a column with logit l under a distribution without fault. -> i64"""
    e = sampled_weight(l, weigher_of(distribution))
    return tl.where(distribution.scale == 0, tl.where(column == distribution.threshold, ONE, 0), e)


@triton.jit
def inverse(total):
    return 1.0 / total.to(tl.float64)


@triton.jit
def probability(e, inverse_total):
    return e.to(tl.float64) * inverse_total


@triton.jit
def unit(word):
    """u = (word >> 11) 2^-53, f64 in [0, 1)."""
    return ((word >> 11) & 0x1FFFFFFFFFFFFF).to(tl.float64) * 1.1102230246251565e-16


@triton.jit
def excess(p, q):
    """int(max(p - q, 0) 2^60). f64 -> i64"""
    return (tl.maximum(p - q, 0.0) * 1152921504606846976.0).to(tl.int64)


@triton.jit
def valid_amount(amount, KIND: tl.constexpr):
    """Whether a lenience of this kind may be so large."""
    if KIND == LENIENCE:
        return (amount > 0.0) & (amount <= 1.0)
    elif KIND == ADDITIVE:
        return amount >= 0.0
    else:
        return (amount >= 0.0) & (amount <= 1.0)


@triton.jit
def raised(p, q, amount, KIND: tl.constexpr):
    """p' >= p, by which the lenient rule accepts; 0 where p is. f64"""
    if KIND == LENIENCE:
        more = p / amount
    elif KIND == ADDITIVE:
        more = p + amount
    else:
        more = tl.maximum(p, (1.0 - amount) * q + amount * p)
    return tl.where(p > 0.0, more, 0.0)


@triton.jit
def bias_weight(p, q, amount, KIND: tl.constexpr):
    """int(max(min(q, p') - p, 0) 2^60): what a token adds to its position's bias. -> i64"""
    return excess(tl.minimum(q, raised(p, q, amount, KIND)), p)


@triton.jit
def mulhi(word, total):
    """High 64 bits of the 128-bit product of unsigned `word` and total < 2^63."""
    high = tl.umulhi(word.to(tl.uint64, bitcast=True), total.to(tl.uint64, bitcast=True))
    return high.to(tl.int64, bitcast=True)


@triton.jit
def join_halves(low, high):
    """Two u32 as the int64 pattern of one word."""
    return (low.to(tl.uint64) | (high.to(tl.uint64) << 32)).to(tl.int64, bitcast=True)


@triton.jit
def random_word(seed, slot, round, purpose, step):
    """The word of (seed, slot, round, purpose, step). -> i64"""
    slot, round = tl.cast(slot, tl.uint32), tl.cast(round, tl.uint32)
    purpose, step = tl.cast(purpose, tl.uint32), tl.cast(step, tl.uint32)
    low, high, _, _ = tl.philox(seed, slot, round, purpose, step)
    return join_halves(low, high)


@triton.jit
def race_words(seed, position, ids):
    """The words of token ids i64 [n] at a sequence's absolute position. -> i64 [n]"""
    zero = ids.to(tl.uint32) * 0
    c0, c1, c2, c3 = tl.philox(
        seed, (ids >> 1).to(tl.uint32), position.to(tl.uint32) + zero, zero + COUPLED, zero
    )
    return tl.where((ids & 1) == 0, join_halves(c0, c1), join_halves(c2, c3))


@triton.jit
def log(x):
    """Natural logarithm of positive normal numbers, f64; as the reference computes it."""
    bits = x.to(tl.int64, bitcast=True)
    k = (bits - SQRT_HALF_BITS) >> 52
    z = (bits - (k << 52)).to(tl.float64, bitcast=True)
    s = (z - 1.0) / (z + 1.0)
    w = s * s
    p = w * ARTANH[0]
    for i in tl.static_range(1, LAST_OF_ARTANH):
        p = (p + ARTANH[i]) * w
    p = (p + ARTANH[LAST_OF_ARTANH]) * (s + s)
    return k.to(tl.float64) * LN_2 + p


@triton.jit
def exp2(t):
    """2^t in f64 for t cut to [-1000, 1000]; as the reference computes it."""
    t = tl.minimum(tl.maximum(t, -1000.0), 1000.0)
    n = tl.floor(t)
    y = (t - n) * LN_2
    p = y * EXPONENTIAL[0]
    for i in tl.static_range(1, LAST_OF_EXPONENTIAL):
        p = (p + EXPONENTIAL[i]) * y
    p = p + EXPONENTIAL[LAST_OF_EXPONENTIAL]
    return p * ((n.to(tl.int64) + 1023) << 52).to(tl.float64, bitcast=True)


@triton.jit
def exponential(word):
    """E = -ln u, u = ((word >> 11) + 1) 2^-53 in (0, 1], f64."""
    u = (((word >> 11) & 0x1FFFFFFFFFFFFF) + 1).to(tl.float64) * 1.1102230246251565e-16
    return 0.0 - log(u)


@triton.jit
def mean_exp(distribution, V):
    """m = (1/V) sum_v exp(l_v) from the untruncated distribution at temperature 1. -> f64"""
    share = distribution.total.to(tl.float64) * 5.684341886080802e-14  # 2^-44
    share = share / tl.full([], V, tl.float64)
    by = weigher_of(distribution)
    above = by.most.to(tl.float64) * by.scale.to(tl.float64) - by.shift.to(tl.float64)
    return exp2(distribution.max.to(tl.float64) * LOG2_E - above) * share


@triton.jit
def spread(l, by):
    """e in units of 2^16 times -log2 of e / e(m) in units of 2^-10, m the largest logit. -> i64"""
    t = tl.maximum((moved(l, by) - by.most) * by.scale, -46.0)
    return (own_weight(l, by) >> 16) * (-t * 1024.0).to(tl.int32).to(tl.int64)


@triton.jit
def entropy(spread, distribution):
    """Entropy in nats from the sum of a row's spreads."""
    Z = distribution.total.to(tl.float64)
    highest = own_weight(distribution.max, weigher_of(distribution)).to(tl.float64)
    mean = spread.to(tl.float64) / Z * (64.0 * LN_2)
    return log(Z / highest) + mean
