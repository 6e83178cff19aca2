"""RowCache and PagedRowCache: key/value caches in which every batch row has its own length.

Keys and values are written in place at each row's own positions; rolling back a rejected draft
means setting `lengths`, since entries beyond a row's length are masked. A RowCache sets aside a
row's whole capacity; a PagedRowCache takes blocks from a pool as a row grows, and gives them back.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from copy import copy
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin

from specdiff_kernels import Pages

from .memory import Store
from .trees import depths_of


@dataclass
class Window:
    """Where the next forward writes and what it reads; shared by all layers."""

    lengths: Tensor  # i64 [B], valid entries of each row
    positions: Tensor  # i64 [B, Q], of the new tokens in their texts
    slots: Tensor  # i64 [B, Q], where their entries go
    parents: Tensor | None = None  # i64 [B, Q], of a tree: the new token that each is behind
    longest: int = 0  # at least the maximum of lengths, known to the host
    room: Tensor | None = None  # i64 [B], positions that a row may take; behind it is padding
    start: int | None = None  # first slot, if it is the same in all rows
    span: int = 0  # entries of a row that attention reads: [0, span)
    tables: Tensor | None = None  # i32 [B, M], blocks of a paged cache up to the span
    gathers: bool = True  # whether a paged cache's layers return rows, or their pool as it is
    exact: bool = True  # whether `longest` is the maximum, not a bound
    cached: dict[Any, Any] = field(default_factory=dict)  # by attention functions, for one forward

    @classmethod
    def empty(cls, batch: int, device: torch.device | str) -> Window:
        zeros = torch.zeros(batch, dtype=torch.int64, device=device)
        return cls(zeros, zeros[:, None], zeros[:, None])


class Entries(NamedTuple):
    """Where a layer's keys and values lie, and where those of new tokens go."""

    slots: Tensor  # i64 [B, Q], of the new tokens; for a pool, counted through it
    keys: Tensor  # [B, H, S, D], or a pool [blocks, block_size, H, D]
    values: Tensor
    tables: Tensor | None  # i32 [B, M], blocks of a pool that rows hold
    lengths: Tensor  # i64 [B], entries before the new tokens
    limits: Tensor | None  # i64 [B, Q], end of what each new token sees; None: its own entry
    parents: Tensor | None = None  # i64 [B, Q], of a tree: the new token that each is behind


class OpenCache(ABC):
    """A cache that native layers write to and read where it lies."""

    @abstractmethod
    def entries(self, layer: int, x: Tensor, heads: int, size: int) -> Entries | None:
        """Those of a layer, for new tokens x [B, Q, d] with heads [heads, size]; None if the next
        forward was to bring other tokens."""


