"""Per-row lengths after a round: stop tokens, limits, rollback."""

from __future__ import annotations

from torch import Tensor

import specdiff_kernels._C as _C

from ..types import Committed
from .pointers import address, addresses


def commit(
    lengths: Tensor,
    emitted: Tensor,
    stop_tokens: Tensor | None,
    limit: Tensor | None,
    finished: Tensor | None,
    *,
    out: Committed,
) -> None:
    _C.commit(
        address(lengths),
        address(emitted),
        *emitted.shape,
        address(stop_tokens),
        0 if stop_tokens is None else len(stop_tokens),
        *addresses((limit, finished)),
        *addresses(out),
    )
