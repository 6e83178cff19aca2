"""Attention over a cache, each query by itself."""

from __future__ import annotations

import torch
from torch import Tensor

from ..inputs import CachedAttentionInputs


def cached_attention(inputs: CachedAttentionInputs, *, out: Tensor) -> None:
    """Query after query and head after head, over copies of the entries that each sees, in the
    order of their positions: none can depend on anything else."""
    query, _, _, lengths, _, first, parents, sinks, _, window, _ = inputs
    B, Q, heads, _ = query.shape
    for b in range(B):
        length = max(0, int(lengths[b]))
        paths: list[list[int]] = []  # of each query: its ancestors, the eldest first, and itself
        for i in range(Q):
            parent = i - 1 if parents is None else int(parents[b, i])
            paths.append([*(paths[parent] if 0 <= parent < i else ()), i])
            position = length + len(paths[i]) - 1
            oldest = 0 if first is None else max(0, int(first[b]))
            if window > 0:
                oldest = max(oldest, position - window + 1)
            keys, values = seen(inputs, b, oldest, length, paths[i][max(0, oldest - length) :])
            for head in range(heads):
                h = head // (heads // keys.shape[0])
                sink = None if sinks is None else sinks[head]
                out[b, i, head] = attend(query[b, i, head], keys[h], values[h], sink, inputs)


def seen(
    inputs: CachedAttentionInputs, b: int, oldest: int, length: int, path: list[int]
) -> tuple[Tensor, Tensor]:
    """Keys and values f32 [H, n, D] of row b in the slots from `oldest` to `length`, and of the
    queries of a path, as far as they exist."""
    keys, values, tables = inputs.keys, inputs.values, inputs.tables
    if tables is None:
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)  # [B, S, H, D]
        size, table = keys.shape[1], [b]
        blocks = range(keys.shape[0])
    else:
        size, table = keys.shape[1], tables[b].tolist()
        blocks = range(keys.shape[0])
    end = size * len(table)
    slots = [*range(oldest, min(length, end)), *(length + i for i in path if length + i < end)]
    places = [(table[slot // size], slot % size) for slot in slots]
    places = [place for place in places if place[0] in blocks]
    block, offset = torch.tensor(places, dtype=torch.int64, device=keys.device).view(-1, 2).T
    k, v = (cache[block, offset].transpose(0, 1).float() for cache in (keys, values))
    return k, v


def attend(
    query: Tensor, keys: Tensor, values: Tensor, sink: Tensor | None, inputs: CachedAttentionInputs
) -> Tensor:
    """One query of one head: [D], [n, D], [n, D] -> [D]"""
    scores = inputs.scale * (keys.contiguous() @ query.clone())
    if inputs.softcap > 0:
        scores = inputs.softcap * torch.tanh(scores / inputs.softcap)
    if sink is not None:
        scores = torch.cat([scores, sink[None]])
    return scores.softmax(0)[: len(values)] @ values.contiguous()
