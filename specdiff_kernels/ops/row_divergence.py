"""`row_divergence`: how far a drafter's distribution is from its target's, with its gradient."""

from __future__ import annotations

from collections.abc import Callable
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..types import RowDivergence, RowStatistics
from .checks import (
    INT64,
    check_constant,
    check_increasing,
    check_logits,
    check_tensor,
    contiguous,
    device_of,
    per_row,
)
from .registry import LIBRARY, Outputs, define


def row_divergence(
    target_logits: Tensor,
    draft_logits: Tensor,
    draft_ids: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    *,
    backend: str | None = None,
    out: RowDivergence | None = None,
) -> RowDivergence:
    """Total variation, both Kullback-Leibler divergences and entropies of rows of two logits.

    p = softmax(target_logits / temperature) over V tokens, q = softmax(draft_logits / temperature)
    over the D drafted ones; no probability tensor is written. In nats, sums over drafted tokens:

        tv = sum (q - p)+             = 1 - sum min(p, q): the probability of a rejection
        kl = sum p (log p - log q)    KL(p || q) if D = V; what cannot be drafted is left out
        reverse_kl = sum q (log q - log p)

    with 0 log 0 = 0; kl is inf where only q is 0, reverse_kl where only p is, and a probability is
    0 where its logit is -inf. 1 - tv is how often `verify` accepts a token drawn from q (Leviathan
    et al. 2211.17192, Theorem 3.5 and Corollary 3.6; Yin et al. 2411.00841).

    All but target_entropy have a gradient, with respect to draft_logits alone. It is 0 where a
    draft logit is -inf. An output whose upstream gradient is 0 adds exactly 0, even if it is inf or
    NaN; any other gradient of a NaN row or of an infinite reverse_kl is NaN.

    A row of the result does not depend on the other rows, nor on N or, in cpp, the number of
    threads. This is no part of the sampling distribution: backends agree within rounding only.
    Against fp64 the error is at most twice that of the same sums in fp32 by torch.

    Args:
        target_logits: [N, V] f32, bf16 or f16; rows of any stride; 1 <= V < 2^19.
        draft_logits: [N, D] f32, bf16 or f16; rows of any stride.
        draft_ids: i64 [D], strictly increasing: target id of each column of draft_logits; None:
            D is V, column is token.
        temperature: a number or f32 [N] in [2^-95, 2^95], of both distributions.
        backend: force one; see `available_backends`.
        out: a RowDivergence to write into, if no gradient is asked for.

    Returns:
        RowDivergence of f32 [N] tensors. All of a row is NaN if either of its logits has NaN or
        +inf or is all -inf, or its entry of a temperature tensor is out of range, or draft_ids
        that could not be looked at (compiled code, a GPU) are wrong.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or range, or one other than
            draft_logits that requires a gradient.
        BackendError: a forced backend cannot run.

    Example:
        >>> p, q = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.75, 0.25]])
        >>> draft_logits = q.log().requires_grad_()
        >>> row = row_divergence(p.log(), draft_logits)
        >>> row.tv.item()
        0.25
        >>> row.kl.sum().backward()
        >>> draft_logits.grad  # q - p
        tensor([[ 0.2500, -0.2500]])
    """
    device = device_of("target_logits", target_logits)
    target_logits = check_logits("target_logits", target_logits, (None, None), device)
    N, V = target_logits.shape
    if draft_ids is not None:
        check_tensor("draft_ids", draft_ids, (None,), INT64, device)
        check_increasing("draft_ids", draft_ids, V)
    D = V if draft_ids is None else draft_ids.shape[0]
    draft_logits = check_logits("draft_logits", draft_logits, (N, D), device)
    for name, value in (("target_logits", target_logits), ("temperature", temperature)):
        check_constant(name, value, f"only the draft is trained: pass {name}.detach()")
    args = (
        target_logits,
        draft_logits,
        *contiguous(draft_ids),
        check_temperature(temperature, N, device),
        backend,
    )
    if out is None:
        return RowDivergence(*OP.functional(*args)[:-1])
    if torch.is_grad_enabled() and draft_logits.requires_grad:
        raise ValueError("out: expected None where draft_logits requires a gradient, got tensors")
    statistics = target_logits.new_empty(N, len(RowStatistics._fields), dtype=torch.float64)
    OP.into(*args, *out, statistics)
    return out


def check_temperature(value: float | Tensor, N: int, device: torch.device) -> Tensor | None:
    """As a tensor [N]; unlike a sampler's it may not be 0."""
    number = isinstance(value, Real) and 2.0**-95 <= value <= 2.0**95
    if not number and not isinstance(value, Tensor):
        raise ValueError(f"temperature: expected a number in [2^-95, 2^95], got {value!r}")
    return per_row("temperature", value, N, device)


def _outputs(target_logits: Tensor, *_: Any) -> Outputs:
    N = target_logits.shape[0]
    rows = [([N], torch.float32) for _ in RowDivergence._fields]
    return [*rows, ([N, len(RowStatistics._fields)], torch.float64)]


def _call(function: Callable[..., None], *args: Any, out: Any) -> None:
    function(*args, out=out)


OP = define(
    "row_divergence",
    "Tensor target_logits, Tensor draft_logits, Tensor? draft_ids, Tensor temperature",
    (*RowDivergence._fields, "statistics"),
    _outputs,
    _call,
    differentiable=True,
)


def _gradient(target_logits: Tensor, draft_logits: Tensor, *_: Any) -> Outputs:
    return [(list(draft_logits.shape), draft_logits.dtype)]


def _call_backward(function: Callable[..., None], *args: Any, out: Any) -> None:
    function(*args, out=out[0])


BACKWARD = define(
    "row_divergence_backward",
    "Tensor target_logits, Tensor draft_logits, Tensor? draft_ids, Tensor temperature, "
    "Tensor statistics, Tensor tv, Tensor kl, Tensor reverse_kl, Tensor draft_entropy",
    ["out"],
    _gradient,
    _call_backward,
    differentiable=True,  # twice is not written: torch warns of that
)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.backend = inputs
    *_, target_entropy, _, statistics = output
    ctx.mark_non_differentiable(target_entropy, statistics)
    ctx.save_for_backward(*tensors, statistics)


def _backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    tv, kl, reverse_kl, _, draft_entropy, _ = upstream
    gradients = contiguous(tv, kl, reverse_kl, draft_entropy)
    gradient = BACKWARD.functional(*ctx.saved_tensors, *gradients, ctx.backend)
    return None, gradient, None, None, None


torch.library.register_autograd(
    "specdiff::row_divergence", _backward, setup_context=_save, lib=LIBRARY
)
