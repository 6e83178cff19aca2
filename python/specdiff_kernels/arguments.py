"""Arguments of kernels: a workspace, and for native code addresses and sizes in one list."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .fields import layout_of
from .inputs import CommitInputs
from .pages import Pages
from .types import Committed


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def pack(inputs: Any, out: Any) -> list[int]:
    """The list that `Arguments` of csrc/bindings/arguments.h reads: the fields of both in order."""
    packed = layout_of(type(inputs)).pack(inputs)
    packed += [out.data_ptr()] if isinstance(out, Tensor) else layout_of(type(out)).pack(out)
    return packed


def pack_commit(inputs: CommitInputs, out: Committed) -> list[int]:
    """As `pack`; between them how many geometries caches have, then each with its caches."""
    groups = by_geometry(inputs.caches, inputs.pages)
    packed = layout_of(CommitInputs).pack(inputs)
    packed.append(len(groups))
    for (sizes, strides), alike in groups.items():
        packed += (len(alike), *(cache.data_ptr() for cache in alike), *sizes, *strides)
    return packed + layout_of(Committed).pack(out)


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
