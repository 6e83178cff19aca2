"""Per-row lengths after a round: stop tokens, limits, rollback."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ..types import Committed
from .arguments import launch


def commit(
    lengths: Tensor,
    emitted: Tensor,
    stop_tokens: Tensor | None,
    limit: Tensor | None,
    finished: Tensor | None,
    *,
    out: Committed,
) -> None:
    B, N = emitted.shape
    stops = 0 if stop_tokens is None else len(stop_tokens)
    launch(advance, B, emitted.device, lengths, emitted, N, stop_tokens, stops, limit, finished,
           out, POSITIONS=triton.next_power_of_2(max(N, 1)))  # fmt: skip


@triton.jit(do_not_specialize=["N", "stops"])
def advance(lengths, emitted, N, stop_tokens, stops, limit, finished, out, POSITIONS: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, POSITIONS)
    token = tl.load(emitted + b * N + i, mask=i < N, other=-1)
    kept = tl.min(tl.where(token < 0, i, N))  # tokens before the padding
    length = tl.load(lengths + b)
    done = length < length
    if finished is not None:
        done = tl.load(finished + b)
        kept = tl.where(done, 0, kept)
    if limit is not None:
        kept = tl.minimum(kept, tl.maximum(tl.load(limit + b) - length, 0))
    if stop_tokens is not None:
        first = N + 0 * kept
        for s in range(stops):
            first = tl.minimum(first, tl.min(tl.where(token == tl.load(stop_tokens + s), i, N)))
        done = done | (first < kept)
        kept = tl.minimum(kept, first + 1)
    if limit is not None:
        done = done | (length + kept >= tl.load(limit + b))
    tl.store(out.lengths + b, length + kept)
    tl.store(out.kept + b, kept)
    tl.store(out.finished + b, done)
