"""Triton's interpreter: what makes tests by it affordable."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from specdiff_kernels.backends import interprets_triton, requested
from tests import emulator

FULL = False  # set by --full-sizes


def is_slow() -> bool:
    """Whether the ops are interpreted or emulated just now, at milliseconds a program."""
    forced = requested(None)
    return forced == emulator.NAME or (forced == "triton" and interprets_triton())


def sized(full: int, interpreted: int) -> int:
    """A test's size: cut where the ops are slow, unless --full-sizes was given."""
    return interpreted if is_slow() and not FULL else full


@contextmanager
def patching_once() -> Iterator[None]:
    """The interpreter replaces triton.language's functions anew at each call of a device function,
    which takes half of its time. Here it does so once a launch. It also calls a reduction of one's
    own for each element; here that of `highest` is NumPy's maximum."""
    from triton.runtime import interpreter

    from specdiff_kernels.triton.row import larger_or_nan

    apply = interpreter.ReduceOps.apply_impl

    def reduce(self, input):
        if self.combine_fn is not larger_or_nan:
            return apply(self, input)
        return self.min_max(input[0], val_reduce_op=np.max)

    original = interpreter._patch_lang
    patched: set[int] = set()

    class Scope:
        def __init__(self, scope):
            self.scope = scope

        def restore(self):
            self.scope.restore()
            patched.clear()

    def patch(fn):
        if id(fn.__globals__) in patched:
            return None
        is_launch = not patched
        patched.add(id(fn.__globals__))
        scope = original(fn)
        return Scope(scope) if is_launch else None

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(interpreter, "_patch_lang", patch)
        monkeypatch.setattr(interpreter.ReduceOps, "apply_impl", reduce)
        with np.errstate(all="ignore"):  # masked lanes divide by 0 as they do on a GPU
            yield


@contextmanager
def in_any_order(seed: int) -> Iterator[None]:
    """Programs of a launch run in a random order instead of one after another."""
    from triton.runtime.interpreter import interpreter_builder as builder

    random = torch.Generator().manual_seed(seed)
    set_grid_dim, set_grid_idx = builder.set_grid_dim, builder.set_grid_idx
    order: list[int] = []

    def shuffle(x, y, z):
        order[:] = torch.randperm(x, generator=random).tolist()
        set_grid_dim(x, y, z)

    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.setattr(builder, "set_grid_dim", shuffle)
        monkeypatch.setattr(builder, "set_grid_idx", lambda x, y, z: set_grid_idx(order[x], y, z))
        yield
