"""What kernels are given: a workspace; and native code addresses and sizes, one after another."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .fields import DTYPES, LOGITS_WIDTH, layout_of
from .inputs import CommitInputs
from .pages import Pages
from .types import Committed

ABSENT = [(0,) * width for width in range(LOGITS_WIDTH + 1)]


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def pack(*records: Any) -> list[int]:
    """What `Arguments` of csrc/bindings/arguments.h reads: for each field of the records in order
    an address, 0 for none; a number; or what logits and sized tensors consist of."""
    packed: list[int] = []
    for record in records:
        if isinstance(record, Tensor):
            packed.append(record.data_ptr())
            continue
        layout = layout_of(type(record))
        for (_, _, spec), width, value in zip(
            layout.leaves, layout.widths, layout.flatten(record), strict=True
        ):
            if value is None:
                packed += ABSENT[width]
            elif width == 1:
                if isinstance(value, Tensor):
                    packed.append(value.data_ptr())
                else:
                    packed.append(spec.choices.index(value) if spec.choices else value)
            elif width == LOGITS_WIDTH:
                batch_stride = value.stride(0) if value.ndim == 3 else 0
                packed += (
                    value.data_ptr(), DTYPES[value.dtype], value.shape[-1], batch_stride,
                    value.stride(-2), value.shape[-2],
                )  # fmt: skip
            elif width:
                packed += (value.data_ptr(), *value.shape)
    return packed


def pack_commit(inputs: CommitInputs, out: Committed) -> list[int]:
    """As `pack`; between them how many geometries caches have, then each with its caches."""
    packed = pack(inputs)
    groups = by_geometry(inputs.caches, inputs.pages)
    packed.append(len(groups))
    for (sizes, strides), alike in groups.items():
        packed += (len(alike), *(cache.data_ptr() for cache in alike), *sizes, *strides)
    return packed + pack(out)


def scratch(workspace: Tensor | None, size: int, rows: int, V: int, device: torch.device) -> Tensor:
    """The workspace passed in, or a new one of `size` words for rows of V logits."""
    if workspace is None:
        return torch.empty(size, dtype=torch.int64, device=device)
    if len(workspace) < size:
        raise ValueError(
            f"workspace: expected at least {size} int64 words, got {len(workspace)}; "
            f"workspace_size({rows}, {V}) says how many"
        )
    return workspace


Geometry = tuple[tuple[int, int, int, int], tuple[int, int, int]]


def by_geometry(caches: Sequence[Tensor], pages: Pages | None) -> dict[Geometry, list[Tensor]]:
    """Caches by (outer, positions, heads, bytes) and their strides in bytes but the last."""
    groups: dict[Geometry, list[Tensor]] = {}
    for cache in caches:
        size = cache.element_size()
        outer, positions, heads, D = cache.shape
        a, b, c, _ = cache.stride()
        if pages is None:  # [B, H, S, D]
            positions, heads, b, c = heads, positions, c, b
        geometry = (outer, positions, heads, D * size), (a * size, b * size, c * size)
        groups.setdefault(geometry, []).append(cache)
    return groups
