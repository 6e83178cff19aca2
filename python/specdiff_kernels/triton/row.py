"""One row of logits on a GPU: tiles, status, threshold, distribution, and the draw."""

from __future__ import annotations

import triton
import triton.language as tl

from ..types import RowDistribution, Status
from .arguments import BINS, HEADER, MAX, SCALE, STATUS, THRESHOLD, TILE_ARRAYS, TOTAL
from .numerics import (
    LOG2_E,
    ONE,
    exponential,
    mulhi,
    own_weight,
    race_words,
    sampled_weight,
    weigher_of,
    weight,
)

OK = tl.constexpr(int(Status.OK))
NAN = tl.constexpr(int(Status.NAN))
POS_INF = tl.constexpr(int(Status.POS_INF))
EMPTY = tl.constexpr(int(Status.EMPTY))
PARAMETER = tl.constexpr(int(Status.PARAMETER))
# columns held at once where a whole tile would take too many registers
SELECT_WIDTH = tl.constexpr(1024)
RACE_WIDTH = tl.constexpr(256)
NO_COLUMN = tl.constexpr(1 << 20)  # more than any vocabulary


@triton.jit
def area_of(workspace, row, tiles):
    """Where a row's scratch begins."""
    return workspace + row * (HEADER + TILE_ARRAYS * tiles + BINS)


@triton.jit
def tile_sums(area, tiles):
    """Where the sums of weights of a row's tiles lie."""
    return area + HEADER + tiles


@triton.jit
def tile_partials(area, tiles):
    """Where sums of residual weights lie, or the least times of a race."""
    return area + HEADER + 2 * tiles


@triton.jit
def tile_winners(area, tiles):
    """Where the columns of the least times lie."""
    return area + HEADER + 3 * tiles


@triton.jit
def arrives_last(counter, n):
    """Whether this program is the last of n to get here; it then sees what all of them wrote."""
    tl.debug_barrier()  # every thread has written before one of them counts
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu") == n - 1


@triton.jit
def load_tile(row, V, tile, TILE: tl.constexpr):
    """Columns [TILE] and their logits in f32, -inf behind the row's end."""
    columns = tile * TILE + tl.arange(0, TILE)
    return columns, tl.load(row + columns, mask=columns < V, other=float("-inf")).to(tl.float32)


@triton.jit
def larger_or_nan(x, y):
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def highest(x):
    """The largest entry, NaN if there is one."""
    return tl.reduce(x, 0, larger_or_nan)


@triton.jit
def store_tile_max(area, row, V, tile, TILE: tl.constexpr):
    _, l = load_tile(row, V, tile, TILE)
    bits = highest(l).to(tl.int32, bitcast=True).to(tl.int64)
    tl.store(area + HEADER + tile, bits)


@triton.jit
def load_max(area, tiles, TILES: tl.constexpr):
    """The largest logit of a row, NaN if it has one, from the maxima of its tiles."""
    tile = tl.arange(0, TILES)
    bits = tl.load(area + HEADER + tile, mask=tile < tiles, other=-0x00800000)  # -inf
    return highest(bits.to(tl.int32).to(tl.float32, bitcast=True))


@triton.jit
def status_of(highest, parameters, b):
    """The first reason why a row has no distribution, else OK."""
    temperature = tl.load(parameters.temperature + b)
    in_range = (temperature >= 2.524354896707238e-29) & (temperature <= 3.961408125713217e28)
    valid = (temperature == 0) | in_range  # 2^-95 to 2^95
    if parameters.top_k is not None:
        valid = valid & (tl.load(parameters.top_k + b) >= 0)
    if parameters.top_p is not None:
        top_p = tl.load(parameters.top_p + b)
        valid = valid & (top_p > 0) & (top_p <= 1)
    if parameters.min_p is not None:
        min_p = tl.load(parameters.min_p + b)
        valid = valid & (min_p >= 0) & (min_p <= 1)
    status = tl.where(highest == float("-inf"), EMPTY, OK)
    status = tl.where(highest == float("inf"), POS_INF, status)
    status = tl.where(highest != highest, NAN, status)
    return tl.where(valid, status, PARAMETER)


