"""Packed: the copy of a weight that a linear layer is multiplied with."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from specdiff_kernels import PackedWeight, pack_weight
from specdiff_kernels.backends import find
from specdiff_kernels.ops.skinny_linear import packed_shape

from .memory import Store


class Packed:
    """A weight's packed copy, made anew when writes were counted or its fingerprint differs."""

    __slots__ = ("dtype", "fingerprint", "key", "store", "weight")

    def __init__(self, dtype: torch.dtype, store: Store) -> None:
        self.dtype, self.store = dtype, store
        self.weight = PackedWeight(torch.empty(0, dtype=dtype), 0)
        self.fingerprint: Any = find("fingerprint", "cpu", None)  # the same of every backend
        self.key: tuple[int, int] | None = None

    def of(self, weight: Tensor) -> PackedWeight:
        key = (version_of(weight), self.fingerprint(weight))
        if key != self.key:
            shape, place = packed_shape(*weight.shape), self.weight.packs
            if place.shape != shape:
                place = self.store.take(shape, self.dtype)
            self.weight, self.key = pack_weight(weight, self.dtype, out=place), key
        return self.weight

    def __reduce__(self) -> tuple[type[Packed], tuple[torch.dtype, Store]]:
        return Packed, (self.dtype, self.store)  # a copied or saved model packs for itself


def version_of(weight: Tensor) -> int:
    """How often PyTorch saw it written to."""
    try:
        return weight._version
    except RuntimeError:  # an inference tensor counts none; asking first takes longer
        return 0


def usable(tensor: Any) -> bool:
    """Whether it is fp32 in memory; a subclass, as of quantised weights, may only say so."""
    return (
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.dtype is torch.float32
        and tensor.is_cpu
    )
