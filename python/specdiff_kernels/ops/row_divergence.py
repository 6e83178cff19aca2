"""`row_divergence`: how far a drafter's distribution is from its target's, with its gradient."""

from __future__ import annotations

from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_constant, check_increasing, columns, device_of, expect_record
from ..fields import FLOATS, Sizes
from ..inputs import RowDivergenceBackwardInputs, RowDivergenceInputs
from ..types import Divergences, RowDivergence
from .registry import LIBRARY, Op


class Gradient(NamedTuple):
    out: Annotated[Tensor, FLOATS("N D", like="forward.draft_logits")]


OP = Op("row_divergence", RowDivergenceInputs, Divergences, differentiable=True)
BACKWARD = Op(
    "row_divergence_backward",
    RowDivergenceBackwardInputs,
    Gradient,
    differentiable=True,  # twice is not written: torch warns of that
)


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
    for name, value in (("target_logits", target_logits), ("temperature", temperature)):
        check_constant(name, value, f"only the draft is trained: pass {name}.detach()")
    sizes: Sizes = {}
    if target_logits.ndim == 2:
        V = sizes["V"] = target_logits.shape[1]
        sizes["D"] = columns("draft_ids", draft_ids, V, device)
    inputs = OP.check(sizes, device, target_logits, draft_logits, draft_ids, temperature)
    if draft_ids is not None:
        check_increasing("draft_ids", draft_ids, V)
    if out is None:
        return OP(inputs, sizes, device, backend).rows
    expect_record("out", RowDivergence, out)
    if torch.is_grad_enabled() and draft_logits.requires_grad:
        raise ValueError("out: expected None where draft_logits requires a gradient, got tensors")
    statistics = target_logits.new_empty(sizes["N"], 8, dtype=torch.float64)
    return OP(inputs, sizes, device, backend, Divergences(out, statistics)).rows


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.backend = inputs
    *_, target_entropy, _, statistics = output
    ctx.mark_non_differentiable(target_entropy, statistics)
    ctx.save_for_backward(*tensors, statistics)


def _backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
    tv, kl, reverse_kl, _, draft_entropy, _ = upstream
    *forward, statistics = ctx.saved_tensors
    gradients = (tv, kl, reverse_kl, draft_entropy)
    sizes: Sizes = {}
    inputs = BACKWARD.check(sizes, statistics.device, forward, statistics, *gradients)
    gradient = BACKWARD(inputs, sizes, statistics.device, ctx.backend).out
    return None, gradient, None, None, None


torch.library.register_autograd(
    "specdiff::row_divergence", _backward, setup_context=_save, lib=LIBRARY
)
