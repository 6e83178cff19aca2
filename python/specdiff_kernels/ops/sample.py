"""`sample`: one token per row."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from ..checks import check_purpose, check_random, device_of
from ..fields import I64, Sizes
from ..inputs import SampleInputs
from ..types import Purpose, RowDistribution
from .registry import Op


class Sampled(NamedTuple):
    out: Annotated[Tensor, I64("N")]


OP = Op("sample", SampleInputs, Sampled, workspace=True)


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
    if slot is None and words is None:
        slot = torch.zeros(logits.shape[:1], dtype=torch.int64, device=device)
    sizes: Sizes = {"words": logits.shape[:1] if position is None else logits.shape}
    inputs = OP.check(
        sizes,
        device,
        logits,
        distribution,
        (words, seed, round, position),
        slot,
        check_purpose(purpose),
        draft_ids,
    )
    if words is None:
        key = {"seed": seed} if position is not None else {"seed": seed, "round": round}
        check_random(sizes["N"], **key)
    return OP(inputs, sizes, device, backend, None if out is None else Sampled(out), workspace).out
