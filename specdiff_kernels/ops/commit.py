"""`commit`: what stands of a round: stop tokens, limits, and the cache's per-row rollback."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..types import Committed
from .checks import INT64, check_tensor, contiguous, device_of
from .registry import Outputs, define


def commit(
    lengths: Tensor,
    emitted: Tensor,
    *,
    stop_tokens: Tensor | None = None,
    limit: Tensor | None = None,
    finished: Tensor | None = None,
    backend: str | None = None,
    out: Committed | None = None,
) -> Committed:
    """Advance each sequence by the emitted tokens that stand, and say which are finished.

    The cache is dense with per-row lengths: entries behind a row's length are stale, never
    attended to and overwritten next, so that rollback moves no bytes. A row whose verification
    failed (all -1) keeps nothing.

    Args:
        lengths: i64 [B], cached positions of each sequence before the round.
        emitted: i64 [B, N], as returned by `verify`: tokens, then -1.
        stop_tokens: i64 [S]; nothing behind the first stop token stands.
        limit: i64 [B], largest length that a sequence may reach.
        finished: bool [B], sequences that ended earlier; they keep nothing and stay finished.
        backend, out: as in `row_law`; `out` may alias the inputs.

    Returns:
        Committed(lengths i64 [B], kept i64 [B], finished bool [B]).

    Raises:
        ValueError, TypeError: an argument of the wrong shape or dtype.

    Example:
        >>> result = commit(
        ...     torch.tensor([5]), torch.tensor([[7, 2, 9, -1]]), stop_tokens=torch.tensor([2])
        ... )
        >>> [field.item() for field in result]
        [7, 2, True]
    """
    device = device_of("emitted", emitted)
    check_tensor("emitted", emitted, (None, None), INT64, device)
    B = emitted.shape[0]
    check_tensor("lengths", lengths, (B,), INT64, device)
    if stop_tokens is not None:
        check_tensor("stop_tokens", stop_tokens, (None,), INT64, device)
    if limit is not None:
        check_tensor("limit", limit, (B,), INT64, device)
    if finished is not None:
        check_tensor("finished", finished, (B,), (torch.bool,), device)
    args = (*contiguous(lengths, emitted, stop_tokens, limit, finished), backend)
    if out is not None:
        OP.into(*args, *out)
        return out
    return Committed(*OP.functional(*args))


def _outputs(lengths: Tensor, *_: Any) -> Outputs:
    return [([lengths.shape[0]], dtype) for dtype in (torch.int64, torch.int64, torch.bool)]


def _call(function: Callable[..., None], *args: Any, out: Any) -> None:
    function(*args, out=Committed(*out))


OP = define(
    "commit",
    "Tensor lengths, Tensor emitted, Tensor? stop_tokens, Tensor? limit, Tensor? finished",
    ["new_lengths", "kept", "new_finished"],
    _outputs,
    _call,
)
