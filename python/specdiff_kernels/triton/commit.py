"""`commit`, with one launch for each part that is asked for.

1. `advance`: lengths, and which sequences are finished.
2. `move`: a tree's path in all caches of one geometry, through the tables as they still are.
3. `give_back`: the blocks behind what each row keeps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from ..arguments import by_geometry
from ..backends import BackendError, interprets_triton
from ..inputs import CommitInputs
from ..pages import Pages
from ..types import Committed
from .arguments import launch

WORDS = {1: tl.uint8, 2: tl.uint16, 4: tl.uint32, 8: tl.uint64}
LANES = 256  # words of an entry that a program moves
GROUP = tl.constexpr(8)  # entries that it holds at once
MAX_CACHES = 256  # of a launch, whose arguments are limited to 4 KiB
TILE = tl.constexpr(2048)  # entries of tables that are looked at at once
CLAIM = tl.constexpr(-(2**31))  # below all counts of references


def commit(inputs: CommitInputs, *, out: Committed) -> None:
    emitted, lengths, stop_tokens, limit, finished, pages, release, path, caches = inputs
    B, N = emitted.shape
    stops = 0 if stop_tokens is None else len(stop_tokens)
    launch(advance, B, emitted.device, lengths, emitted, N, stop_tokens, stops, limit, finished,
           out, POSITIONS=triton.next_power_of_2(max(N, 1)))  # fmt: skip
    if path is not None:
        move_path(path, pages, caches, out)
    if pages is not None:
        launch(give_back, min(pages.tables.numel(), 1), emitted.device, out, pages,
               *pages.tables.shape, len(pages.references), RELEASE=release)  # fmt: skip


def move_path(path: Tensor, pages: Pages | None, caches: Sequence[Tensor], out: Committed) -> None:
    if path.is_cuda and interprets_triton():
        raise BackendError(
            "Triton's interpreter cannot reach a GPU's memory: unset TRITON_INTERPRET"
        )
    for ((*sizes, heads, size), strides), alike in by_geometry(caches, pages).items():
        at = [cache.data_ptr() for cache in alike]
        width = math.gcd(8, size, *strides, *at)
        words = size // width
        lanes = min(LANES, triton.next_power_of_2(max(heads * words, 1)))
        parts = triton.cdiv(heads * words, lanes)
        columns = 0 if pages is None else pages.tables.shape[1]
        for first in range(0, len(at), MAX_CACHES):
            some = tuple(at[first : first + MAX_CACHES])
            launch(move, len(some) * len(path) * parts, path.device, some, out, path, *path.shape,
                   pages, columns, *sizes, heads, words, *(s // width for s in strides),
                   WORD=WORDS[width], LANES=lanes, num_warps=4)  # fmt: skip


@triton.jit(do_not_specialize=["N", "stops"])
def advance(lengths, emitted, N, stop_tokens, stops, limit, finished, out, POSITIONS: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, POSITIONS)
    token = tl.load(emitted + b * N + i, mask=i < N, other=-1)
    kept = tl.min(tl.where(token < 0, i, N))  # tokens before the padding
    length = tl.load(lengths + b)
    done = length < length
    if finished is not None:
        done = tl.load(finished + b)
        kept = tl.where(done, 0, kept)
    if limit is not None:
        kept = tl.minimum(kept, tl.maximum(tl.load(limit + b) - length, 0))
    if stop_tokens is not None:
        first = N + 0 * kept
        for s in range(stops):
            first = tl.minimum(first, tl.min(tl.where(token == tl.load(stop_tokens + s), i, N)))
        done = done | (first < kept)
        kept = tl.minimum(kept, first + 1)
    if limit is not None:
        done = done | (length + kept >= tl.load(limit + b))
    last = tl.max(tl.where(i == kept - 1, token, -1))
    tl.store(out.lengths + b, length + kept)
    tl.store(out.kept + b, kept)
    tl.store(out.finished + b, done)
    tl.store(out.last + b, last)


class Geometry(NamedTuple):
    """Caches [outer, positions, heads, words]; strides in words, the last one 1."""

    outer: Any
    positions: Any
    heads: Any
    words: Any
    outer_stride: Any
    position_stride: Any
    head_stride: Any


@triton.jit(do_not_specialize=["B", "N", "M", *Geometry._fields])
def move(
    addresses, out, path, B, N, pages, M,
    outer, positions, heads, words, outer_stride, position_stride, head_stride,
    WORD: tl.constexpr, LANES: tl.constexpr,
):  # fmt: skip
    """LANES words of each entry that a row keeps, in one cache.

    In ascending order a target lies before all sources that are still to be read, but for those of
    the group at hand.
    """
    caches = Geometry(outer, positions, heads, words, outer_stride, position_stride, head_stride)
    parts = tl.cdiv(heads * words, LANES)
    item, part = tl.program_id(0).to(tl.int64) // parts, tl.program_id(0) % parts
    cache, b = item // B, item % B
    lane = part * LANES + tl.arange(0, LANES)
    word = (lane // words).to(tl.int64) * head_stride + lane % words
    at = choose(addresses, cache).to(tl.pointer_type(WORD)) + word[None, :]
    kept = tl.load(out.kept + b)
    start = tl.load(out.lengths + b) - kept
    for first in range(0, kept, GROUP):
        i = first + tl.arange(0, GROUP)
        node = tl.load(path + b * N + i, mask=i < kept, other=0)
        source = entry(start + node, b, caches, pages, M)
        target = entry(start + i, b, caches, pages, M)
        moves = (i < kept) & (source >= 0) & (target >= 0) & (source != target)
        mask = moves[:, None] & (lane < heads * words)[None, :]
        held = tl.load(at + source[:, None], mask=mask)
        tl.debug_barrier()  # every thread has read
        tl.store(at + target[:, None], held, mask=mask)


@triton.jit
def choose(values, index):
    """values[index] -> i64"""
    value = tl.full([], 0, tl.int64)
    for i in tl.static_range(len(values)):
        value = tl.where(index == i, values[i], value)
    return value


@triton.jit
def entry(t, b, caches, pages, M):
    """Where positions t of row b begin within a cache, in words; -1 if it has none. -> i64"""
    if pages is None:
        outer, slot = b, t
        known = (t >= 0) & (t < caches.positions)
    else:
        column, slot = t // pages.block_size, t % pages.block_size
        inside = (t >= 0) & (column < M)
        outer = tl.load(pages.tables + b * M + column, mask=inside, other=-1).to(tl.int64)
        known = (outer >= 0) & (outer < caches.outer)
    return tl.where(known, outer * caches.outer_stride + slot * caches.position_stride, -1)


class Dropped(NamedTuple):
    """Table entries behind what their rows keep; all [TILE]."""

    i: Any  # their order
    at: Any
    inside: Any  # whether there is one
    block: Any  # -1: none
    known: Any  # whether the cache has this block
    references: Any  # where they are counted


@triton.jit(do_not_specialize=["B", "M", "blocks"])
def give_back(out, pages, B, M, blocks, RELEASE: tl.constexpr):
    """One program goes three times over what rows drop, after the first time no wider than needed.

    Of the entries that held a block the last one claims it, if none is left, and lists it as free.
    Counts of references are touched by atomic operations alone.
    """
    width = tl.full([], 0, tl.int32)  # entries of a row up to the last that holds a block
    for first in range(0, B * M, TILE):
        d = dropped(out, pages, first, B, M, M, blocks, RELEASE)
        tl.atomic_add(d.references, -1, mask=d.known, sem="relaxed")
        width = tl.maximum(width, tl.max(tl.where(d.block != -1, d.i % M + 1, 0)))
    tl.debug_barrier()  # all counts are down
    last = CLAIM + B * width - 1
    for first in range(0, B * width, TILE):
        d = dropped(out, pages, first, B, M, width, blocks, RELEASE)
        left = tl.atomic_add(d.references, 0, mask=d.known, sem="relaxed")
        free = d.known & ((left == 0) | (left <= last))
        tl.atomic_min(d.references, last - d.i, mask=free, sem="relaxed")
    count = tl.load(pages.available)
    tl.debug_barrier()  # all claims are made
    for first in range(0, B * width, TILE):
        d = dropped(out, pages, first, B, M, width, blocks, RELEASE)
        claim = tl.atomic_add(d.references, 0, mask=d.known, sem="relaxed")
        free = d.known & (claim == last - d.i)
        place = count + tl.cumsum(free.to(tl.int32)) - 1
        count += tl.sum(free.to(tl.int32))
        tl.store(pages.free + place, d.block, mask=free & (place < blocks))
        tl.atomic_xchg(d.references, 0, mask=free, sem="relaxed")
        tl.store(d.at, -1, mask=d.inside)
    tl.store(pages.available, count)


@triton.jit
def dropped(out, pages, first, B, M, width, blocks, RELEASE: tl.constexpr):
    """Entries from `first` on, row after row, where each row has `width` of them."""
    i = first + tl.arange(0, TILE)
    b = i // width
    held = tl.load(out.lengths + b, mask=b < B, other=0)
    if RELEASE:
        held = tl.where(tl.load(out.finished + b, mask=b < B, other=0), 0, held)
    column = (held + pages.block_size - 1) // pages.block_size + i % width
    at = pages.tables + b * M + column
    inside = (b < B) & (column < M)
    block = tl.load(at, mask=inside, other=-1)
    known = (block >= 0) & (block < blocks)
    return Dropped(i, at, inside, block, known, pages.references + block)