class RowLayer(CacheLayerMixin):
    """Keys and values [B, H, capacity + 1, D] of one layer; the extra slot takes the padding."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, shape: tuple[int, int], window: Window, store: Store) -> None:
        """shape: rows and slots, or blocks and positions in a block"""
        super().__init__()
        self.shape = shape
        self.window = window
        self.store = store
        self.whole = self
        self.rows = slice(None)

    def part(self, rows: slice, window: Window) -> RowLayer:
        """The same memory, for some of the rows."""
        part = type(self)(self.shape, window, self.store)
        part.whole, part.rows = self.whole, rows
        return part

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys, self.values = self._allocate(key_states), self._allocate(value_states)
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write [B, H, Q, D] in place; return [B, H, span, D], all that may be read."""
        whole = self.whole
        if not whole.is_initialized:
            whole.lazy_initialization(key_states, value_states)
        return self._write(whole.keys, key_states), self._write(whole.values, value_states)

    def _allocate(self, states: Tensor) -> Tensor:
        rows, slots = self.shape
        return self._zeros((rows, states.shape[1], slots, states.shape[-1]), states)

    def _zeros(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        # attention multiplies masked entries by 0, which does not silence a NaN
        if like.is_cpu:
            return self.store.take(shape, like.dtype).zero_()
        return like.new_zeros(shape)

    def _write(self, store: Tensor, new: Tensor) -> Tensor:
        store, window = store[self.rows], self.window
        if window.start is not None:
            store[:, :, window.start : window.start + new.shape[2]].copy_(new)
        else:
            store.scatter_(2, window.slots[:, None, :, None].expand_as(new), new)
        return store[:, :, : window.span]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.window.span, 0

    def get_seq_length(self) -> int:
        return self.window.longest

    def get_max_length(self) -> int:
        return self.shape[1]


class PagedRowLayer(RowLayer):
    """Keys and values [blocks + 1, block_size, H, D]; the extra block takes the padding."""

    def _allocate(self, states: Tensor) -> Tensor:
        return self._zeros((*self.shape, states.shape[1], states.shape[-1]), states)

    def _write(self, store: Tensor, new: Tensor) -> Tensor:
        """The rows' entries are copied to lie together, unless attention reads the pool itself."""
        window, slots = self.window, store.flatten(0, 1)  # [slots, H, D]
        slots.index_copy_(0, window.slots.flatten(), new.transpose(1, 2).flatten(0, 1))
        if not window.gathers or window.tables is None:
            return store
        return store[window.tables].flatten(1, 2)[:, : window.span].transpose(1, 2)


class RowCache(Cache, OpenCache):
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
        longest: at least their maximum, known without asking the device.
        pages: of a PagedRowCache, what `specdiff_kernels.commit` rolls back; else None.

    Example:
        >>> cache = RowCache(layers=2, batch=4, capacity=128, device="cpu")
        >>> positions, span = cache.prepare(queries=5)
    """

    pages: Pages | None = None

    def __init__(self, layers: int, batch: int, capacity: int, device: torch.device | str) -> None:
        self.capacity = capacity
        self.window = Window.empty(batch, device)
        store = Store()
        super().__init__(
            layers=[RowLayer((batch, capacity + 1), self.window, store) for _ in range(layers)]
        )

    @property
    def lengths(self) -> Tensor:
        return self.window.lengths

    @property
    def longest(self) -> int:
        return self.window.longest

    def set_lengths(
        self, lengths: Tensor, longest: int, *, room: Tensor | None = None, exact: bool = True
    ) -> None:
        """Extend or roll back each row.

        Args:
            lengths: i64 [B].
            longest: their maximum, or more.
            room: i64 [B], positions that a row may take; entries behind them are padding, and need
                no memory where it is taken as rows grow. None: as many as come.
            exact: whether `longest` is the maximum.
        """
        window = self.window
        window.lengths, window.longest = lengths, longest
        window.room, window.exact = room, exact

    def prepare(
        self, queries: int, start: int | None = None, parents: Tensor | None = None
    ) -> tuple[Tensor, int]:
        """Say that the next forward brings Q tokens per row.

        Args:
            queries: Q.
            start: the first position, if it is one and the same for all rows (always so for B = 1).
            parents: i64 [B, Q], of a tree, see `Target.forward`. Entry lengths[b] + q is token q's
                all the same.

        Returns:
            positions i64 [B, Q] of the new tokens (not clamped), and the span of keys to be read.
        """
        window = self.window
        places = window.lengths[:, None] + torch.arange(queries, device=window.lengths.device)
        window.parents = parents
        window.positions = places
        if parents is not None:
            window.positions = window.lengths[:, None] + depths_of(parents)
        window.span = min(window.longest + queries, self.slots)
        window.cached.clear()
        self._place(places, start)
        return window.positions, window.span

    def entries(self, layer: int, x: Tensor, heads: int, size: int) -> Entries | None:
        (B, Q, _), window = x.shape, self.window
        if window.positions.shape != (B, Q):
            return None
        part: Any = self.layers[layer]
        whole = part.whole
        if not whole.is_initialized:
            states = x.new_empty(B, heads, Q, size)
            whole.lazy_initialization(states, states)
        keys, values = whole.keys, whole.values
        if part is not whole and window.tables is None:
            keys, values = keys[part.rows], values[part.rows]
        return Entries(
            window.slots, keys, values, window.tables, window.lengths, None, window.parents
        )

    def stores(self) -> list[Tensor]:
        """Keys and values of all layers, as `specdiff_kernels.commit` moves entries of a tree."""
        layers: Any = self.layers
        used = [layer.whole for layer in layers if layer.whole.is_initialized]
        found = [x for layer in used for x in (layer.keys, layer.values)]
        return found if self.pages is None else [x[: len(self.pages.references)] for x in found]

    @property
    def slots(self) -> int:
        """Most entries of a row that attention can read."""
        return self.capacity + 1

    def _place(self, places: Tensor, start: int | None) -> None:
        """Where the new tokens' entries go: numbers [B, Q] of entries of their rows."""
        window = self.window
        queries = places.shape[1]
        if len(window.lengths) == 1 and window.exact:
            start = window.longest
        window.slots = places.clamp(max=self.capacity)
        window.start = start if start is not None and start + queries <= self.capacity else None

    def part(self, rows: slice) -> Any:
        """A cache of some of the rows, in the same memory and with empty lengths."""
        part = copy(self)
        part.window = Window.empty(len(self.lengths[rows]), self.lengths.device)
        part.window.gathers = self.window.gathers
        layers: list[Any] = self.layers
        part.layers = [layer.part(rows, part.window) for layer in layers]
        if self.pages is not None:
            part.pages = self.pages._replace(tables=self.pages.tables[rows])
        return part


class PagedRowCache(RowCache):
    """A cache whose rows take blocks of `block_size` positions from a pool that they share.

    Args:
        layers, batch, device: as of `RowCache`.
        capacity: most tokens of a row.
        block_size: positions in a block. (flash-attn 2 wants a multiple of 256.)
        blocks: in the pool; None: enough for all rows at their capacity.

    Attributes:
        pages: block tables, reference counts and free blocks.

    Raises:
        RuntimeError: in `prepare` on a CPU, and in `check` anywhere: the pool was too small.

    Example:
        >>> cache = PagedRowCache(layers=2, batch=64, capacity=4096, device="cpu", blocks=2048)
    """

    pages: Pages

    def __init__(
        self,
        layers: int,
        batch: int,
        capacity: int,
        device: torch.device | str,
        *,
        block_size: int = 16,
        blocks: int | None = None,
    ) -> None:
        columns = -(-capacity // block_size)
        blocks = batch * columns if blocks is None else blocks
        self.pages = Pages.empty(batch, columns, blocks, block_size, device)
        self.missing = torch.zeros((), dtype=torch.int64, device=device)
        self.capacity = capacity
        self.window = Window.empty(batch, device)
        shape, store = (blocks + 1, block_size), Store()
        Cache.__init__(
            self, layers=[PagedRowLayer(shape, self.window, store) for _ in range(layers)]
        )

    @property
    def slots(self) -> int:
        return self.pages.tables.shape[1] * self.pages.block_size

    def check(self) -> None:
        """Raise RuntimeError if blocks were missing since the cache was made. Synchronises."""
        if missing := int(self.missing):
            raise RuntimeError(
                f"the cache's pool of {len(self.pages.references)} blocks was {missing} blocks too "
                "small: give it more blocks, or admit fewer rows at a time"
            )

    def _place(self, places: Tensor, start: int | None) -> None:
        window, pages = self.window, self.pages
        queries, size = places.shape[1], pages.block_size
        wanted = (window.lengths + queries).clamp(max=self.capacity)
        if window.room is not None:
            wanted = torch.minimum(wanted, window.room)
        self.missing += pages.reserve(wanted)
        if self.missing.device.type == "cpu":
            self.check()
        nobody = len(pages.references)
        held = torch.where(pages.tables < 0, nobody, pages.tables)  # [B, M]
        column = places // size
        known = column < held.shape[1]
        block = held.gather(1, torch.where(known, column, 0)).where(known, nobody)
        window.slots = block * size + places % size
        window.tables = held[:, : -(-window.span // size)]
