"""What a sampler or a verifier answers: integers, or an error that names what is wrong."""

from __future__ import annotations

from numbers import Integral

import torch
from torch import Tensor

from .mutants import Outcome, Verifier
from .worlds import Drafted, K


def outcome_of(verify: Verifier, draft: Drafted, V: int) -> Outcome:
    """On the CPU, in i64 [N]."""
    accepted, token = verify(draft)
    N = len(draft.tokens)
    return Outcome(integers(accepted, "accepted", N, K), integers(token, "token", N, V - 1))


def require_some(name: str, count: int) -> None:
    if not isinstance(count, Integral) or count < 1:
        raise ValueError(f"{name}: expected an integer >= 1, got {count!r}")


def integers(values: Tensor, name: str, count: int, most: int) -> Tensor:
    """As i64 [count] on the CPU, or an error unless they are integers in 0 .. most."""
    values = torch.as_tensor(values).cpu()
    if values.dtype == torch.bool or values.is_floating_point() or values.is_complex():
        found = str(values.dtype).removeprefix("torch.")
        raise TypeError(f"{name}: expected integers, got {found}; convert with .long()")
    if values.shape != (count,):
        raise ValueError(f"{name}: expected shape [{count}], got {list(values.shape)}")
    if values.min() < 0 or values.max() > most:
        found = f"{values.min().item()} .. {values.max().item()}"
        raise ValueError(f"{name}: expected numbers in 0 .. {most}, got {found}")
    return values.long()
