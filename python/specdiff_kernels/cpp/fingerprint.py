"""A number that changes with a weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

import specdiff_kernels._C as _C


def fingerprint(weight: Tensor) -> int:
    return _C.fingerprint(weight.data_ptr(), *weight.shape, *weight.stride())


def watch(weights: Sequence[Tensor]) -> Callable[[], int]:
    """A function that gives one number for all of them, for as long as they lie where they are."""
    places = [[w.data_ptr(), *w.shape, *w.stride()] for w in weights]
    return _C.Fingerprints(places)
