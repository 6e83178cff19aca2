"""Every op's test runs on every implementation that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from specdiff_kernels import _C, use_backend

IMPLEMENTATIONS = ["reference", *(f"cpp-{isa}" for isa in ("plain", "avx2", "avx512"))]


@contextmanager
def forced(implementation: str) -> Iterator[None]:
    """One backend, and of cpp one instruction set."""
    backend, _, isa = implementation.partition("-")
    if isa and isa not in _C.supported_isas():
        pytest.skip(f"this processor has no {isa}")
    before = _C.isa()
    _C.use_isa(isa or before)
    try:
        with use_backend(backend):
            yield
    finally:
        _C.use_isa(before)


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """Forces one implementation for the test."""
    with forced(request.param):
        yield request.param
