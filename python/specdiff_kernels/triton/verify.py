"""Verification of a draft in three launches (two under the coupled rule).

1. `maxima`: the largest logit of each tile of each target row.
2. `judge`: sums of weights of each tile; the last program of a row knows its distribution and
   judges the drafted token. Rows behind one that ended the round are left out if they come later.
   Under the coupled rule `race_rows` instead, which ends the round.
3. `end_round`: residual weights of each tile, under the lenient rule bias weights of all examined
   rows; the last program of a sequence draws the last token.

Rows go from the last to the first in launch 1 and from the first to the last in launch 2: what was
read last is still in the cache, and what comes late may not be needed.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..inputs import VerifyInputs
from ..lenience import KINDS
from ..types import Draft, Purpose, Verified
from .arguments import (
    ARRIVED,
    DRAFT_CHANCE,
    EXCESS,
    PREFIX_CHANCE,
    RECORDED,
    SEQUENCE_ARRIVED,
    SEQUENCE_STATUS,
    STATUS,
    STOP,
    SURE,
    TARGET_CHANCE,
    TOKEN,
    DraftArrays,
    Logits,
    Split,
    launch,
    scratch,
)
from .numerics import (
    bias_weight,
    inverse,
    probability,
    raised,
    random_word,
    unit,
    valid_amount,
    weight,
)
from .residual import (
    RESIDUAL_WIDTH,
    TOKEN_FAULT,
    bias_sum,
    draft_chance,
    is_recorded,
    residual_sum,
    residual_weights,
)
from .row import (
    OK,
    PARAMETER,
    area_of,
    arrives_last,
    begin_distribution,
    end_distribution,
    end_race,
    find_column,
    find_tile,
    load_distribution,
    load_sums,
    load_tile,
    store_tile_max,
    store_tile_races,
    store_tile_sums,
    tile_partials,
    tile_sums,
)

ACCEPT = tl.constexpr(int(Purpose.ACCEPT))
RESIDUAL = tl.constexpr(int(Purpose.RESIDUAL))
BONUS = tl.constexpr(int(Purpose.BONUS))


def verify(inputs: VerifyInputs, *, out: Verified, workspace: Tensor | None = None) -> None:
    target_logits, draft, rule, record, lenience, sampling, random = inputs
    B, rows, V = target_logits.shape
    device, block = target_logits.device, rule == "block"
    target, arrays = Logits.of(target_logits), DraftArrays.of(draft)
    split = Split.of(V, whole=sampling.selects)
    workspace = scratch(workspace, B * rows, V, device)
    sizes = Sizes.of(B, rows - 1, split.parts, draft)
    constants = split.constants | {"POSITIONS": triton.next_power_of_2(rows)}
    launch(maxima, B * rows * split.tiles, device, target, arrays.lengths, workspace, B, rows - 1,
           TILE=split.tile)  # fmt: skip
    if rule == "coupled":
        launch(race_rows, B * rows * split.parts, device, target, arrays, sampling, random,
               workspace, B, rows - 1, split.parts, out, maxnreg=128, **constants)  # fmt: skip
        return
    amounts, constants["KIND"] = None, -1
    if lenience is not None:
        amounts, constants["KIND"] = lenience.amount, list(KINDS).index(lenience.kind)
    every_row = block or amounts is not None
    launch(judge, B * rows * split.parts, device, target, arrays, sampling, random, amounts,
           workspace, *sizes, RECORD=int(record), BLOCK_RULE=block, maxnreg=split.maxnreg,
           **constants)  # fmt: skip
    launch(end_round, B * (rows if every_row else 1) * split.tiles, device, target, arrays, random,
           amounts, workspace, *sizes, out, BLOCK_RULE=block, num_warps=4, maxnreg=128,
           **constants)  # fmt: skip


class Sizes(NamedTuple):
    """Integers that kernels are not specialised for."""

    B: Any
    K: Any
    parts: Any  # programs of a row in launch 2
    R: Any  # rows of draft logits
    steps: Any  # of a binary search among draft_ids
    final_step: Any

    @classmethod
    def of(cls, B: int, K: int, parts: int, draft: Draft) -> Sizes:
        R = 0 if draft.logits is None else len(draft.logits)
        steps = 0 if draft.draft_ids is None else len(draft.draft_ids).bit_length()
        return cls(B, K, parts, R, steps, draft.final_step or 0)


SIZES = list(Sizes._fields)


@triton.jit
def length_of(lengths, b, K):
    """Drafted tokens of a sequence, -1 if that is out of range. -> i64"""
    length = tl.full([], K, tl.int64)
    if lengths is not None:
        length = tl.load(lengths + b)
    return tl.where(length <= K, length, -1)


@triton.jit
def read_stop(head, K):
    """Where the round has to end for all that is known by now, the same for all threads."""
    return tl.atomic_min(head + STOP, tl.cast(K, tl.int64), sem="relaxed")  # K at most: a read


@triton.jit
def position_word(random, b, slot, column, purpose, K):
    """The word for a drafted position: the one passed in for `column`, or made for `slot`."""
    if random.words is not None:
        return tl.load(random.words + b * (K + 1) + column)
    else:
        return random_word(tl.load(random.seed + b), slot, tl.load(random.round + b), purpose, 0)


@triton.jit(do_not_specialize=SIZES)
def maxima(target, lengths, workspace, B, K, TILE: tl.constexpr):
    tiles = tl.cdiv(target.V, TILE)
    place, tile = tl.program_id(0).to(tl.int64) // tiles, tl.program_id(0) % tiles
    i, b = K - place // B, place % B
    area = area_of(workspace, b * (K + 1) + i, tiles)
    if tile == 0:
        tl.store(area + ARRIVED, 0)
        tl.store(area + EXCESS, 0)
        if i == 0:
            tl.store(area + STOP, K)
            tl.store(area + SEQUENCE_ARRIVED, 0)
    if i <= length_of(lengths, b, K):
        row = target.data + b * target.batch_stride + i * target.row_stride
        store_tile_max(area, row, target.V, tile, TILE)


@triton.jit(do_not_specialize=SIZES)
def judge(
    target, draft, parameters, random, amounts, workspace, B, K, parts, R, steps, final_step,
    RECORD: tl.constexpr, BLOCK_RULE: tl.constexpr, KIND: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """The distribution of each target row, and whether its drafted token ends the round."""
    sizes = Sizes(B, K, parts, R, steps, final_step)
    tiles = tl.cdiv(target.V, TILE)
    place, part = tl.program_id(0).to(tl.int64) // parts, tl.program_id(0) % parts
    i, b = place // B, place % B
    head = area_of(workspace, b * (K + 1), tiles)
    area = area_of(workspace, b * (K + 1) + i, tiles)
    length = length_of(draft.lengths, b, K)
    if (i <= length) & (i <= read_stop(head, K)):
        row = target.data + b * target.batch_stride + i * target.row_stride
        distribution = begin_distribution(area, row, target.V, parameters, b, tiles, TILE, TILES)
        if distribution.status == OK:
            first, last = part * tiles // parts, (part + 1) * tiles // parts
            store_tile_sums(area, row, target.V, distribution, parameters, first, last, tiles, TILE)
        if arrives_last(area + ARRIVED, parts):
            distribution = end_distribution(area, distribution, tiles, TILE, TILES)
            if i < length:
                recorded = is_recorded(draft, sizes, b, i, RECORD, POSITIONS)
                tl.store(area + RECORDED, recorded.to(tl.int64))
                word = position_word(random, b, i, i, ACCEPT, K)
                amount = None if amounts is None else tl.load(amounts + b)
                if ends_round(area, row, target.V, distribution, draft, sizes, b * K + i, recorded,
                              word, amount, BLOCK_RULE, KIND):  # fmt: skip
                    tl.atomic_min(head + STOP, i, sem="relaxed")
    if BLOCK_RULE:
        if arrives_last(head + SEQUENCE_ARRIVED, (K + 1) * parts):
            chain_chances(workspace, b, length, K, tiles)


@triton.jit
def ends_round(area, row, V, distribution, draft, sizes, at, recorded, word, amount,
               BLOCK_RULE: tl.constexpr, KIND: tl.constexpr):  # fmt: skip
    """Whether no later row can matter: the token at [b, k] = at is rejected, has no chance in the
    block rule, or something is wrong."""
    q, fault = draft_chance(draft, sizes, at, recorded, V)
    status = tl.where(distribution.status == OK, fault, distribution.status)
    tl.store(area + STATUS, status.to(tl.int64))
    ends = status != OK
    if status == OK:
        x = tl.load(draft.tokens + at)
        e = weight(tl.load(row + x).to(tl.float32), x, distribution)
        p = probability(e, inverse(distribution.total))
        if BLOCK_RULE:
            tl.store(area + TARGET_CHANCE, p.to(tl.int64, bitcast=True))
            tl.store(area + DRAFT_CHANCE, q.to(tl.int64, bitcast=True))
            ends = p == 0.0
        else:
            chance = p
            if amount is not None:
                chance = raised(p, q, amount, KIND)
                # where q is recorded, launch 3 sums over the row
                spent = tl.where(recorded, 0, bias_weight(p, q, amount, KIND))
                tl.store(area + EXCESS, spent)
            ends = unit(word) * q >= chance
    return ends


@triton.jit
def load_f64(pointer):
    return tl.load(pointer, cache_modifier=".cg").to(tl.float64, bitcast=True)


@triton.jit
def chain_chances(workspace, b, length, K, tiles):
    """P_i = min(1, P_{i-1} p(x_i) / q(x_i)) of all prefixes of a sequence."""
    head = area_of(workspace, b * (K + 1), tiles)
    tl.store(head + SEQUENCE_ARRIVED, 0)
    stop = tl.load(head + STOP, cache_modifier=".cg")
    status = tl.full([], OK, tl.int64)
    sure = tl.full([], 0, tl.int64)
    P = tl.full([], 1.0, tl.float64)
    tl.store(head + PREFIX_CHANCE, P.to(tl.int64, bitcast=True))
    for i in range(K):
        area = area_of(workspace, b * (K + 1) + i, tiles)
        if (i < length) & (i <= stop) & (status == OK) & (P > 0):
            status = tl.load(area + STATUS, cache_modifier=".cg")
            joint = P * load_f64(area + TARGET_CHANCE)
            P = tl.minimum(joint / load_f64(area + DRAFT_CHANCE), 1.0)
        else:
            P = P * 0.0
        following = area_of(workspace, b * (K + 1) + i + 1, tiles)
        tl.store(following + PREFIX_CHANCE, P.to(tl.int64, bitcast=True))
        sure = tl.where(P == 1.0, i + 1, sure)
    tl.store(head + SURE, sure)
    tl.store(head + SEQUENCE_STATUS, status)


@triton.jit(do_not_specialize=SIZES)
def end_round(
    target, draft, random, amounts, workspace, B, K, parts, R, steps, final_step, out,
    BLOCK_RULE: tl.constexpr, KIND: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """The residual where one may be drawn from, and the token that ends each round."""
    sizes = Sizes(B, K, parts, R, steps, final_step)
    tiles = tl.cdiv(target.V, TILE)
    place, tile = tl.program_id(0).to(tl.int64) // tiles, tl.program_id(0) % tiles
    EVERY_ROW: tl.constexpr = BLOCK_RULE or (amounts is not None)
    b = place // (K + 1) if EVERY_ROW else place
    programs = tiles * (K + 1) if EVERY_ROW else tiles
    head = area_of(workspace, b * (K + 1), tiles)
    length = length_of(draft.lengths, b, K)
    if BLOCK_RULE:
        i = place % (K + 1)
        status = tl.where(length < 0, TOKEN_FAULT, tl.load(head + SEQUENCE_STATUS)).to(tl.int32)
        drawn_from = (i < length) & may_end_at(random, head, workspace, b, i, K, tiles)
    else:
        end = tl.maximum(tl.minimum(tl.load(head + STOP), length), 0)
        status = tl.load(area_of(workspace, b * (K + 1) + end, tiles) + STATUS)
        i = end
        if amounts is not None:
            i = place % (K + 1)
            amount = tl.load(amounts + b)
            status = tl.where(valid_amount(amount, KIND), status, PARAMETER)
        status = tl.where(length < 0, TOKEN_FAULT, status).to(tl.int32)
        recorded = (i < length) & (i <= end)
        if recorded:
            recorded = tl.load(area_of(workspace, b * (K + 1) + i, tiles) + RECORDED) != 0
        drawn_from = recorded & (i == end)
        if amounts is not None:
            if (status == OK) & recorded:
                area = area_of(workspace, b * (K + 1) + i, tiles)
                row = target.data + b * target.batch_stride + i * target.row_stride
                spent = bias_sum(row, target.V, load_distribution(area), draft, sizes, b * K + i,
                                 amount, tile, KIND, TILE)  # fmt: skip
                tl.atomic_add(area + EXCESS, spent, sem="relaxed")
    area = area_of(workspace, b * (K + 1) + i, tiles)
    if (status == OK) & drawn_from:
        a = load_f64(area + PREFIX_CHANCE) if BLOCK_RULE else tl.full([], 1.0, tl.float64)
        row = target.data + b * target.batch_stride + i * target.row_stride
        recorded = tl.load(area + RECORDED) != 0
        found = residual_sum(
            row, target.V, load_distribution(area), draft, sizes, b * K + i, recorded, a, tile, TILE
        )
        tl.store(tile_partials(area, tiles) + tile, found)
        if BLOCK_RULE:
            tl.atomic_add(area + EXCESS, found, sem="relaxed")
    if arrives_last(head + SEQUENCE_ARRIVED, programs):
        if BLOCK_RULE:
            i = longest_prefix(random, head, workspace, b, length, K, tiles, POSITIONS)
        else:
            i = end
        area = area_of(workspace, b * (K + 1) + i, tiles)
        if BLOCK_RULE:
            if (i == length) & (status == OK):
                status = tl.load(area + STATUS).to(tl.int32)
        token = tl.full([], -1, tl.int64)
        if status == OK:
            token = last_token(target, draft, sizes, random, area, b, i, length, tiles, BLOCK_RULE,
                               TILE, TILES)  # fmt: skip
        bias = tl.full([], 0.0, tl.float64)
        if amounts is not None:
            bias = bias_of_round(workspace, b, tl.minimum(i + 1, length), K, tiles)
        emit(out, draft, b, i, token, status, bias, K, POSITIONS)


@triton.jit
def bias_of_round(workspace, b, examined, K, tiles):
    """The biases of the examined positions, added from left to right. -> f64"""
    bias = tl.full([], 0.0, tl.float64)
    for i in range(K):
        area = area_of(workspace, b * (K + 1) + i, tiles)
        spent = tl.load(area + EXCESS, mask=i < examined, other=0, cache_modifier=".cg")
        bias += spent.to(tl.float64) * 8.673617379884035e-19  # 2^-60
    return bias


@triton.jit
def may_end_at(random, head, workspace, b, i, K, tiles):
    """Whether S_i can be needed: u_i < P_i, behind the tokens that are accepted in any case."""
    sure = tl.load(head + SURE)
    chance = load_f64(area_of(workspace, b * (K + 1) + i, tiles) + PREFIX_CHANCE)
    may = i == sure
    if i > sure:
        may = unit(position_word(random, b, i - 1, i - 1, ACCEPT, K)) < chance
    return may


@triton.jit
def longest_prefix(random, head, workspace, b, length, K, tiles, POSITIONS: tl.constexpr):
    """The largest i with u_i < h_i. -> i64"""
    i = tl.arange(0, POSITIONS).to(tl.int64)
    inside = i <= length
    areas = area_of(workspace, b * (K + 1) + i, tiles)
    P = tl.load(areas + PREFIX_CHANCE, mask=inside, other=0).to(tl.float64, bitcast=True)
    S = tl.load(areas + EXCESS, mask=inside, other=0, cache_modifier=".cg").to(tl.float64)
    S = S * 8.673617379884035e-19  # 2^-60
    h = tl.where((i < length) & (P < 1.0), tl.minimum(S / (S + 1.0 - P), P), P)
    if random.words is not None:
        later = (i > 0) & (i <= K)
        word = tl.load(random.words + b * (K + 1) + i - 1, mask=later, other=0)
    else:
        word = random_word(tl.load(random.seed + b), i - 1, tl.load(random.round + b), ACCEPT, 0)
    sure = tl.load(head + SURE)
    here = (i == sure) | ((i > sure) & inside & (unit(word) < h))
    return tl.max(tl.where(here, i, 0))


@triton.jit
def last_token(
    target, draft, sizes, random, area, b, i, length, tiles, BLOCK_RULE: tl.constexpr,
    TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    """Draw behind i accepted tokens: from the residual, or from p without x, or from p. -> i64"""
    K = sizes.K
    row = target.data + b * target.batch_stride + i * target.row_stride
    distribution = load_distribution(area)
    drafted = i < length
    recorded = drafted & (tl.load(area + RECORDED) != 0)
    residual = drafted if BLOCK_RULE else recorded
    x = tl.load(draft.tokens + b * K + i, mask=drafted & ~residual, other=-1)
    a = load_f64(area + PREFIX_CHANCE) if BLOCK_RULE else tl.full([], 1.0, tl.float64)
    held = load_sums(tile_sums(area, tiles), tiles, TILES)
    kept = held
    if residual:
        kept = load_sums(tile_partials(area, tiles), tiles, TILES)
    if x >= 0:
        e_x = weight(tl.load(row + x).to(tl.float32), x, distribution)
        kept = held - tl.where(tl.arange(0, TILES) == x // TILE, e_x, 0)
    empty = tl.sum(kept) == 0
    word = position_word(random, b, i, K, tl.where(drafted, RESIDUAL, BONUS), K)
    tile, r = find_tile(tl.where(empty, held, kept), word, TILES)
    column = tile * TILE
    WIDTH: tl.constexpr = min(TILE, RESIDUAL_WIDTH)
    for slice in range(TILE // WIDTH):
        place = tile * (TILE // WIDTH) + slice
        if residual & ~empty:
            e = residual_weights(
                row, target.V, distribution, draft, sizes, b * K + i, recorded, a, place, WIDTH
            )
        else:
            columns, l = load_tile(row, target.V, place, WIDTH)
            e = tl.where((columns == x) & ~empty, 0, weight(l, columns, distribution))
        column += find_column(e, r)
        r -= tl.sum(e)
    return column.to(tl.int64)


@triton.jit
def emit(out, draft, b, accepted, token, status, bias, K, POSITIONS: tl.constexpr):
    """Write a sequence's result: its accepted tokens, the last one, then -1."""
    j = tl.arange(0, POSITIONS)
    shown = tl.where(status == OK, accepted, -1)
    drafted = tl.load(draft.tokens + b * K + j, mask=j < tl.minimum(shown, K), other=-1)
    emitted = tl.where(j == shown, token, drafted)
    tl.store(out.emitted + b * (K + 1) + j, emitted, mask=j <= K)
    tl.store(out.accepted + b, tl.maximum(shown, 0))
    tl.store(out.status + b, status)
    tl.store(out.bias + b, tl.where(status == OK, bias, 0.0))


