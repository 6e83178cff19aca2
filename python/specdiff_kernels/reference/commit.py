"""`commit`: new lengths, blocks given back, a tree's path made contiguous."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..inputs import CommitInputs
from ..pages import Pages, blocks_of, extended
from ..types import Committed


def commit(inputs: CommitInputs, *, out: Committed) -> None:
    """[B] lengths and [B, N] emitted tokens -> Committed."""
    emitted, lengths, stop_tokens, limit, finished, pages, release, path, caches = inputs
    N = emitted.shape[1]
    column = torch.arange(N, device=emitted.device)
    kept = (emitted >= 0).long().cumprod(-1).sum(-1)  # tokens before the padding
    done = torch.zeros_like(kept, dtype=torch.bool) if finished is None else finished
    kept = torch.where(done, 0, kept)
    if limit is not None:
        kept = torch.minimum(kept, (limit - lengths).clamp(min=0))
    if stop_tokens is not None:
        stops = (emitted[:, :, None] == stop_tokens).any(-1) & (column < kept[:, None])
        first = (~stops).long().cumprod(-1).sum(-1)  # tokens before a stop token, N without one
        kept = torch.minimum(kept, first + 1)
        done = done | (first < N)
    if limit is not None:
        done = done | (lengths + kept >= limit)
    end = torch.nn.functional.pad(emitted, (1, 0), value=-1)  # one behind: none before the first
    last = end.gather(1, kept[:, None])[:, 0]
    if path is not None:
        move(lengths, kept, path, pages, caches)
    if pages is not None:
        held = torch.where(done, 0, lengths + kept) if release else lengths + kept
        give_back(held, pages)
    out.lengths.copy_(lengths + kept)
    out.kept.copy_(kept)
    out.finished.copy_(done)
    out.last.copy_(last)


def give_back(held: Tensor, pages: Pages) -> None:
    """Drop the blocks behind the first held[b] positions; free those that nobody holds then."""
    tables, references, free, available, block_size = pages
    N, entries = len(references), tables.numel()
    column = torch.arange(tables.shape[1], device=tables.device)
    dropped = column >= blocks_of(held, block_size)[:, None]  # [B, M]
    block = torch.where(dropped & (tables >= 0) & (tables < N), tables, N).long()
    order = torch.arange(entries, device=tables.device).view_as(tables)

    left = extended(references).index_add(0, block.flatten(), -torch.ones_like(tables.flatten()))
    last = order.new_full((N + 1,), -1).scatter_reduce(0, block.flatten(), order.flatten(), "amax")
    freed = (block < N) & (left[block] == 0) & (last[block] == order)
    place = available + freed.flatten().cumsum(0).view_as(freed) - 1
    place = torch.where(freed & (place < N), place, N)

    free.copy_(extended(free).scatter(0, place.flatten(), block.flatten().int())[:N])
    available.add_(freed.sum())
    references.copy_(left[:N])
    tables.masked_fill_(dropped, -1)


def move(
    lengths: Tensor, kept: Tensor, path: Tensor, pages: Pages | None, caches: Sequence[Tensor]
) -> None:
    """Entry lengths[b] + i of each cache becomes entry lengths[b] + path[b, i], for i < kept[b]."""
    i = torch.arange(path.shape[1], device=path.device)
    for cache in caches:
        cache = cache if pages is not None else cache.transpose(1, 2)  # [outer, positions, H, D]
        slots = cache.shape[0] * cache.shape[1]
        source = slot_of(lengths[:, None] + path, cache, pages)
        target = slot_of(lengths[:, None] + i, cache, pages)
        moves = (i < kept[:, None]) & (source < slots) & (target < slots)
        origin = torch.arange(slots + 1, device=path.device)
        target = torch.where(moves, target, slots)
        origin = origin.scatter(0, target.flatten(), source.flatten())[:slots]
        entries = cache[..., None].view(torch.uint8)  # [outer, positions, H, D, bytes]
        entries.copy_(entries.flatten(0, 1)[origin].view_as(entries))


def slot_of(position: Tensor, cache: Tensor, pages: Pages | None) -> Tensor:
    """Where [B, N] positions lie in [outer * positions]; one slot too many stands for nowhere."""
    outer, positions = cache.shape[:2]
    nowhere = outer * positions
    if pages is None:
        row = torch.arange(len(position), device=position.device)[:, None]
        return torch.where(inside(position, positions), row * positions + position, nowhere)
    column = position // positions
    known = inside(column, pages.tables.shape[1])
    block = pages.tables.long().gather(1, torch.where(known, column, 0))
    slot = block * positions + position % positions
    return torch.where(known & inside(block, outer), slot, nowhere)


def inside(x: Tensor, size: int) -> Tensor:
    return (x >= 0) & (x < size)
