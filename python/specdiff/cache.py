"""RowCache: a key/value cache in which every batch row has its own length.

Keys and values are written in place at each row's own positions and never copied; rolling back a
rejected draft means setting `lengths`, since entries beyond a row's length are masked.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin


@dataclass
class Window:
    """Where the next forward writes and what it reads; shared by all layers."""

    lengths: Tensor  # i64 [B], valid entries of each row
    longest: int  # max of lengths, kept on the host
    slots: Tensor  # i64 [B, Q], where the Q new entries of each row go
    start: int | None = None  # first slot, if it is the same in all rows
    span: int = 0  # entries that attention reads: [0, span)


class RowLayer(CacheLayerMixin):
    """Keys and values [B, H, capacity + 1, D] of one layer; the extra slot takes the padding."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, capacity: int, window: Window) -> None:
        super().__init__()
        self.capacity = capacity
        self.window = window

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        B, H, _, _ = key_states.shape
        # zeros: attention multiplies masked entries by 0, which does not silence a NaN
        self.keys = key_states.new_zeros(B, H, self.capacity + 1, key_states.shape[-1])
        self.values = value_states.new_zeros(B, H, self.capacity + 1, value_states.shape[-1])
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [B, H, Q, D] in place; return views [B, H, span, D] of all that may be read."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self._write(self.keys, key_states)
        self._write(self.values, value_states)
        span = self.window.span
        return self.keys[:, :, :span], self.values[:, :, :span]

    def _write(self, store: Tensor, new: Tensor) -> None:
        start = self.window.start
        if start is not None:
            store[:, :, start : start + new.shape[2]].copy_(new)
        else:
            store.scatter_(2, self.window.slots[:, None, :, None].expand_as(new), new)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.window.span, 0

    def get_seq_length(self) -> int:
        return self.window.longest

    def get_max_length(self) -> int:
        return self.capacity


class RowCache(Cache):
    """Preallocated cache of `batch` rows with up to `capacity` tokens each.

    A forward over [B, Q] new tokens is: `prepare(Q)`, the model, `set_lengths(...)`. Whatever lies
    at or beyond a row's length is stale and must be masked: key j is visible to query i of row b
    iff j <= lengths[b] + i, which is what `Target` passes to the model.

    Args:
        layers: number of attention layers.
        batch: B.
        capacity: tokens per row. Padded queries beyond it are written to one spare slot.
        device: of the model. Dtype and head shape are taken from the first states written.

    Attributes:
        lengths: i64 [B], valid entries per row.
        longest: their maximum, known without asking the device.
    """

    def __init__(self, layers: int, batch: int, capacity: int, device: torch.device | str) -> None:
        zeros = torch.zeros(batch, dtype=torch.int64, device=device)
        self.capacity = capacity
        self.window = Window(lengths=zeros, longest=0, slots=zeros[:, None])
        super().__init__(layers=[RowLayer(capacity, self.window) for _ in range(layers)])

    @property
    def lengths(self) -> Tensor:
        return self.window.lengths

    @property
    def longest(self) -> int:
        return self.window.longest

    def set_lengths(self, lengths: Tensor, longest: int) -> None:
        """Extend or roll back each row. lengths: i64 [B]; longest: their maximum."""
        self.window.lengths = lengths
        self.window.longest = longest

    def prepare(self, queries: int, start: int | None = None) -> tuple[Tensor, int]:
        """Say that the next forward brings Q tokens per row.

        Args:
            queries: Q.
            start: the first position, if it is one and the same for all rows (always so for B = 1).

        Returns:
            positions i64 [B, Q] of the new tokens (not clamped), and the span of keys to be read.
        """
        window = self.window
        if len(window.lengths) == 1:
            start = window.longest
        positions = window.lengths[:, None] + torch.arange(queries, device=window.lengths.device)
        window.slots = positions.clamp(max=self.capacity)
        window.start = start if start is not None and start + queries <= self.capacity else None
        window.span = min(window.longest + queries, self.capacity + 1)
        return positions, window.span
