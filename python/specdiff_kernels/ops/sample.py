"""`sample`: one token per row."""

from __future__ import annotations

from numbers import Integral
from typing import Annotated, NamedTuple

from torch import Tensor

from ..checks import described, device_of, random_key, readable
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
    seed: int | Tensor | None = None,
    round: int | Tensor | None = None,
    slot: int | Tensor | None = None,
    purpose: int = Purpose.DRAFT,
    position: int | Tensor | None = None,
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
            on its own sequence alone. Token i of a draft has slot i: tokens that share a slot share
            their noise, and the draft would bias the output. A slot of None is 0. An integer `seed`
            gives each row its own, by `row_seeds`; an integer `round` or `slot` is that of all
            rows. Where the distribution lies on a CPU, and all its rows are greedy, seed and round
            may be left out.
        purpose: a `Purpose`; two uses of randomness never share one.
        position: i64 [N] or an integer, absolute positions in their sequences, in place of round,
            slot and purpose, for a coupled draw; see `verify`.
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
        >>> sample(logits, greedy).item(), sample(logits, row_distribution(logits), seed=7, round=0)
        (1, tensor([1]))
    """
    device = device_of("logits", logits)
    N = logits.shape[0] if logits.ndim else 0
    if words is None:
        slot = 0 if slot is None else slot
        temperature = 0 if seed is None and all_greedy(distribution) else None
        if position is None:
            seed, round = random_key(N, temperature, seed=seed, round=round)
        else:
            (seed,) = random_key(N, temperature, seed=seed)
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
    return OP(inputs, sizes, device, backend, None if out is None else Sampled(out), workspace).out


def all_greedy(distribution: RowDistribution) -> bool:
    """Whether all rows are seen to be, where that can be looked at."""
    scale = getattr(distribution, "scale", None)
    return isinstance(scale, Tensor) and readable(scale) and not scale.any()


def check_purpose(purpose: int) -> int:
    if not isinstance(purpose, Integral) or purpose not in set(Purpose):
        names = ", ".join(Purpose.__members__)
        raise ValueError(f"purpose: expected one of {names}, got {described(purpose)}")
    return int(purpose)
