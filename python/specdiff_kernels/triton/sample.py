"""One token per row, by integer inverse CDF or by the race of exponential variates.

Two launches: sums of weights, or the winners of the race, of each tile; then the tokens.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..inputs import SampleInputs
from .arguments import Logits, Split, launch, scratch
from .numerics import random_word, weight
from .row import (
    OK,
    area_of,
    draw,
    end_race,
    load_tile,
    read_distribution,
    store_tile_races,
    tile_sums,
)


def sample(inputs: SampleInputs, *, out: Tensor, workspace: Tensor | None = None) -> None:
    logits, distribution, random, slot, purpose, draft_ids = inputs
    N, V = logits.shape
    rows, device, split = Logits.of(logits), logits.device, Split.of(V)
    workspace = scratch(workspace, N, V, device)
    launch(search, N * split.tiles, device, rows, distribution, random, draft_ids, workspace,
           RACE=random.position is not None, TILE=split.tile)  # fmt: skip
    launch(tokens, N, device, rows, distribution, random, slot, purpose, draft_ids, workspace, out,
           RACE=random.position is not None, **split.constants)  # fmt: skip


@triton.jit
def search(
    logits, distribution, random, draft_ids, workspace, RACE: tl.constexpr, TILE: tl.constexpr
):
    tiles = tl.cdiv(logits.V, TILE)
    index, tile = tl.program_id(0).to(tl.int64) // tiles, tl.program_id(0) % tiles
    area, row = area_of(workspace, index, tiles), logits.data + index * logits.row_stride
    distribution = read_distribution(distribution, index)
    if distribution.status == OK:
        if not RACE:
            columns, l = load_tile(row, logits.V, tile, TILE)
            tl.store(tile_sums(area, tiles) + tile, tl.sum(weight(l, columns, distribution)))
        elif random.words is not None:
            words = random.words + index * logits.V
            store_tile_races(area, row, logits.V, distribution, None, words, None, None, tile,
                             tile + 1, tiles, TILE)  # fmt: skip
        else:
            seed, position = tl.load(random.seed + index), tl.load(random.position + index)
            store_tile_races(area, row, logits.V, distribution, draft_ids, None, seed, position,
                             tile, tile + 1, tiles, TILE)  # fmt: skip


@triton.jit(do_not_specialize=["purpose"])
def tokens(
    logits, distribution, random, slot, purpose, draft_ids, workspace, out,
    RACE: tl.constexpr, TILE: tl.constexpr, TILES: tl.constexpr,
):  # fmt: skip
    tiles = tl.cdiv(logits.V, TILE)
    index = tl.program_id(0).to(tl.int64)
    area, row = area_of(workspace, index, tiles), logits.data + index * logits.row_stride
    distribution = read_distribution(distribution, index)
    token = tl.full([], -1, tl.int64)
    if distribution.status == OK:
        if RACE:
            column = end_race(area, tiles, TILES)
        else:
            if random.words is not None:
                word = tl.load(random.words + index)
            else:
                seed, round = tl.load(random.seed + index), tl.load(random.round + index)
                word = random_word(seed, tl.load(slot + index), round, purpose, 0)
            column = draw(area, row, logits.V, distribution, word, tiles, TILE, TILES)
        token = tl.minimum(column, logits.V - 1)  # only if the distribution is not this row's
        if draft_ids is not None:
            token = tl.load(draft_ids + token)
    tl.store(out + index, token)
