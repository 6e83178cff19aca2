"""The distributions that drafted tokens were drawn from, and residuals behind them, on a GPU."""

from __future__ import annotations

import triton
import triton.language as tl

from ..records import Record
from ..types import Status
from .numerics import ONE, bias_weight, excess, inverse, probability, weight
from .row import OK, load_tile, read_distribution

DRAFT_FAULT = tl.constexpr(int(Status.DRAFT))
TOKEN_FAULT = tl.constexpr(int(Status.TOKEN))
ONE_HOT = tl.constexpr(int(Record.ONE_HOT))
FINAL = tl.constexpr(int(Record.FINAL))
RESIDUAL_WIDTH = tl.constexpr(512)  # columns held at once
RUNNING_MAX = tl.constexpr(int(Record.RUNNING_MAX))


@triton.jit
def is_recorded(draft, sizes, b, i, RECORD: tl.constexpr, POSITIONS: tl.constexpr):
    """Whether the record of position i counts. POSITIONS: a power of two, at least K."""
    K = sizes.K
    row = tl.load(draft.rows + b * K + i)
    tau = tl.load(draft.tau + b * K + i)
    recorded = row >= 0
    if RECORD == ONE_HOT:
        recorded = row < row
    if RECORD == FINAL:
        recorded = recorded & (tau == sizes.final_step)
    if RECORD == RUNNING_MAX:
        j = tl.arange(0, POSITIONS)
        earlier = tl.load(draft.tau + b * K + j, mask=j <= i, other=-(1 << 31))
        recorded = recorded & (tau >= tl.max(earlier))
    return recorded


@triton.jit
def column_of(ids, columns, steps, v):
    """Columns whose id is v, in increasing ids [columns], and whether there is one. v: any shape"""
    low = v * 0
    high = low + columns
    for _ in range(steps):
        middle = (low + high) // 2
        below = (low < high) & (tl.load(ids + middle, mask=low < high, other=0) < v)
        high = tl.where(below, high, middle)
        low = tl.where(below, middle + 1, low)
    found = tl.load(ids + low, mask=low < columns, other=-1) == v
    return low, found


@triton.jit
def draft_weights(draft, sizes, row, v, V):
    """Weights that pool row `row` gives to ids v of the target's V, 0 outside of them. -> i64"""
    distribution = read_distribution(draft.distribution, row)
    column = v
    exists = v < tl.where(distribution.status == OK, V, 0)
    if draft.draft_ids is not None:
        column, found = column_of(draft.draft_ids, draft.logits.V, sizes.steps, v)
        exists = exists & found
    logits = draft.logits.data + row * draft.logits.row_stride
    l = tl.load(logits + column, mask=exists, other=float("-inf")).to(tl.float32)
    return tl.where(exists, weight(l, column, distribution), 0)


@triton.jit
def draft_chance(draft, sizes, at, recorded, V):
    """q(x) of the drafted token at [b, k] = at, f64, and what is wrong with its record."""
    x = tl.load(draft.tokens + at)
    exists = (x >= 0) & (x < V)
    fault = tl.where(exists, OK, TOKEN_FAULT)
    q = tl.full([], 1.0, tl.float64)
    if recorded:
        if draft.logits is None:
            fault = TOKEN_FAULT + tl.zeros_like(fault)
        else:
            row = tl.load(draft.rows + at)
            fault = tl.where(row < sizes.R, fault, TOKEN_FAULT)
            if fault == OK:
                e = draft_weights(draft, sizes, row, x, V)
                fault = tl.where(e == 0, DRAFT_FAULT, OK)
                q = probability(e, inverse(tl.load(draft.distribution.total + row)))
    return q, fault


@triton.jit
def chances(target, V, distribution, draft, sizes, at, recorded, tile, TILE: tl.constexpr):
    """p and q of one tile, q the distribution of the drafted token at [b, k] = at."""
    columns, l = load_tile(target, V, tile, TILE)
    p = probability(weight(l, columns, distribution), inverse(distribution.total))
    e_q = tl.where(columns == tl.load(draft.tokens + at), ONE, 0)
    total = tl.full([], ONE, tl.int64)
    if draft.logits is not None:
        if recorded:
            row = tl.load(draft.rows + at)
            e_q = draft_weights(draft, sizes, row, columns, V)
            total = tl.load(draft.distribution.total + row)
    return p, probability(e_q, inverse(total))


@triton.jit
def residual_weights(
    target, V, distribution, draft, sizes, at, recorded, a, tile, TILE: tl.constexpr
):
    """int(max(a p - q, 0) 2^60) of one tile."""
    p, q = chances(target, V, distribution, draft, sizes, at, recorded, tile, TILE)
    return excess(a * p, q)


@triton.jit
def residual_sum(target, V, distribution, draft, sizes, at, recorded, a, tile, TILE: tl.constexpr):
    """The sum of one tile's residual weights."""
    WIDTH: tl.constexpr = min(TILE, RESIDUAL_WIDTH)
    total = tl.full([], 0, tl.int64)
    for slice in range(TILE // WIDTH):
        place = tile * (TILE // WIDTH) + slice
        total += tl.sum(
            residual_weights(target, V, distribution, draft, sizes, at, recorded, a, place, WIDTH)
        )
    return total


@triton.jit
def bias_sum(target, V, distribution, draft, sizes, at, amount, tile, KIND: tl.constexpr,
             TILE: tl.constexpr):  # fmt: skip
    """The sum of one tile's bias weights, at a position that is recorded."""
    WIDTH: tl.constexpr = min(TILE, RESIDUAL_WIDTH)
    total = tl.full([], 0, tl.int64)
    for slice in range(TILE // WIDTH):
        place = tile * (TILE // WIDTH) + slice
        p, q = chances(target, V, distribution, draft, sizes, at, True, place, WIDTH)
        total += tl.sum(bias_weight(p, q, amount, KIND))
    return total
