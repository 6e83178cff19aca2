"""`row_distribution`: the exact distribution of rows of logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from ..types import DISTRIBUTION_DTYPES, RowDistribution
from .checks import check_logits, check_workspace, device_of, per_row
from .registry import Outputs, define


def row_distribution(
    logits: Tensor,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor | None = None,
    top_p: float | Tensor | None = None,
    min_p: float | Tensor | None = None,
    *,
    backend: str | None = None,
    out: RowDistribution | None = None,
    workspace: Tensor | None = None,
) -> RowDistribution:
    """Reduce rows of logits to integer distributions: all that later ops need beside the logits.

    Token v weighs e(v) = floor(2^(44 + (l_v - max) log2(e) / temperature)), up to a polynomial of
    relative error 1.7e-7 that is the same on every backend; its probability is e(v) / total.
    Truncation composes as in transformers: temperature, top-k (ties kept), top-p, min-p.

    Args:
        logits: [N, V] f32, bf16 or f16; rows of any stride; 1 <= V < 2^19.
        temperature: a number or f32 [N]. 0 makes a row greedy: all weight on the lowest-index
            largest logit, whatever the truncation.
        top_k: an integer or i64 [N]; 0 is off.
        top_p: a number or f32 [N] in [2^-149, 1], read as a multiple of 2^-31.
        min_p: a number or f32 [N] in [0, 1], relative to the largest probability.
        backend: force one; see `available_backends`.
        out: a RowDistribution to write into.
        workspace: with `out`, scratch to use in place of an allocation; see `workspace_size`.

    Returns:
        RowDistribution of [N] tensors. A row without a distribution (NaN, +inf, all -inf, a
        parameter tensor's entry out of range) has a status other than OK and total 0.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or range.
        BackendError: a forced backend cannot run.

    Example:
        >>> distribution = row_distribution(torch.tensor([[0.0, 0.0, float("-inf")]]))
        >>> distribution.total.item() == 2 * 2**44
        True
    """
    device = device_of("logits", logits)
    logits = check_logits("logits", logits, (None, None), device)
    N = logits.shape[0]
    args = (
        logits,
        per_row("temperature", temperature, N, device),
        per_row("top_k", top_k, N, device),
        per_row("top_p", top_p, N, device),
        per_row("min_p", min_p, N, device),
        backend,
    )
    check_workspace(workspace, out, device)
    if out is not None:
        OP.into(*args, workspace, *out)
        return out
    return RowDistribution(*OP.functional(*args))


def _outputs(logits: Tensor, *_: Any) -> Outputs:
    shape = [logits.shape[0]]
    return [(shape, dtype) for dtype in DISTRIBUTION_DTYPES]


def _call(function: Callable[..., None], *args: Any, out: Any) -> None:
    function(*args, out=RowDistribution(*out))


OP = define(
    "row_distribution",
    "Tensor logits, Tensor temperature, Tensor? top_k, Tensor? top_p, Tensor? min_p",
    RowDistribution._fields,
    _outputs,
    _call,
    workspace=True,
)
