"""`sample`: one token per row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..types import Purpose, RowDistribution
from .checks import (
    INT64,
    check_distribution,
    check_logits,
    check_purpose,
    check_random,
    check_tensor,
    check_workspace,
    contiguous,
    device_of,
)
from .registry import Outputs, define

DISTRIBUTION_SCHEMA = "Tensor max, Tensor scale, Tensor threshold, Tensor total, Tensor status"


def sample(
    logits: Tensor,
    distribution: RowDistribution,
    *,
    seed: Tensor | None = None,
    round: Tensor | None = None,
    slot: Tensor | None = None,
    purpose: int = Purpose.DRAFT,
    position: Tensor | None = None,
    words: Tensor | None = None,
    draft_ids: Tensor | None = None,
    backend: str | None = None,
    out: Tensor | None = None,
    workspace: Tensor | None = None,
) -> Tensor:
    """Draw one token per row by integer inverse CDF: the first v with e_0 + ... + e_v > r.

    r is the high half of word x total, so each probability is e(v) / total to within 2^-64. With
    `position` the draw is *coupled* instead: argmax_v log e(v) + Gumbel noise, which depends on
    seed, position and token id alone, so that two distributions drawn from at one position mostly
    agree.

    Args:
        logits: [N, V], the logits that `distribution` was made from.
        distribution: RowDistribution of the N rows.
        seed, round, slot: i64 [N]; with `purpose` they key Philox4x32-10, so that a draw depends
            on its own sequence alone. slot defaults to 0.
        purpose: a `Purpose`; two uses of randomness never share one.
        position: i64 [N], absolute positions in their sequences, in place of round, slot and
            purpose, for a coupled draw; see `verify`.
        words: i64 [N], the random 64-bit words themselves, in place of seed and round. With
            `position`: [N, V], one for each column.
        draft_ids: i64 [V], token ids of the columns when the rows cover a reduced vocabulary.
        backend, out, workspace: as in `row_distribution`.

    Returns:
        i64 [N] token ids, -1 where the row has no distribution.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or range, or no randomness.

    Example:
        >>> logits = torch.tensor([[0.0, 5.0]])
        >>> greedy = row_distribution(logits, 0.0)
        >>> sample(logits, greedy, words=torch.zeros(1, dtype=torch.int64)).item()
        1
    """
    device = device_of("logits", logits)
    logits = check_logits("logits", logits, (None, None), device)
    N, V = logits.shape
    distribution = check_distribution("distribution", distribution, N, device)
    if position is not None:
        check_tensor("position", position, (N,), INT64, device)
        check_random(N, device, (N, V), words, seed=seed)
    else:
        check_random(N, device, (N,), words, seed=seed, round=round)
    if draft_ids is not None:
        check_tensor("draft_ids", draft_ids, (V,), INT64, device)
    if slot is None and words is None:
        slot = torch.zeros(N, dtype=torch.int64, device=device)
    if slot is not None:
        check_tensor("slot", slot, (N,), INT64, device)
    seed, round, slot = contiguous(seed, round, slot)
    position, words, draft_ids = contiguous(position, words, draft_ids)
    args = (
        logits, *distribution, seed, round, slot, check_purpose(purpose), position, words,
        draft_ids, backend,
    )  # fmt: skip
    check_workspace(workspace, out, device)
    if out is not None:
        OP.into(*args, workspace, out)
        return out
    return OP.functional(*args)


def _outputs(logits: Tensor, *_: Any) -> Outputs:
    return [([logits.shape[0]], torch.int64)]


def _call(function: Callable[..., None], logits: Tensor, *rest: Any, out: Any) -> None:
    function(logits, RowDistribution(*rest[:5]), *rest[5:], out=out[0])


OP = define(
    "sample",
    f"Tensor logits, {DISTRIBUTION_SCHEMA}, Tensor? seed, Tensor? round, Tensor? slot, "
    "int purpose, Tensor? position, Tensor? words, Tensor? draft_ids",
    ["tokens"],
    _outputs,
    _call,
    shown=["out"],
    workspace=True,
)