@triton.jit
def ceil_share(share, total):
    """ceil(share * total) for share in (0, 1] read as a multiple of 2^-31, at least 1. -> i64"""
    numerator = (share.to(tl.float64) * 2147483648.0).to(tl.int64)
    low = numerator * (total & 0x7FFFFFFF)
    return tl.maximum(numerator * (total >> 31) + ((low + 0x7FFFFFFF) >> 31), 1)


@triton.jit
def select(row, V, by, need, bins, BY_WEIGHT: tl.constexpr, TILE: tl.constexpr):
    """The largest threshold t such that the weights e >= t sum to at least `need`, or number that.

    Radix selection, 9 of the 45 bits at a time. bins: BINS words of scratch. Bin 0 is what is left.
    """
    WIDTH: tl.constexpr = min(TILE, SELECT_WIDTH)
    bin = tl.arange(0, BINS)
    prefix = tl.full([], 0, tl.int64)
    above = tl.full([], 0, tl.int64)
    for step in range(5):
        shift = 36 - 9 * step
        tl.store(bins + bin, tl.zeros([BINS], tl.int64))
        tl.debug_barrier()
        for tile in range(tl.cdiv(V, WIDTH)):
            columns, l = load_tile(row, V, tile, WIDTH)
            e = own_weight(l, by)
            digit = (e >> shift).to(tl.int32) & (BINS - 1)
            counted = (columns < V) & ((e >> (shift + 9)) == prefix) & (digit > 0)
            amount = e if BY_WEIGHT else tl.full([WIDTH], 1, tl.int64)
            tl.atomic_add(bins + digit, amount, mask=counted, sem="relaxed")
        tl.debug_barrier()
        held = tl.load(bins + bin, cache_modifier=".cg")
        from_here = above + tl.sum(held) - tl.cumsum(held) + held  # in this bin and those above it
        chosen = tl.max(tl.where((bin > 0) & (from_here >= need), bin, 0))
        above += tl.sum(tl.where(bin > chosen, held, 0))
        prefix = (prefix << 9) | chosen
        tl.debug_barrier()
    return prefix


@triton.jit
def sum_from(row, V, by, threshold, TILE: tl.constexpr):
    """The sum of a row's weights that reach the threshold."""
    total = tl.full([], 0, tl.int64)
    for tile in range(tl.cdiv(V, TILE)):
        _, l = load_tile(row, V, tile, TILE)
        e = own_weight(l, by)
        total += tl.sum(tl.where(e >= threshold, e, 0))
    return total


@triton.jit
def threshold_of(row, V, distribution, parameters, b, bins, TILE: tl.constexpr):
    """Smallest weight that survives top-k, then top-p, then min-p (0: off); the largest logit's
    always does. -> i64"""
    by = weigher_of(distribution)
    threshold = tl.full([], 0, tl.int64)
    if parameters.top_k is not None:
        top_k = tl.load(parameters.top_k + b)
        if (top_k > 0) & (top_k < V):
            threshold = select(row, V, by, top_k, bins, False, TILE)
    if parameters.top_p is not None:
        top_p = tl.load(parameters.top_p + b)
        if top_p < 1:
            need = ceil_share(top_p, sum_from(row, V, by, threshold, TILE))
            nucleus = select(row, V, by, need, bins, True, TILE)
            threshold = tl.maximum(threshold, nucleus)
    highest = own_weight(distribution.max, by)
    if parameters.min_p is not None:
        floor = tl.load(parameters.min_p + b).to(tl.float64) * highest.to(tl.float64)
        threshold = tl.maximum(threshold, floor.to(tl.int64))
    return tl.minimum(threshold, highest)


