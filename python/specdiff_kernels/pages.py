"""Pages: which blocks of a paged cache each sequence holds, kept on the device."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from .checks import INT64, as_device, check_tensor, integer, readable
from .fields import I32, SIZE, describe


class Pages(NamedTuple):
    """Block tables, reference counts and the stack of free blocks; updated in place.

    A block holds `block_size` consecutive positions of a sequence, in every layer. Position t of
    sequence b lies in block `tables[b, t // block_size]`, at t % block_size. `reserve` takes
    blocks from the stack, `specdiff_kernels.commit` gives back what a rollback leaves unused;
    neither waits for the device.

    A sequence may write only to blocks that it holds alone.
    """

    tables: Annotated[Tensor, I32("B M", sized=True, written=True)]  # -1: no block
    # table entries that hold each block
    references: Annotated[Tensor, I32("N", sized=True, written=True)]
    # the first `available` of them are blocks that nobody holds
    free: Annotated[Tensor, I32("N", written=True)]
    available: Annotated[Tensor, I32("1", written=True)]
    block_size: Annotated[int, SIZE]

    @classmethod
    def empty(
        cls,
        batch: int,
        columns: int,
        blocks: int,
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> Pages:
        """Pages of which no block is held.

        Args:
            batch: B, sequences.
            columns: M, most blocks that a sequence can hold.
            blocks: N, blocks in the cache.
            block_size: positions in a block.

        Raises:
            ValueError: a size that is no integer of at least 1.

        Example:
            >>> Pages.empty(2, 4, 6, block_size=16).available.tolist()
            [6]
        """
        sizes = {"batch": batch, "columns": columns, "blocks": blocks, "block_size": block_size}
        for name, size in sizes.items():
            integer(name, size, low=1)
        ids = torch.arange(blocks, dtype=torch.int32, device=as_device(device))
        return cls(
            tables=ids.new_full((batch, columns), -1),
            references=torch.zeros_like(ids),
            free=ids.flip(0),  # block 0 is taken first
            available=ids.new_full((1,), blocks),
            block_size=block_size,
        )

    def reserve(self, lengths: Tensor) -> Tensor:
        """Let each sequence hold blocks for its first `lengths[b]` positions.

        Blocks are taken from the top of the stack, for sequence after sequence. Those that
        a sequence has already stay; nothing is given back.

        Args:
            lengths: i64 [B].

        Returns:
            i64 [], the number of blocks that were missing: the stack had too few, or a sequence
            wants more than the M that its table can hold. Check it where you synchronise: if it is
            not 0, the sequences hold the blocks that there were, and some position has none. To be
            sure beforehand, admit a sequence only while all could reach their limits.

        Raises:
            ValueError, TypeError: lengths of another shape, dtype or device.

        Example:
            >>> pages = Pages.empty(2, 4, 6, block_size=16)
            >>> pages.reserve(torch.tensor([17, 3])), pages.tables[:, :2].tolist()
            (tensor(0), [[0, 1], [2, -1]])
        """
        tables, references, free, available, block_size = self
        B, M = tables.shape
        check_tensor("lengths", lengths, (B,), ("B",), INT64, tables.device)
        wanted = blocks_of(lengths, block_size)
        column = torch.arange(M, device=tables.device)
        missing = (column < wanted[:, None]) & (tables < 0)
        place = available - missing.flatten().cumsum(0).view_as(missing)  # from the top down
        found = missing & (place >= 0)
        block = free[torch.where(found, place, 0)]
        tables.copy_(torch.where(found, block, tables))
        taken = torch.where(found, block, len(references)).flatten()
        held = extended(references).index_add(0, taken, torch.ones_like(taken))
        references.copy_(held[:-1])
        available.sub_(found.sum())
        return (missing & ~found).sum() + (wanted - M).clamp(min=0).sum()

    def share(self, source: int, to: int, positions: int) -> int:
        """Let sequence `to`, which holds nothing, hold the first blocks of `source` as well.

        Args:
            source: a sequence that holds blocks for all of the prefix, and another than `to`.
            positions: of the common prefix that `to` will not write again: at most its prompt but
                the last token, if a round writes that one. Only whole blocks of it are shared.

        Returns:
            the number of positions shared; the rest of the prefix has to be written again.

        Raises:
            ValueError: a number out of range, or (where tables can be looked at, on a CPU) blocks
                that `source` does not hold, or a `to` that holds some.

        Example:
            >>> pages = Pages.empty(2, 4, 6, block_size=16)
            >>> _ = pages.reserve(torch.tensor([20, 0]))
            >>> pages.share(0, 1, 20), pages.tables[1].tolist(), pages.references[:2].tolist()
            (16, [0, -1, -1, -1], [2, 1])
        """
        B, M = self.tables.shape
        source, to = integer("source", source, high=B - 1), integer("to", to, high=B - 1)
        whole = integer("positions", positions, high=M * self.block_size) // self.block_size
        if whole == 0:
            return 0
        blocks = self.tables[source, :whole]
        check_share(self.tables, source, to, blocks)
        self.tables[to, :whole] = blocks
        self.references.index_add_(0, blocks.long(), torch.ones_like(blocks))
        return whole * self.block_size


def check_share(tables: Tensor, source: int, to: int, blocks: Tensor) -> None:
    """Raise unless `source` holds all of the blocks and `to` none, where that can be looked at."""
    if source == to:
        raise ValueError(f"to: expected another sequence than source, got {to} for both")
    if not readable(tables):
        return
    if missing := int((blocks < 0).sum()):
        raise ValueError(
            f"source: expected a sequence that holds the first {len(blocks)} blocks, got {source}, "
            f"which lacks {missing} of them; reserve and write them first"
        )
    if held := int((tables[to] >= 0).sum()):
        raise ValueError(
            f"to: expected a sequence that holds no block, got {to}, which holds {held}; commit "
            "with finished[to] and release=True gives them back"
        )


def blocks_of(lengths: Tensor, block_size: int) -> Tensor:
    """How many blocks hold so many positions."""
    return (lengths + block_size - 1) // block_size


def extended(x: Tensor) -> Tensor:
    """With one entry more, for what belongs to no block."""
    return torch.nn.functional.pad(x, (0, 1))


describe(
    Pages,
    tables="i32 [B, M], the blocks of each sequence; -1: no block",
    references="i32 [N], how many table entries hold each block",
    free="i32 [N], a stack: the first `available` entries are blocks that nobody holds",
    available="i32 [1], free blocks",
    block_size="int, positions in a block",
)
