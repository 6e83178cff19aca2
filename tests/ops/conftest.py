"""Every op's test runs on every implementation that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from specdiff_kernels import _C, available_backends, use_backend
from specdiff_kernels.backends import interprets_triton

from .interpreter import patching_once
from .on_gpu import on_gpu

GPU = [pytest.mark.gpu] if torch.cuda.is_available() else []
IMPLEMENTATIONS = [
    "reference",
    *(f"cpp-{isa}" for isa in ("plain", "avx2", "avx512")),
    pytest.param("triton", marks=GPU),
]


@contextmanager
def forced(implementation: str) -> Iterator[None]:
    """One backend, and of cpp one instruction set; triton on the GPU if there is one."""
    backend, _, isa = implementation.partition("-")
    if isa and isa not in _C.supported_isas():
        pytest.skip(f"this processor has no {isa}")
    if backend == "triton":
        with triton_forced():
            yield
        return
    before = _C.isa()
    _C.use_isa(isa or before)
    try:
        with use_backend(backend):
            yield
    finally:
        _C.use_isa(before)


@contextmanager
def triton_forced() -> Iterator[None]:
    device = "cpu" if interprets_triton() else "cuda"
    if reason := available_backends(device)["triton"]:
        pytest.skip(f"backend triton: {reason}")
    with use_backend("triton"), patching_once() if interprets_triton() else on_gpu("triton"):
        yield


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """Forces one implementation for the test."""
    with forced(request.param):
        yield request.param
