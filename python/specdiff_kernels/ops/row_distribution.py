"""`row_distribution`: the exact distribution of rows of logits."""

from __future__ import annotations

from torch import Tensor

from ..checks import device_of
from ..fields import Sizes
from ..inputs import RowDistributionInputs
from ..types import RowDistribution
from .registry import Op

OP = Op("row_distribution", RowDistributionInputs, RowDistribution, workspace=True)


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

    Token v weighs e(v) = floor(2^(44 + l_v log2(e) / temperature - shift)), up to a relative error
    of 2e-7 that is the same on every backend; its probability is e(v) / total. The shift is the
    row's own, so that the largest logit weighs 2^42 to 2^44 (`RowDistribution.origin`).
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
    sizes: Sizes = {}
    inputs = OP.check(sizes, device, logits, (temperature, top_k, top_p, min_p))
    return OP(inputs, sizes, device, backend, out, workspace)
