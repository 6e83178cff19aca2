"""Small constructors that the op tests share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from specdiff_kernels import Draft, RowDistribution, backends

LAST_WORD = -1  # the largest 64-bit word, as an int64 pattern


def i64(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def one_hot_draft(tokens: Tensor, **fields) -> Draft:
    """A draft of bare guesses. tokens [B, K]"""
    tau = torch.zeros_like(tokens, dtype=torch.int32)
    return Draft(tokens, tau, torch.full_like(tokens, -1), **fields)


def recorded_draft(
    tokens: Tensor, logits: Tensor, distribution: RowDistribution, **fields
) -> Draft:
    """A one-step draft, position (b, i) drawn from pool row b K + i."""
    rows = torch.arange(tokens.numel()).view_as(tokens)
    return Draft(
        tokens, torch.zeros_like(tokens, dtype=torch.int32), rows, logits, distribution, **fields
    )


@contextmanager
def installed(**packages: ModuleType | None) -> Iterator[None]:
    """Backends by name as if these were their packages; None: it cannot be imported."""

    def forget() -> None:
        backends.load.cache_clear()
        backends.find.cache_clear()

    with pytest.MonkeyPatch.context() as monkeypatch:
        for name, package in packages.items():
            monkeypatch.setitem(sys.modules, f"specdiff_kernels.{name}", package)
        forget()
        yield
    forget()


def assert_same(a: tuple, b: tuple) -> None:
    """Bitwise equality of two NamedTuples of tensors."""
    for name, x, y in zip(a._fields, a, b, strict=True):
        assert torch.equal(x, y), f"{name}: {x.tolist()} != {y.tolist()}"


def each_mistake(mistakes: dict[type, dict[str, Callable[[], Any]]]) -> list[Any]:
    """Parameters (error, beginning of its message, call) of tables by error."""
    return [
        pytest.param(error, message, call, id=message[:60])
        for error, own in mistakes.items()
        for message, call in own.items()
    ]


def assert_named(error: type[Exception], message: str, call: Callable[[], Any]) -> None:
    """A call raises an error whose message begins like that."""
    with pytest.raises(error) as caught:
        call()
    assert str(caught.value)[: len(message)] == message
