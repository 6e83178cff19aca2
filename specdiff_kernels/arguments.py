"""What kernels are given: a workspace; and native code addresses and sizes, a tuple for each op.

The tuples are described in csrc/bindings/arguments.h.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .lenience import KINDS
from .pages import Pages
from .records import RULES, Record
from .reveal import Reveal
from .types import Committed, Draft, Lenience, Pending, RowDistribution, Verified

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
NO_LOGITS = (0, 0, 0, 0, 0)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()


def addresses(tensors: Iterable[Tensor | None]) -> list[int]:
    return [address(tensor) for tensor in tensors]


def logits_view(logits: Tensor) -> tuple[int, int, int, int, int]:
    """[N, V] or [B, N, V] -> (address, dtype, V, batch stride, row stride)"""
    batch_stride = logits.stride(0) if logits.ndim == 3 else 0
    dtype = DTYPES[logits.dtype]
    return logits.data_ptr(), dtype, logits.shape[-1], batch_stride, logits.stride(-2)


def scratch(workspace: Tensor | None, size: int, rows: int, V: int, device: torch.device) -> Tensor:
    """The workspace passed in, or a new one of `size` words for rows of V logits."""
    if workspace is None:
        return torch.empty(size, dtype=torch.int64, device=device)
    if len(workspace) < size:
        raise ValueError(
            f"workspace: expected at least {size} int64 words, got {len(workspace)}; "
            f"workspace_size({rows}, {V}) says how many"
        )
    return workspace


def row_distribution_arguments(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    *,
    out: RowDistribution,
) -> tuple:
    return (
        logits_view(logits),
        logits.shape[0],
        addresses((temperature, top_k, top_p, min_p)),
        addresses(out),
    )


def row_divergence_arguments(
    target_logits: Tensor,
    draft_logits: Tensor,
    draft_ids: Tensor | None,
    temperature: Tensor,
    *,
    out: Sequence[Tensor],
) -> tuple:
    """out: RowDivergence and the statistics"""
    return (
        logits_view(target_logits),
        logits_view(draft_logits),
        target_logits.shape[0],
        addresses((draft_ids, temperature)),
        addresses(out),
    )


def row_divergence_backward_arguments(
    target_logits: Tensor,
    draft_logits: Tensor,
    draft_ids: Tensor | None,
    temperature: Tensor,
    statistics: Tensor,
    *upstream: Tensor,
    out: Tensor,
) -> tuple:
    """upstream: gradients of tv, kl, reverse_kl, draft_entropy"""
    return (
        logits_view(target_logits),
        logits_view(draft_logits),
        target_logits.shape[0],
        addresses((draft_ids, temperature, statistics)),
        addresses(upstream),
        address(out),
    )


def sample_arguments(
    logits: Tensor,
    distribution: RowDistribution,
    seed: Tensor | None,
    round: Tensor | None,
    slot: Tensor | None,
    purpose: int,
    position: Tensor | None,
    words: Tensor | None,
    draft_ids: Tensor | None,
    *,
    out: Tensor,
) -> tuple:
    return (
        logits_view(logits),
        logits.shape[0],
        addresses(distribution),
        addresses((words, seed, round, position)),
        address(slot),
        purpose,
        address(draft_ids),
        address(out),
    )


def verify_arguments(
    target_logits: Tensor,
    draft: Draft,
    rule: str,
    record: Record,
    lenience: Lenience | None,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor | None,
    round: Tensor | None,
    position: Tensor | None,
    words: Tensor | None,
    *,
    out: Verified,
) -> tuple:
    kind, amount = 0, None
    if lenience is not None:
        kind, amount = list(KINDS).index(lenience.kind), torch.as_tensor(lenience.amount)
    return (
        logits_view(target_logits),
        (target_logits.shape[0], target_logits.shape[1] - 1),
        addresses((draft.tokens, draft.tau, draft.rows)),
        NO_LOGITS if draft.logits is None else logits_view(draft.logits),
        0 if draft.logits is None else draft.logits.shape[0],
        addresses(draft.distribution or (None,) * 5),
        addresses((draft.draft_ids, draft.lengths)),
        (RULES.index(rule), int(record), draft.final_step, kind),
        addresses((temperature, top_k, top_p, min_p, amount)),
        addresses((words, seed, round, position)),
        addresses(out),
    )


def denoise_step_arguments(
    logits: Tensor,
    draft: Pending,
    draft_ids: Tensor | None,
    lengths: Tensor | None,
    pool_rows: Tensor,
    reveal: Reveal,
    rate: Tensor,
    step: int,
    entropies: bool,
    temperature: Tensor,
    top_k: Tensor | None,
    top_p: Tensor | None,
    min_p: Tensor | None,
    seed: Tensor | None,
    round: Tensor | None,
    position: Tensor | None,
    words: Tensor | None,
    *,
    out: Pending,
) -> tuple:
    return (
        logits_view(logits),
        (len(logits), *draft.tokens.shape),
        addresses((draft.tokens, draft.tau, draft.rows, *draft.distribution)),
        addresses((draft_ids, lengths, pool_rows)),
        (int(reveal.order), reveal.lo, reveal.hi, reveal.number, address(rate)),
        step,
        entropies,
        addresses((temperature, top_k, top_p, min_p)),
        addresses((words, seed, round, position)),
        addresses((out.tokens, out.tau, out.rows, *out.distribution, out.entropy)),
    )


def commit_arguments(
    lengths: Tensor,
    emitted: Tensor,
    stop_tokens: Tensor | None,
    limit: Tensor | None,
    finished: Tensor | None,
    pages: Pages | None,
    release: bool,
    path: Tensor | None,
    caches: Sequence[Tensor],
    *,
    out: Committed,
) -> tuple:
    held, sizes = addresses((None,) * 4), (0, 0, 1)
    if pages is not None:
        held = addresses(pages[:4])
        sizes = pages.tables.shape[1], len(pages.references), pages.block_size
    return (
        (*emitted.shape, 0 if stop_tokens is None else len(stop_tokens)),
        addresses((lengths, emitted, stop_tokens, limit, finished)),
        held,
        (*sizes, release),
        address(path),
        [(addresses(alike), *geometry) for geometry, alike in by_geometry(caches, pages).items()],
        addresses(out),
    )


Geometry = tuple[tuple[int, int, int, int], tuple[int, int, int]]


def by_geometry(caches: Sequence[Tensor], pages: Pages | None) -> dict[Geometry, list[Tensor]]:
    """Caches by (outer, positions, heads, bytes) and their strides in bytes but the last."""
    groups: dict[Geometry, list[Tensor]] = {}
    for cache in caches:
        size = cache.element_size()
        outer, positions, heads, D = cache.shape
        a, b, c, _ = cache.stride()
        if pages is None:  # [B, H, S, D]
            positions, heads, b, c = heads, positions, c, b
        geometry = (outer, positions, heads, D * size), (a * size, b * size, c * size)
        groups.setdefault(geometry, []).append(cache)
    return groups
