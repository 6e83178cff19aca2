"""One reverse step of absorbing-state diffusion in two launches.

1. `maxima`: the largest logit of each tile of each row that the step reads.
2. `reveal_rows`: sums of weights of each tile; the last program of a row knows its distribution and
   draws its token, the last of a sequence decides which positions are revealed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..inputs import DenoiseStepInputs
from ..reveal import Order
from ..types import Pending, Purpose, RowDistribution
from .arguments import (
    ARRIVED,
    RANK,
    RAW_TOTAL,
    SEQUENCE_ARRIVED,
    SPREAD,
    TOKEN,
    Logits,
    Split,
    launch,
    scratch,
)
from .numerics import (
    LOG2_E,
    entropy,
    inverse,
    mean_exp,
    mulhi,
    own_weight,
    probability,
    random_word,
    spread,
    unit,
    weigher_of,
    weight,
)
from .row import (
    OK,
    area_of,
    arrives_last,
    begin_distribution,
    draw,
    end_distribution,
    end_race,
    load_tile,
    store_tile_max,
    store_tile_races,
    store_tile_sums,
    write_distribution,
)

CHUNK = tl.constexpr(int(Order.CHUNK))
MDLM = tl.constexpr(int(Order.MDLM))
SEDD = tl.constexpr(int(Order.SEDD))
FIRST_HITTING = tl.constexpr(int(Order.FIRST_HITTING))
ENTROPY = tl.constexpr(int(Order.ENTROPY))
CONFIDENCE = tl.constexpr(int(Order.CONFIDENCE))
REVEAL = tl.constexpr(int(Purpose.REVEAL))
DRAFT = tl.constexpr(int(Purpose.DRAFT))
COPIED = tl.constexpr(256)  # distributions that a program copies


def denoise_step(
    inputs: DenoiseStepInputs, *, out: Pending, workspace: Tensor | None = None
) -> None:
    given, pool_rows, reveal, step, entropies, sampling, random = inputs
    assert given.logits is not None and given.distribution is not None
    draft = Pending(given.tokens, given.tau, given.rows, given.distribution, out.entropy)
    (R, V), (B, K), device = given.logits.shape, draft.tokens.shape, draft.tokens.device
    pool = Logits.of(given.logits)
    positions = Positions(draft.tokens, pool_rows, given.lengths, reveal.rate)
    split = Split.of(V, whole=sampling.selects)
    sizes = Sizes(B, K, R, split.parts, step, reveal.lo, reveal.hi, reveal.number)
    workspace = scratch(workspace, B * K, V, device)
    copies = any(a is not b for a, b in zip(draft.distribution, out.distribution, strict=True))
    programs = max(B * K * split.tiles, triton.cdiv(R, COPIED.value) if copies else 0)
    constants = {"ORDER": int(reveal.order), "POSITIONS": triton.next_power_of_2(max(K, 1))}
    launch(maxima, programs, device, pool, positions, random, draft.distribution, out.distribution,
           workspace, *sizes, COPIES=copies, TILE=split.tile, **constants)  # fmt: skip
    launch(reveal_rows, B * K * split.parts, device, pool, positions, draft, sampling, random,
           given.draft_ids, out, workspace, *sizes, ENTROPIES=entropies, maxnreg=128,
           **split.constants, **constants)  # fmt: skip


class Sizes(NamedTuple):
    """Integers that kernels are not specialised for."""

    B: Any
    K: Any
    R: Any  # rows of logits
    parts: Any  # programs of a row in launch 2
    step: Any
    lo: Any
    hi: Any
    number: Any


SIZES = list(Sizes._fields)


class Positions(NamedTuple):
    """Fields that decide which positions a step reads."""

    tokens: Any  # [B, K]
    pool_rows: Any  # [B, K]
    lengths: Any
    rate: Any  # [B]


@triton.jit
def coin(random, sizes, at, slot, V):
    """The word that decides whether the position at [b, k] = at is revealed."""
    b = at // sizes.K
    if random.words is not None:
        stride = 2 if random.position is None else V + 1
        return tl.load(random.words + at * stride)
    else:
        seed, round = tl.load(random.seed + b), tl.load(random.round + b)
        return random_word(seed, slot, round, REVEAL, sizes.step)


@triton.jit
def count_masked(positions, sizes, b, end, POSITIONS: tl.constexpr):
    """How many of the positions before `end` may be revealed."""
    j = tl.arange(0, POSITIONS)
    inside = j < end
    token = tl.load(positions.tokens + b * sizes.K + j, mask=inside, other=0)
    row = tl.load(positions.pool_rows + b * sizes.K + j, mask=inside, other=-1)
    return tl.sum(((token < 0) & (row >= 0) & (row < sizes.R)).to(tl.int64))


@triton.jit
def is_read(positions, random, sizes, at, V, ORDER: tl.constexpr, POSITIONS: tl.constexpr):
    """Whether the position at [b, k] = at is masked and may be revealed in this step."""
    b, i = at // sizes.K, at % sizes.K
    row = tl.load(positions.pool_rows + at)
    length = tl.full([], sizes.K, tl.int64)
    if positions.lengths is not None:
        length = tl.minimum(length, tl.load(positions.lengths + b))
    read = (tl.load(positions.tokens + at) < 0) & (i < length) & (row >= 0) & (row < sizes.R)
    if ORDER == CHUNK:
        read = read & (sizes.lo <= i) & (i < sizes.hi)
    if ORDER == MDLM:
        read = read & (unit(coin(random, sizes, at, i, V)) < tl.load(positions.rate + b))
    if ORDER == FIRST_HITTING:
        masked = count_masked(positions, sizes, b, length, POSITIONS)
        chosen = mulhi(coin(random, sizes, b * sizes.K, 0, V), masked)
        read = read & (count_masked(positions, sizes, b, i, POSITIONS) == chosen)
    return read


@triton.jit(do_not_specialize=SIZES)
def maxima(
    pool, positions, random, old_distribution, new_distribution, workspace,
    B, K, R, parts, step, lo, hi, number,
    COPIES: tl.constexpr, ORDER: tl.constexpr, TILE: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    sizes = Sizes(B, K, R, parts, step, lo, hi, number)
    tiles = tl.cdiv(pool.V, TILE)
    program = tl.program_id(0).to(tl.int64)
    at, tile = program // tiles, program % tiles
    if COPIES:
        copy_distributions(
            old_distribution, new_distribution, program * COPIED + tl.arange(0, COPIED), sizes.R
        )
    if at < sizes.B * sizes.K:
        area = area_of(workspace, at, tiles)
        if tile == 0:
            tl.store(area + ARRIVED, 0)
            tl.store(area + TOKEN, -1)
            tl.store(area + RAW_TOTAL, 0)
            tl.store(area + SPREAD, 0)
            tl.store(area + SEQUENCE_ARRIVED, 0)
        if is_read(positions, random, sizes, at, pool.V, ORDER, POSITIONS):
            row = pool.data + tl.load(positions.pool_rows + at) * pool.row_stride
            store_tile_max(area, row, pool.V, tile, TILE)


@triton.jit
def copy_distributions(old, new, row, R):
    inside = row < R
    distribution = RowDistribution(
        tl.load(old.max + row, mask=inside),
        tl.load(old.scale + row, mask=inside),
        tl.load(old.threshold + row, mask=inside),
        tl.load(old.total + row, mask=inside),
        tl.load(old.status + row, mask=inside),
    )
    tl.store(new.max + row, distribution.max, mask=inside)
    tl.store(new.scale + row, distribution.scale, mask=inside)
    tl.store(new.threshold + row, distribution.threshold, mask=inside)
    tl.store(new.total + row, distribution.total, mask=inside)
    tl.store(new.status + row, distribution.status, mask=inside)


@triton.jit(do_not_specialize=SIZES)
def reveal_rows(
    pool, positions, draft, parameters, random, draft_ids, out, workspace,
    B, K, R, parts, step, lo, hi, number,
    ORDER: tl.constexpr, ENTROPIES: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """The distribution and the token of each row read; then the sequence's revealed positions."""
    sizes = Sizes(B, K, R, parts, step, lo, hi, number)
    tiles = tl.cdiv(pool.V, TILE)
    at, part = tl.program_id(0).to(tl.int64) // parts, tl.program_id(0) % parts
    b = at // sizes.K
    area = area_of(workspace, at, tiles)
    if is_read(positions, random, sizes, at, pool.V, ORDER, POSITIONS):
        index = tl.load(positions.pool_rows + at)
        row = pool.data + index * pool.row_stride
        distribution = begin_distribution(area, row, pool.V, parameters, b, tiles, TILE, TILES)
        if distribution.status == OK:
            first, last = part * tiles // parts, (part + 1) * tiles // parts
            store_tile_sums(area, row, pool.V, distribution, parameters, first, last, tiles, TILE)
            if ENTROPIES or (ORDER == SEDD) or (ORDER == CONFIDENCE):
                add_raw_sums(area, row, pool.V, distribution, first, last, ENTROPIES, TILE)
            if random.position is not None:
                race(area, row, pool.V, distribution, draft_ids, random, sizes, at, first, last,
                     tiles, TILE)  # fmt: skip
        if arrives_last(area + ARRIVED, parts):
            distribution = end_distribution(area, distribution, tiles, TILE, TILES)
            write_distribution(out.distribution, index, distribution)
            if distribution.status == OK:
                draw_token(area, row, pool.V, distribution, positions, random, draft_ids, out,
                           sizes, at, tiles, ORDER, ENTROPIES, TILE, TILES)  # fmt: skip
            else:
                tl.store(out.entropy + at, float("nan"))
    elif part == 0:
        tl.store(out.entropy + at, float("nan"))
    head = area_of(workspace, b * sizes.K, tiles)
    if arrives_last(head + SEQUENCE_ARRIVED, sizes.K * parts):
        end_step(positions, draft, out, workspace, sizes, b, tiles, ORDER, POSITIONS)


