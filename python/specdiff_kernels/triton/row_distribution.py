"""Row distribution: logits -> max, scale, threshold, total, status."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..inputs import RowDistributionInputs
from ..types import RowDistribution
from .arguments import ARRIVED, Logits, Split, launch, scratch
from .row import (
    OK,
    area_of,
    arrives_last,
    begin_distribution,
    end_distribution,
    store_tile_max,
    store_tile_sums,
    write_distribution,
)


def row_distribution(
    inputs: RowDistributionInputs, *, out: RowDistribution, workspace: Tensor | None = None
) -> None:
    logits, sampling = inputs
    (N, V), device, rows = logits.shape, logits.device, Logits.of(logits)
    workspace = scratch(workspace, N, V, device)
    split = Split.of(V, whole=sampling.selects)
    launch(maxima, N * split.tiles, device, rows, workspace, TILE=split.tile)
    launch(sums, N * split.parts, device, rows, sampling, out, workspace, split.parts,
           maxnreg=split.maxnreg, **split.constants)  # fmt: skip


@triton.jit
def maxima(logits, workspace, TILE: tl.constexpr):
    tiles = tl.cdiv(logits.V, TILE)
    row, tile = tl.program_id(0).to(tl.int64) // tiles, tl.program_id(0) % tiles
    area = area_of(workspace, row, tiles)
    if tile == 0:
        tl.store(area + ARRIVED, 0)
    store_tile_max(area, logits.data + row * logits.row_stride, logits.V, tile, TILE)


@triton.jit(do_not_specialize=["parts"])
def sums(logits, parameters, out, workspace, parts, TILE: tl.constexpr, TILES: tl.constexpr):
    tiles = tl.cdiv(logits.V, TILE)
    index, part = tl.program_id(0).to(tl.int64) // parts, tl.program_id(0) % parts
    area, row = area_of(workspace, index, tiles), logits.data + index * logits.row_stride
    distribution = begin_distribution(area, row, logits.V, parameters, index, tiles, TILE, TILES)
    if distribution.status == OK:
        first, last = part * tiles // parts, (part + 1) * tiles // parts
        store_tile_sums(area, row, logits.V, distribution, parameters, first, last, tiles, TILE)
    if arrives_last(area + ARRIVED, parts):
        write_distribution(out, index, end_distribution(area, distribution, tiles, TILE, TILES))