@triton.jit(do_not_specialize=SIZES)
def race_rows(
    target, draft, parameters, random, workspace, B, K, parts, out,
    TILE: tl.constexpr, TILES: tl.constexpr, POSITIONS: tl.constexpr,
):  # fmt: skip
    """The coupled rule: the token of each target row, and where the drafted ones depart from it."""
    tiles = tl.cdiv(target.V, TILE)
    place, part = tl.program_id(0).to(tl.int64) // parts, tl.program_id(0) % parts
    i, b = place // B, place % B
    head = area_of(workspace, b * (K + 1), tiles)
    area = area_of(workspace, b * (K + 1) + i, tiles)
    length = length_of(draft.lengths, b, K)
    if (i <= length) & (i <= read_stop(head, K)):
        row = target.data + b * target.batch_stride + i * target.row_stride
        distribution = begin_distribution(area, row, target.V, parameters, b, tiles, TILE, TILES)
        if distribution.status == OK:
            first, last = part * tiles // parts, (part + 1) * tiles // parts
            if random.words is not None:
                words = random.words + (b * (K + 1) + i) * target.V
                store_tile_races(area, row, target.V, distribution, None, words, None, None, first,
                                 last, tiles, TILE)  # fmt: skip
            else:
                seed, position = tl.load(random.seed + b), tl.load(random.position + b) + i
                store_tile_races(area, row, target.V, distribution, None, None, seed, position,
                                 first, last, tiles, TILE)  # fmt: skip
        if arrives_last(area + ARRIVED, parts):
            y = tl.full([], -1, tl.int64)
            if distribution.status == OK:
                y = end_race(area, tiles, TILES)
            x = tl.load(draft.tokens + b * K + i, mask=i < length, other=0)
            possible = (x >= 0) & (x < target.V)
            status = tl.where(
                (distribution.status == OK) & ~possible, TOKEN_FAULT, distribution.status
            )
            tl.store(area + STATUS, status.to(tl.int64))
            tl.store(area + TOKEN, y)
            if (i < length) & ((status != OK) | (x != y)):
                tl.atomic_min(head + STOP, i, sem="relaxed")
    if arrives_last(head + SEQUENCE_ARRIVED, (K + 1) * parts):
        i = tl.maximum(tl.minimum(tl.load(head + STOP, cache_modifier=".cg"), length), 0)
        area = area_of(workspace, b * (K + 1) + i, tiles)
        status = tl.load(area + STATUS, cache_modifier=".cg")
        status = tl.where(length < 0, TOKEN_FAULT, status).to(tl.int32)
        token = tl.load(area + TOKEN, cache_modifier=".cg")
        emit(out, draft, b, i, token, status, tl.full([], 0.0, tl.float64), K, POSITIONS)