@triton.jit
def begin_distribution(area, row, V, parameters, b, tiles, TILE: tl.constexpr, TILES: tl.constexpr):
    """A row's distribution but for what takes all its tiles: the total, and a greedy row's
    threshold."""
    largest = load_max(area, tiles, TILES)
    status = status_of(largest, parameters, b)
    temperature = tl.load(parameters.temperature + b)
    sampled = (status == OK) & (temperature != 0)
    scale = tl.div_rn(tl.full([], LOG2_E, tl.float32), tl.where(sampled, temperature, 1.0))
    distribution = RowDistribution(
        tl.where(status == OK, largest + 0.0, 0.0),  # never -0
        tl.where(sampled, scale, 0.0),
        tl.full([], 0, tl.int64),
        tl.full([], 0, tl.int64),
        status,
    )
    threshold = distribution.threshold
    if sampled:
        bins = area + HEADER + TILE_ARRAYS * tiles
        threshold = threshold_of(row, V, distribution, parameters, b, bins, TILE)
    return RowDistribution(
        distribution.max, distribution.scale, threshold, distribution.total, distribution.status
    )


@triton.jit
def store_tile_sums(area, row, V, distribution, parameters, first, last, tiles, TILE: tl.constexpr):
    """Sums of weights of the tiles first <= tile < last; of a greedy row the first column that
    holds its largest logit."""
    by = weigher_of(distribution)
    for tile in range(first, last):
        columns, l = load_tile(row, V, tile, TILE)
        if distribution.scale == 0:
            found = tl.min(tl.where(l == distribution.max, columns, NO_COLUMN)).to(tl.int64)
        else:
            e = own_weight(l, by)
            truncates = (parameters.top_k is not None) or (parameters.top_p is not None)
            if truncates or (parameters.min_p is not None):
                e = tl.where(e < distribution.threshold, 0, e)
            found = tl.sum(e)
        tl.store(tile_sums(area, tiles) + tile, found)