@triton.jit
def raw_distribution(distribution, total):
    """The model's own distribution: temperature 1, nothing cut off."""
    zero = tl.full([], 0, tl.int64)
    return RowDistribution(
        distribution.max, tl.full([], LOG2_E, tl.float32), zero, total, distribution.status
    )


@triton.jit
def add_raw_sums(
    area, row, V, distribution, first, last, ENTROPIES: tl.constexpr, TILE: tl.constexpr
):
    """Add what tiles contribute to the model's own total and to its entropy."""
    by = weigher_of(raw_distribution(distribution, distribution.total))
    for tile in range(first, last):
        _, l = load_tile(row, V, tile, TILE)
        tl.atomic_add(area + RAW_TOTAL, tl.sum(own_weight(l, by)), sem="relaxed")
        if ENTROPIES:
            tl.atomic_add(area + SPREAD, tl.sum(spread(l, by)), sem="relaxed")


@triton.jit
def race(
    area, row, V, distribution, draft_ids, random, sizes, at, first, last, tiles, TILE: tl.constexpr
):
    if random.words is not None:
        words = random.words + at * (V + 1) + 1
        store_tile_races(
            area, row, V, distribution, None, words, None, None, first, last, tiles, TILE
        )
    else:
        b = at // sizes.K
        seed, position = tl.load(random.seed + b), tl.load(random.position + b) + at % sizes.K
        store_tile_races(
            area, row, V, distribution, draft_ids, None, seed, position, first, last, tiles, TILE
        )


