"""`denoise_step`: one reverse step of absorbing-state diffusion over [B, K] positions."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from ..reveal import Order, Reveal
from ..types import DISTRIBUTION_DTYPES, Draft, Pending, RowDistribution
from .checks import (
    INT64,
    check_random,
    check_tensor,
    check_workspace,
    contiguous,
    device_of,
    overlap,
    per_row,
    plain_number,
    readable,
)
from .registry import Outputs, define
from .verify import check_draft


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
    seed: Tensor | None = None,
    round: Tensor | None = None,
    position: Tensor | None = None,
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
        seed, round: i64 [B], as in `verify`; position i draws with slot i.
        position: i64 [B], absolute position of the draft's first token, for coupled draws; see
            `verify` and `sample`. Reveal decisions still take `round`.
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
        >>> zero = torch.zeros(1, dtype=torch.int64)
        >>> half = denoise_step(draft, Reveal.chunk(0, 1), 0, 0.0, seed=zero, round=zero)
        >>> whole = denoise_step(half, Reveal.all(), 1, 0.0, seed=zero, round=zero)
        >>> whole.tokens.tolist(), whole.tau.tolist()
        ([[1, 0]], [[0, 1]])
    """
    if not isinstance(draft, Draft):
        raise TypeError(f"draft: expected a Draft, got {type(draft).__name__}")
    device = device_of("draft.tokens", draft.tokens)
    if draft.tokens.ndim != 2:
        raise ValueError(f"draft.tokens: expected [B, K], got {list(draft.tokens.shape)}")
    B, K = draft.tokens.shape
    checked = check_draft(draft, B, K, None, device)
    if checked.logits is None or checked.distribution is None:
        raise ValueError("draft.logits: expected the pool of the model's logits, got None")
    R, V = checked.logits.shape
    pool_rows = check_pool_rows(pool_rows, B, K, R, device)
    order, step = check_reveal(reveal, step, checked.tau), plain_number(step, int)
    if position is not None:
        check_tensor("position", position, (B,), INT64, device)
    per_position = 2 if position is None else 1 + V
    check_random(B, device, (B, K, per_position), words, seed=seed, round=round)
    args = (
        checked.logits, checked.tokens, checked.tau, checked.rows, *checked.distribution,
        checked.draft_ids, checked.lengths, pool_rows,
        int(order), reveal.lo, reveal.hi, reveal.number,
        per_row("rate", reveal.rate, B, device), step, entropies or order is Order.ENTROPY,
        per_row("temperature", temperature, B, device),
        per_row("top_k", top_k, B, device),
        per_row("top_p", top_p, B, device),
        per_row("min_p", min_p, B, device),
        *contiguous(seed, round, position, words),
        backend,
    )  # fmt: skip
    check_workspace(workspace, out, device)
    if out is None:
        results = OP.functional(*args)
    else:
        if out.distribution is None or out.entropy is None:
            raise ValueError("out: expected a Draft with distribution and entropy, got None")
        entropy = out.entropy
        if not entropies and (entropy is draft.entropy or overlap(entropy, draft.entropy)):
            entropy = torch.empty_like(entropy)  # written in its place
        results = (out.tokens, out.tau, out.rows, *out.distribution, entropy)
        OP.into(*args, workspace, *results)
    return draft._replace(
        tokens=results[0],
        tau=results[1],
        rows=results[2],
        distribution=RowDistribution(*results[3:8]),
        value_dependent=draft.value_dependent or order is Order.CONFIDENCE,
        final_step=step if order is Order.ALL else draft.final_step,
        coupled=draft.coupled or position is not None,
        entropy=results[8] if entropies else draft.entropy,
    )


def check_reveal(reveal: Reveal, step: int, tau: Tensor) -> Order:
    """The order of a reveal, which a step later than all of tau [B, K] is to make."""
    if not isinstance(reveal, Reveal):
        raise TypeError(f"reveal: expected a Reveal such as Reveal.all(), got {reveal!r}")
    if not isinstance(step, Integral) or not 0 <= step < 2**31:
        raise ValueError(f"step: expected an integer in [0, 2^31), got {step!r}")
    if tau.numel() and readable(tau) and step <= (latest := int(tau.max())):
        raise ValueError(
            f"step: expected more than {latest}, the draft's latest reverse step, got {step}; "
            "records are judged by their order"
        )
    return Order(reveal.order)


def check_pool_rows(
    pool_rows: Tensor | None, B: int, K: int, R: int, device: torch.device
) -> Tensor:
    """Rows [B, K] of a pool of R rows; None: row b K + i."""
    if pool_rows is None:
        if R < B * K:
            raise ValueError(
                f"draft.logits: expected at least B K = {B * K} rows, got {R}; or pass pool_rows"
            )
        return torch.arange(B * K, device=device).view(B, K)
    check_tensor("pool_rows", pool_rows, (B, K), INT64, device)
    if pool_rows.numel() and readable(pool_rows):
        least, most = int(pool_rows.min()), int(pool_rows.max())
        if least < 0 or most >= R:
            raise ValueError(f"pool_rows: expected rows in [0, {R}), got {least} to {most}")
        if len(pool_rows.unique()) < pool_rows.numel():
            raise ValueError("pool_rows: expected a row for each position, got one twice")
    return pool_rows.contiguous()


def _outputs(logits: Tensor, tokens: Tensor, *_: Any) -> Outputs:
    shape, rows = list(tokens.shape), [logits.shape[0]]
    distributions = [(rows, dtype) for dtype in DISTRIBUTION_DTYPES]
    whole = [(shape, torch.int64), (shape, torch.int32), (shape, torch.int64)]
    return [*whole, *distributions, (shape, torch.float64)]


def _call(function: Callable[..., None], *args: Any, out: Any) -> None:
    logits, tokens, tau, rows = args[:4]
    old = Pending(tokens, tau, rows, RowDistribution(*args[4:9]), out[8])
    new = Pending(out[0], out[1], out[2], RowDistribution(*out[3:8]), out[8])
    reveal = Reveal(Order(args[12]), *args[13:16])
    function(logits, old, *args[9:12], reveal, *args[16:], out=new)


OP = define(
    "denoise_step",
    "Tensor logits, Tensor masked_tokens, Tensor old_tau, Tensor old_rows, Tensor old_max, "
    "Tensor old_scale, Tensor old_threshold, Tensor old_total, Tensor old_status, "
    "Tensor? draft_ids, Tensor? lengths, Tensor pool_rows, int order, SymInt lo, SymInt hi, "
    "SymInt number, Tensor rate, SymInt step, bool entropies, Tensor temperature, Tensor? top_k, "
    "Tensor? top_p, Tensor? min_p, Tensor? seed, Tensor? round, Tensor? position, Tensor? words",
    ("tokens", "tau", "rows", *RowDistribution._fields, "entropy"),
    _outputs,
    _call,
    shown=(
        "out.tokens", "out.tau", "out.rows",
        *(f"out.distribution.{name}" for name in RowDistribution._fields), "out.entropy",
    ),
    workspace=True,
)  # fmt: skip