@triton.jit
def end_distribution(area, distribution, tiles, TILE: tl.constexpr, TILES: tl.constexpr):
    """The distribution of a row, all of whose tiles are summed; kept in the row's area."""
    tile = tl.arange(0, TILES)
    sums = tile_sums(area, tiles)
    found = load_sums(sums, tiles, TILES)
    total = tl.sum(found)
    threshold = distribution.threshold
    if (distribution.status == OK) & (distribution.scale == 0):
        threshold = tl.min(tl.where(tile < tiles, found, NO_COLUMN))
        total = tl.full([], ONE, tl.int64)
        tl.debug_barrier()  # every thread has read the sums
        tl.store(sums + tile, tl.where(tile == threshold // TILE, total, 0), mask=tile < tiles)
        tl.debug_barrier()  # and will read these
    total = tl.where(distribution.status == OK, total, 0)
    distribution = RowDistribution(
        distribution.max, distribution.scale, threshold, total, distribution.status
    )
    tl.store(area + MAX, distribution.max.to(tl.int32, bitcast=True).to(tl.int64))
    tl.store(area + SCALE, distribution.scale.to(tl.int32, bitcast=True).to(tl.int64))
    tl.store(area + THRESHOLD, distribution.threshold)
    tl.store(area + TOTAL, distribution.total)
    tl.store(area + STATUS, distribution.status.to(tl.int64))
    return distribution


@triton.jit
def load_distribution(area):
    """The distribution that `end_distribution` kept."""
    return RowDistribution(
        tl.load(area + MAX).to(tl.int32).to(tl.float32, bitcast=True),
        tl.load(area + SCALE).to(tl.int32).to(tl.float32, bitcast=True),
        tl.load(area + THRESHOLD),
        tl.load(area + TOTAL),
        tl.load(area + STATUS).to(tl.int32),
    )


@triton.jit
def read_distribution(arrays, row):
    """One row's distribution out of arrays [R]."""
    return RowDistribution(
        tl.load(arrays.max + row),
        tl.load(arrays.scale + row),
        tl.load(arrays.threshold + row),
        tl.load(arrays.total + row),
        tl.load(arrays.status + row),
    )


@triton.jit
def write_distribution(arrays, row, distribution):
    tl.store(arrays.max + row, distribution.max)
    tl.store(arrays.scale + row, distribution.scale)
    tl.store(arrays.threshold + row, distribution.threshold)
    tl.store(arrays.total + row, distribution.total)
    tl.store(arrays.status + row, distribution.status)


@triton.jit
def load_sums(sums, tiles, TILES: tl.constexpr):
    """Results of a row's programs by tile, 0 after the last tile. -> i64 [TILES]"""
    tile = tl.arange(0, TILES)
    return tl.load(sums + tile, mask=tile < tiles, other=0, cache_modifier=".cg")


@triton.jit
def find_tile(held, word, TILES: tl.constexpr):
    """The tile of the draw by `word` from tiles that hold these sums, and what is left of r."""
    r = mulhi(word, tl.sum(held))
    found = tl.sum((tl.cumsum(held) <= r).to(tl.int32))
    return found, r - tl.sum(tl.where(tl.arange(0, TILES) < found, held, 0))


@triton.jit
def find_column(e, r):
    """The first index of weights e [TILE] whose running sum exceeds r."""
    return tl.sum((tl.cumsum(e) <= r).to(tl.int32))


@triton.jit
def draw(area, row, V, distribution, word, tiles, TILE: tl.constexpr, TILES: tl.constexpr):
    """The column of mulhi(word, total), by the sums of the row's tiles. -> i64"""
    tile, r = find_tile(load_sums(tile_sums(area, tiles), tiles, TILES), word, TILES)
    columns, l = load_tile(row, V, tile, TILE)
    return (tile * TILE + find_column(weight(l, columns, distribution), r)).to(tl.int64)


@triton.jit
def store_tile_races(area, row, V, distribution, ids, words, seed, position, first, last, tiles,
                     TILE: tl.constexpr):  # fmt: skip
    """In each tile the least E_v / e_v, and the first column that reaches it; of a greedy row the
    first column that holds its largest logit. words, ids: of the columns, or None."""
    WIDTH: tl.constexpr = min(TILE, RACE_WIDTH)
    by = weigher_of(distribution)
    for tile in range(first, last):
        least = tl.full([], float("inf"), tl.float64)
        winner = tl.full([], NO_COLUMN, tl.int32)
        for slice in range(TILE // WIDTH):
            columns, l = load_tile(row, V, tile * (TILE // WIDTH) + slice, WIDTH)
            if distribution.scale == 0:
                times = tl.where(l == distribution.max, 0.0, float("inf")).to(tl.float64)
            else:
                times = race_times(columns, l, V, by, ids, words, seed, position)
            best = tl.min(times)
            column = tl.min(tl.where(times == best, columns, NO_COLUMN))
            winner = tl.where(best < least, column, winner)
            least = tl.minimum(best, least)
        tl.store(tile_partials(area, tiles) + tile, least.to(tl.int64, bitcast=True))
        tl.store(tile_winners(area, tiles) + tile, winner.to(tl.int64))


@triton.jit
def race_times(columns, l, V, by, ids, words, seed, position):
    """E_v / e_v, infinite where e_v = 0. -> f64"""
    if words is not None:
        word = tl.load(words + columns, mask=columns < V, other=0)
    else:
        id = columns.to(tl.int64)
        if ids is not None:
            id = tl.load(ids + columns, mask=columns < V, other=0)
        word = race_words(seed, position, id)
    e = sampled_weight(l, by)
    times = exponential(word) / tl.where(e > 0, e, 1).to(tl.float64)
    return tl.where(e > 0, times, float("inf"))


@triton.jit
def end_race(area, tiles, TILES: tl.constexpr):
    """The column that wins a row, all of whose tiles have raced. -> i64"""
    times = load_sums(tile_partials(area, tiles), tiles, TILES)  # positive doubles sort as integers
    times = tl.where(tl.arange(0, TILES) < tiles, times, 0x7FF0000000000000)
    columns = load_sums(tile_winners(area, tiles), tiles, TILES)
    return tl.min(tl.where(times == tl.min(times), columns, NO_COLUMN))
