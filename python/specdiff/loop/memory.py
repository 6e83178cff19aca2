"""Memory in huge pages, for weights and caches that every forward reads from end to end."""

from __future__ import annotations

import ctypes
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

HUGE = 2 << 20  # bytes of a huge page
LEAST = 1 << 16  # bytes of a piece that gains by them
CHUNK = 32 * HUGE  # more than malloc keeps for later, so that no page of it was ever written
MADV_HUGEPAGE = 14


class Store:
    """Hands out memory of the CPU from chunks in huge pages; small pieces are ordinary memory.

    In pages of 4 KiB the processor looks up an address for each 4 KiB that it reads, which slows
    forwards of few tokens. Where the system grants no huge pages, it is ordinary memory. A chunk
    lives as long as any of its pieces.

    Example:
        >>> Store().take((2, 3), torch.float32).shape
        torch.Size([2, 3])
    """

    def __init__(self) -> None:
        self.chunk, self.used = torch.empty(0, dtype=torch.uint8), 0
        self.lock = Lock()

    def take(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """A contiguous tensor whose values are whatever lies there."""
        size = math.prod(shape) * dtype.itemsize
        if size < LEAST:
            with torch.inference_mode(False):  # may be written at any time
                return torch.empty(shape, dtype=dtype)
        with self.lock, torch.inference_mode(False):
            start = -(-self.used // 64) * 64
            if start + size > len(self.chunk):
                self.chunk, start = in_huge_pages(max(CHUNK, size)), 0
            self.used = start + size
            return self.chunk[start : self.used].view(dtype).view(*shape)

    def __reduce__(self) -> tuple[type[Store], tuple[()]]:
        return Store, ()  # a copied or saved model has memory of its own


def in_huge_pages(size: int) -> Tensor:
    """So many bytes, from the beginning of a huge page on."""
    whole = torch.empty(size + HUGE, dtype=torch.uint8)
    first = -whole.data_ptr() % HUGE
    part = whole[first : first + size]
    if sys.platform == "linux":  # a refusal changes nothing
        address, length = ctypes.c_void_p(part.data_ptr()), ctypes.c_size_t(size // 4096 * 4096)
        ctypes.CDLL(None).madvise(address, length, MADV_HUGEPAGE)
    return part


def huge_share(tensor: Tensor) -> float | None:
    """Share of a contiguous tensor's memory that lies in huge pages; None where no system tells.

    Example:
        >>> share = huge_share(Store().take((8 << 20,), torch.float32).zero_())
    """
    first, total = tensor.data_ptr(), tensor.nbytes
    inside = huge = 0
    try:
        maps = Path("/proc/self/smaps").read_text().splitlines()
    except OSError:
        return None
    for line in maps:
        name, _, rest = line.partition(" ")
        if "-" in name:
            start, end = (int(x, 16) for x in name.split("-"))
            inside = max(0, min(end, first + total) - max(start, first))
        elif name == "AnonHugePages:":
            huge += min(inside, int(rest.split()[0]) * 1024)
    return huge / total if total else None


def trim() -> None:
    """Give the system what malloc keeps of freed memory, where it can: with glibc."""
    if sys.platform == "linux":
        give_back = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if give_back is not None:
            give_back(ctypes.c_size_t(0))
