"""Attention for few queries a row, over a cache where it lies."""

from __future__ import annotations

import torch
from torch import Tensor

import specdiff_kernels._C as _C

from ..arguments import address
from ..fields import DTYPES
from ..inputs import CachedAttentionInputs


def cached_attention(inputs: CachedAttentionInputs, *, out: Tensor) -> None:
    query, keys, values, lengths, tables, first, parents, sinks, scale, window, softcap = inputs
    if tables is None:
        columns = blocks = block_size = 0
        _, H, slots, _ = keys.shape
        order = (0, 1, 2)
    else:
        columns = tables.shape[1]
        blocks, block_size, H, _ = keys.shape
        slots = columns * block_size
        order = (0, 2, 1)  # row, head, position
    B, Q, heads, D = query.shape
    numbers = [
        query.data_ptr(), B, Q, heads, H, D, *query.stride()[:3],
        keys.data_ptr(), values.data_ptr(), DTYPES[keys.dtype],
        *map(keys.stride, order), *map(values.stride, order),
        slots, address(tables), columns, block_size, blocks,
        lengths.data_ptr(), address(first), address(parents), address(sinks), window,
        out.data_ptr(),
    ]  # fmt: skip
    _C.cached_attention(numbers, scale, softcap, torch.get_num_threads())