@triton.jit
def draw_token(
    area, row, V, distribution, positions, random, draft_ids, out, sizes, at, tiles,
    ORDER: tl.constexpr, ENTROPIES: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Candidate of a position: its token, if its own coin allows it, and its rank."""
    b, i = at // sizes.K, at % sizes.K
    raw = raw_distribution(distribution, tl.load(area + RAW_TOTAL, cache_modifier=".cg"))
    measured = tl.full([], float("nan"), tl.float64)
    if ENTROPIES:
        measured = entropy(tl.load(area + SPREAD, cache_modifier=".cg"), raw)
    tl.store(out.entropy + at, measured)
    if random.position is not None:
        column = end_race(area, tiles, TILES)
    else:
        if random.words is not None:
            word = tl.load(random.words + at * 2 + 1)
        else:
            seed, round = tl.load(random.seed + b), tl.load(random.round + b)
            word = random_word(seed, i, round, DRAFT, sizes.step)
        column = draw(area, row, V, distribution, word, tiles, TILE, TILES)
    token = column
    if draft_ids is not None:
        token = tl.load(draft_ids + column)
    if ORDER == SEDD:
        chance = tl.load(positions.rate + b) * mean_exp(raw, V)
        token = tl.where(unit(coin(random, sizes, at, i, V)) < chance, token, -1)
    tl.store(area + TOKEN, token)
    rank = measured
    if ORDER == CONFIDENCE:
        e = weight(tl.load(row + column).to(tl.float32), column, raw)
        rank = -probability(e, inverse(raw.total))
    tl.store(area + RANK, rank.to(tl.int64, bitcast=True))


@triton.jit
def end_step(
    positions, draft, out, workspace, sizes, b, tiles,
    ORDER: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """Write a sequence's positions, of which the chosen ones are revealed."""
    K = sizes.K
    i = tl.arange(0, POSITIONS)
    inside, at = i < K, b * K + i
    areas = area_of(workspace, at, tiles)
    token = tl.load(areas + TOKEN, mask=inside, other=-1, cache_modifier=".cg")
    chosen = token >= 0
    if ORDER == ENTROPY or ORDER == CONFIDENCE:
        chosen = chosen & (places(areas, token, workspace, K, b, tiles, POSITIONS) < sizes.number)
    row = tl.load(positions.pool_rows + at, mask=inside, other=0)
    scale = tl.load(out.distribution.scale + row, mask=chosen, other=0.0, cache_modifier=".cg")
    old = tl.load(draft.tokens + at, mask=inside)
    tl.store(out.tokens + at, tl.where(chosen, token, old), mask=inside)
    old = tl.load(draft.tau + at, mask=inside)
    tl.store(out.tau + at, tl.where(chosen, sizes.step, old), mask=inside)
    old = tl.load(draft.rows + at, mask=inside)
    tl.store(out.rows + at, tl.where(chosen, tl.where(scale == 0, -1, row), old), mask=inside)


@triton.jit
def places(areas, token, workspace, K, b, tiles, POSITIONS: tl.constexpr):
    """How many candidates come before each position: those of lower rank, then to the left."""
    i = tl.arange(0, POSITIONS)
    ranks = tl.load(areas + RANK, mask=token >= 0, other=0, cache_modifier=".cg")
    ranks = ranks.to(tl.float64, bitcast=True)
    before = tl.zeros([POSITIONS], tl.int64)
    for j in range(K):
        area = area_of(workspace, b * K + j, tiles)
        if tl.load(area + TOKEN, cache_modifier=".cg") >= 0:
            rank = tl.load(area + RANK, cache_modifier=".cg").to(tl.float64, bitcast=True)
            before += ((rank < ranks) | ((rank == ranks) & (j < i))).to(tl.int64)
    return before
