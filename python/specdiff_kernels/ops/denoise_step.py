"""`denoise_step`: one reverse step of absorbing-state diffusion over [B, K] positions."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..checks import (
    check_increasing,
    columns,
    described,
    kind_of,
    overlap,
    random_key,
    readable,
    scalar,
)
from ..fields import Sizes
from ..inputs import DenoiseStepInputs
from ..reveal import Order, Reveal
from ..types import Draft, Pending
from .registry import Op
from .verify import check_draft

DRAWN = (Order.MDLM, Order.SEDD, Order.FIRST_HITTING)  # at random, whatever the temperature
OP = Op("denoise_step", DenoiseStepInputs, Pending, workspace=True)


def denoise_step(
    draft: Draft,
    reveal: Reveal,
    step: int,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    *,
    pool_rows: Tensor | None = None,
    entropies: bool = False,
    seed: int | Tensor | None = None,
    round: int | Tensor | None = None,
    position: int | Tensor | None = None,
    words: Tensor | None = None,
    backend: str | None = None,
    out: Draft | None = None,
    workspace: Tensor | None = None,
) -> Draft:
    """Reveal some masked positions of a draft: decide which, draw their tokens, record the
    distributions.

    A position is masked while its token is -1. One that is revealed gets a token drawn from its row
    of `draft.logits`, tau = step, and its row recorded (-1 if the row is greedy: the token is then
    a bare guess). The reveal decision is independent of the token, except under
    `Reveal.highest_confidence`. Rows of revealed positions are not read, nor those of masked ones
    that this step cannot reveal; distributions of all rows that were read are renewed.
    SEDD: 2310.16834, section 4.1; MDLM: 2406.07524, section 3.

    Args:
        draft: as `Draft.masked` makes it or as this function returned it, with the model's new
            logits in the rows of masked positions; those of revealed ones are recorded and must
            not be written again. Positions at or beyond `draft.lengths` stay masked.
        reveal: which positions, see `Reveal`.
        step: number of this reverse step, recorded as tau; larger than that of every revealed
            position. Under `Reveal.all()` it becomes the draft's `final_step`.
        temperature, top_k, top_p, min_p: of the draft's distribution, a number or a tensor [B]; see
            `row_distribution`. The reveal decision always goes by the model's own distribution,
            temperature 1.
        pool_rows: i64 [B, K], row of the pool that holds each position's logits, all different;
            None: b K + i.
        entropies: also measure the entropy of the model's distribution at each row read, into
            `draft.entropy`, which keeps what it holds otherwise. Asked of the first step alone it
            is taken before any sampling, and may decide how much is drafted.
        seed, round: i64 [B] or an integer, as in `verify`; position i draws with slot i. If the
            temperature is the number 0, the orders that draw no positions (all but mdlm, sedd and
            first_hitting) need neither.
        position: i64 [B] or an integer, absolute position of the draft's first token, for coupled
            draws; see `verify` and `sample`. Reveal decisions still take `round`.
        words: i64 [B, K, 2], the words of each reveal decision and each token, in place of seed and
            round; first-hitting takes [:, 0, 0]. Coupled: [B, K, 1 + V].
        backend, out, workspace: as in `row_distribution`; `out` may be `draft` itself if it has a
            distribution and an entropy.

    Returns:
        the Draft. `check_status(draft.distribution.status)` tells whether a row read had no
        distribution; its position stays masked.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or range.
        BackendError: a forced backend cannot run.

    Example:
        >>> draft = Draft.masked(1, 2, torch.tensor([[0.0, 9.0], [9.0, 0.0]]))
        >>> half = denoise_step(draft, Reveal.chunk(0, 1), 0, 0.0)
        >>> whole = denoise_step(half, Reveal.all(), 1, 0.0)
        >>> whole.tokens.tolist(), whole.tau.tolist()
        ([[1, 0]], [[0, 1]])
    """
    inputs, sizes = checked(
        draft,
        reveal,
        step,
        (temperature, top_k, top_p, min_p),
        (words, seed, round, position),
        pool_rows=pool_rows,
        entropies=entropies,
    )
    results = None
    if out is not None:
        if not isinstance(out, Draft):
            raise TypeError(f"out: expected a Draft, got {kind_of(out)}")
        if out.distribution is None or out.entropy is None:
            raise ValueError("out: expected a Draft with distribution and entropy, got None")
        entropy = out.entropy
        if not entropies and (entropy is draft.entropy or overlap(entropy, draft.entropy)):
            entropy = torch.empty_like(entropy)  # written in its place
        results = Pending(out.tokens, out.tau, out.rows, out.distribution, entropy)
    results = OP(inputs, sizes, draft.tokens.device, backend, results, workspace)
    return after_step(draft, results, inputs, entropies=entropies)


def checked(
    draft: Draft,
    reveal: Reveal,
    step: int,
    sampling: tuple[Any, ...],
    random: tuple[Any, ...],
    *,
    pool_rows: Tensor | None,
    entropies: bool,
) -> tuple[DenoiseStepInputs, Sizes]:
    """The arguments of `denoise_step` as kernels take them, and the sizes that they show."""
    check_draft(draft)
    device = draft.tokens.device
    if draft.logits is None:
        raise ValueError("draft.logits: expected the pool of the model's logits, got None")
    order = check_reveal(reveal, step)
    words, seed, round, position = random
    B, K = draft.tokens.shape
    rows = torch.arange(B * K, device=device).view(B, K) if pool_rows is None else pool_rows
    V = columns("draft.draft_ids", draft.draft_ids, draft.logits.shape[-1], device)
    sizes: Sizes = {"B": B, "K": K, "Vd": V, "words": (B, K, 2 if position is None else 1 + V)}
    if words is None:
        greedy = None if order in DRAWN else sampling[0]
        seed, round = random_key(B, greedy, seed=seed, round=round)
    inputs = OP.check(
        sizes,
        device,
        draft,
        rows,
        reveal,
        step,
        order is Order.ENTROPY or entropies,
        sampling,
        (words, seed, round, position),
    )
    check_step(inputs.step, inputs.draft.tau)
    if draft.draft_ids is not None:
        check_increasing("draft.draft_ids", draft.draft_ids, 2**31)
    check_pool_rows(pool_rows, sizes)
    return inputs, sizes


def after_step(
    draft: Draft, results: Pending, inputs: DenoiseStepInputs, *, entropies: bool
) -> Draft:
    """The draft with what a step has written."""
    order = inputs.reveal.order
    return draft._replace(
        **results._asdict()
        | {
            "value_dependent": draft.value_dependent or order is Order.CONFIDENCE,
            "final_step": inputs.step if order is Order.ALL else draft.final_step,
            "coupled": draft.coupled or inputs.random.position is not None,
            "entropy": results.entropy if entropies else draft.entropy,
        }
    )


def check_reveal(reveal: Reveal, step: int) -> Order:
    """The order of a reveal."""
    if not isinstance(reveal, Reveal):
        raise TypeError(f"reveal: expected a Reveal such as Reveal.all(), got {described(reveal)}")
    if not isinstance(step, Integral) or not 0 <= step < 2**31:
        raise ValueError(f"step: expected an integer in [0, 2^31), got {described(step)}")
    return scalar("order", Order, reveal.order)


def check_step(step: int, tau: Tensor) -> None:
    """Raise unless the step is later than all of tau [B, K], where they can be looked at."""
    if tau.numel() and readable(tau) and step <= (latest := int(tau.max())):
        raise ValueError(
            f"step: expected more than {latest}, the draft's latest reverse step, got {step}; "
            "records are judged by their order"
        )


def check_pool_rows(pool_rows: Tensor | None, sizes: Sizes) -> None:
    """Raise unless rows [B, K] lie in a pool of R rows, where they can be looked at."""
    B, K, R = sizes["B"], sizes["K"], sizes["R"]
    if pool_rows is None:
        if R < B * K:
            raise ValueError(
                f"draft.logits: expected at least B K = {B * K} rows, got {R}; or pass pool_rows"
            )
    elif pool_rows.numel() and readable(pool_rows):
        least, most = int(pool_rows.min()), int(pool_rows.max())
        if least < 0 or most >= R:
            raise ValueError(f"pool_rows: expected rows in [0, {R}), got {least} to {most}")
        if len(pool_rows.unique()) < pool_rows.numel():
            raise ValueError("pool_rows: expected a row for each position, got one twice")
