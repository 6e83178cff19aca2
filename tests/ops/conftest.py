"""Every op's test runs on every implementation that this machine has."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from specdiff_kernels import _C, available_backends, use_backend
from specdiff_kernels.backends import interprets_triton
from tests import emulator

from .interpreter import patching_once
from .on_gpu import on_gpu

GPU = [pytest.mark.gpu] if torch.cuda.is_available() else []
TRITON = pytest.param("triton", marks=GPU)
CUDA = [pytest.param("cuda", marks=GPU)] if GPU else []
ON_CPU = ["reference", *(f"cpp-{isa}" for isa in ("plain", "avx2", "avx512"))]
IMPLEMENTATIONS = [
    *ON_CPU,
    TRITON,
    emulator.NAME,
    *CUDA,
]


@contextmanager
def forced(implementation: str) -> Iterator[None]:
    """One backend, and of cpp one instruction set; triton and cuda on the GPU if there is one."""
    if implementation in ("triton", "cuda"):
        with gpu_backend_forced(implementation):
            yield
        return
    if implementation == emulator.NAME:
        with emulator.forced():
            yield
        return
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


@contextmanager
def gpu_backend_forced(name: str) -> Iterator[None]:
    interpreted = name == "triton" and interprets_triton()
    if reason := available_backends("cpu" if interpreted else "cuda")[name]:
        pytest.skip(f"backend {name}: {reason}")
    with use_backend(name), patching_once() if interpreted else on_gpu(name):
        yield


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request):
    """Forces one implementation for the test."""
    with forced(request.param):
        yield request.param
