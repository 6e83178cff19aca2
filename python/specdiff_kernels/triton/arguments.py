"""Arguments of Triton kernels: tensors in groups, as in the ops, and the places in scratch memory.

A row of logits has an area of int64 words in the workspace: a header, then for each tile its
largest logit, its sum of weights and two words more, then the bins of `select`. A sequence keeps
its own words in the area of its first row.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .. import arguments
from ..types import Draft

TILE = 4096  # columns that a program holds at once
BINS = tl.constexpr(512)
TILE_ARRAYS = tl.constexpr(4)

# words of an area's header
ARRIVED = tl.constexpr(0)  # programs that are done with the row
MAX = tl.constexpr(1)  # to 5: its distribution
SCALE = tl.constexpr(2)
THRESHOLD = tl.constexpr(3)
TOTAL = tl.constexpr(4)
STATUS = tl.constexpr(5)
TOKEN = tl.constexpr(6)  # drawn from it
# of verify
RECORDED = tl.constexpr(7)
TARGET_CHANCE = tl.constexpr(8)  # p(x), q(x) of the block rule, f64
DRAFT_CHANCE = tl.constexpr(9)
PREFIX_CHANCE = tl.constexpr(10)  # P_i, f64
EXCESS = tl.constexpr(11)  # 2^60 S_i, or 2^60 times the bias of the lenient rule
# of denoise_step
RAW_TOTAL = tl.constexpr(7)  # of the model's own distribution
SPREAD = tl.constexpr(8)
RANK = tl.constexpr(9)  # f64
# of a sequence
STOP = tl.constexpr(12)  # no later row matters
SEQUENCE_ARRIVED = tl.constexpr(13)
SEQUENCE_STATUS = tl.constexpr(14)
SURE = tl.constexpr(15)  # tokens that the block rule accepts in any case
HEADER = tl.constexpr(16)


class Logits(NamedTuple):
    """Logits [B, rows, V] with contiguous columns; strides in elements."""

    data: Any
    batch_stride: Any
    row_stride: Any
    V: Any

    @classmethod
    def of(cls, logits: Tensor) -> Logits:
        """[N, V] or [B, N, V]"""
        batch_stride = logits.stride(0) if logits.ndim == 3 else 0
        return cls(logits, batch_stride, logits.stride(-2), logits.shape[-1])


class DraftArrays(NamedTuple):
    """A Draft as kernels read it."""

    tokens: Any  # [B, K], as tau and rows
    tau: Any
    rows: Any
    logits: Any  # Logits, or None: nothing is recorded
    distribution: Any  # RowDistribution of [R]
    draft_ids: Any
    lengths: Any

    @classmethod
    def of(cls, draft: Draft) -> DraftArrays:
        pool = draft.logits if draft.logits is not None and len(draft.logits) else None
        return cls(
            draft.tokens, draft.tau, draft.rows,
            None if pool is None else Logits.of(pool), None if pool is None else draft.distribution,
            draft.draft_ids, draft.lengths,
        )  # fmt: skip


class Split(NamedTuple):
    """How rows of V columns are divided: among tiles, and tiles among programs."""

    tile: int  # columns
    tiles: int
    parts: int  # programs of a row
    maxnreg: int  # registers of a thread; selecting makes kernels large

    @classmethod
    def of(cls, V: int, *, whole: bool = False) -> Split:
        """whole: one program a row, as selecting a threshold goes over it again and again."""
        tile = min(TILE, max(16, triton.next_power_of_2(V)))
        tiles = triton.cdiv(V, tile)
        return cls(tile, tiles, 1 if whole else tiles, 128 if whole else 80)

    @property
    def constants(self) -> dict[str, int]:
        return {"TILE": self.tile, "TILES": triton.next_power_of_2(self.tiles)}


def workspace_size(rows: int, V: int) -> int:
    """int64 words that an op over `rows` rows of V logits needs."""
    return rows * area_size(V)


def area_size(V: int) -> int:
    return HEADER.value + TILE_ARRAYS.value * Split.of(V).tiles + BINS.value


def scratch(workspace: Tensor | None, rows: int, V: int, device: torch.device) -> Tensor:
    """The workspace passed in, or a new one."""
    return arguments.scratch(workspace, workspace_size(rows, V), rows, V, device)


def launch(
    kernel: Any,
    programs: int,
    device: torch.device,
    *args: Any,
    num_warps: int = 8,
    maxnreg: int | None = None,
    **constants: Any,
) -> None:
    """Launch on the device's current stream, without contraction into fused multiply-adds.

    Large kernels state a limit of registers: without one ptxas spills a few of them to fit one
    program more onto a multiprocessor.
    """
    if programs == 0:
        return
    options = constants | {
        "num_warps": num_warps,
        "maxnreg": maxnreg,
        "enable_fp_fusion": False,
    }
    if device.type == "cuda" and device.index != torch.cuda.current_device():
        with torch.cuda.device(device):
            kernel[(programs,)](*args, **options)
    else:
        kernel[(programs,)](*args, **options)
