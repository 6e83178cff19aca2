"""Ops on CPU tensors, run by a GPU backend: so the op tests test it as they are."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from specdiff_kernels import backends
from specdiff_kernels.ops import registry


@contextmanager
def on_gpu(name: str) -> Iterator[None]:
    """What ops forced to backend `name` take goes to the GPU, and what they fill comes back."""
    original = registry.implementation

    def implementation(op: str, device: torch.device, asked: str | None) -> Callable[..., Any]:
        if backends.requested(asked) != name:
            return original(op, device, asked)
        function = backends.find(op, "cuda", name)
        return function if op == "workspace_size" else moved(function)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(registry, "implementation", implementation)
        yield


def moved(function: Callable[..., None]) -> Callable[..., None]:
    def run(*args: Any, **kwargs: Any) -> None:
        storages: dict[int, Any] = {}  # views of one memory stay views of one memory

        def move(x: Any) -> Any:
            if isinstance(x, tuple):
                return type(x)(*map(move, x)) if hasattr(x, "_fields") else tuple(map(move, x))
            if not isinstance(x, Tensor):
                return x
            storage = x.untyped_storage()
            there = storages.setdefault(storage.data_ptr(), storage.cuda())
            empty = torch.empty(0, dtype=x.dtype, device="cuda")
            return empty.set_(there, x.storage_offset(), x.shape, x.stride())

        there = {key: move(value) for key, value in kwargs.items()}
        function(*map(move, args), **there)
        bring_back(kwargs["out"], there["out"])

    return run


def bring_back(here: Any, there: Any) -> None:
    if isinstance(here, tuple):
        for a, b in zip(here, there, strict=True):
            bring_back(a, b)
    elif here is not None:
        here.copy_(there)
