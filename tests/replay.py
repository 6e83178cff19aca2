"""Recordings in place of CUDA graphs, which are replayed on a CPU."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specdiff.loop.capture import Captured
from specdiff_kernels import checks

aten = torch.ops.aten
WAITS = {
    aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default,
    aten.nonzero.default, aten.masked_select.default, aten.lift_fresh.default,
}  # fmt: skip


class Recorded(TorchDispatchMode):
    """Records what a CUDA graph holds of a function: operations and their memory, no Python."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple] = []

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        masks = operation is aten.index.Tensor and any(
            x is not None and x.dtype == torch.bool for x in args[1]
        )
        assert operation not in WAITS and not masks, f"{operation} waits for the device"
        out = operation(*args, **(kwargs or {}))
        self.calls.append((operation, args, kwargs or {}, out))
        return out

    def replay(self) -> None:
        for operation, args, kwargs, out in self.calls:
            again = operation(*args, **kwargs)
            for have, new in zip(tree_leaves(out), tree_leaves(again), strict=True):
                if isinstance(have, torch.Tensor) and have.data_ptr() != new.data_ptr():
                    have.copy_(new)


class RecordedCapture(Captured):
    """Replays the rounds of a session on a CPU: pass it as `capture`."""

    span = 32

    def __init__(self) -> None:
        self.graphs: dict[Hashable, Recorded] = {}
        self.replayed = 0

    def __call__(self, key: Hashable, function: Callable[[], Any]) -> None:
        if key in self.graphs:
            self.replayed += 1
            self.graphs[key].replay()
            return
        with pytest.MonkeyPatch.context() as patch, Recorded() as graph:
            patch.setattr(checks, "concrete", lambda tensor: False)  # no entry can be looked at
            function()  # unlike a capture, this runs as well: it is the first run
        self.graphs[key] = graph

    def forget(self) -> None:
        self.graphs.clear()
