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
    """Ops forced to backend `name` run on the GPU: tensors go there, and results come back."""
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
            if isinstance(x, list):
                return [*map(move, x)]
            if not isinstance(x, Tensor):
                return x
            here = x.untyped_storage()
            _, there = storages.setdefault(here.data_ptr(), (here, here.cuda()))
            empty = torch.empty(0, dtype=x.dtype, device="cuda")
            return empty.set_(there, x.storage_offset(), x.shape, x.stride())

        function(*map(move, args), **{key: move(value) for key, value in kwargs.items()})
        for here, there in storages.values():
            here.copy_(there)

    return run
