"""`linear_divergence`: divergence of distributions whose logits come from a last linear layer.

The logits of thousands of rows, for draft and target, and their gradient take hundreds of
megabytes. So this works on some rows at a time: it computes their logits, their divergence and the
gradients of the layer's inputs and weights, and keeps only these gradients. Fused linear
cross-entropies do the same.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from specdiff_kernels import RowDivergence, row_divergence

ROWS = 512  # rows at a time


def linear_divergence(
    inputs: Tensor,
    target: Tensor,
    weight: Tensor,
    output: Tensor,
    learnt: Tensor | None,
    bias: Tensor,
    value: Callable[[RowDivergence], Tensor],
) -> Tensor:
    """Weighted sum over rows of a divergence between draft and target.

    The target's logits are `target` times `output`. The draft's are `inputs` times [output |
    learnt] plus `bias`. Gradients flow to `inputs`, `learnt` and `bias`, and only first-order ones.
    Under autocast, matrix products have its dtype, and sums over rows are in fp32. Otherwise all is
    in fp32.

    Args:
        inputs: [N, d + r].
        target: [N, d].
        weight: f32 [N], weights of the rows.
        output: [D, d], fixed.
        learnt: [D, r]; None: r is 0.
        bias: f32 [D].
        value: maps the rows' `RowDivergence` to values [N].

    Returns:
        f32 []

    Example:
        >>> kl = linear_divergence(x, h, torch.ones(len(x)), head, None, bias, lambda row: row.kl)
        >>> kl.backward()
    """
    device = inputs.device.type
    lower = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if lower else torch.float32
    with torch.autocast(device, enabled=False):
        return LinearDivergence.apply(
            inputs, target, weight, output, learnt, bias, value, dtype, torch.is_grad_enabled()
        )


class LinearDivergence(torch.autograd.Function):
    """Computes the gradient in the forward, because only there its inputs are in memory."""

    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        target: Tensor,
        weight: Tensor,
        output: Tensor,
        learnt: Tensor | None,
        bias: Tensor,
        value: Callable[[RowDivergence], Tensor],
        dtype: torch.dtype,
        learning: bool,
    ) -> Tensor:
        d = output.shape[1]
        output = output.to(dtype)
        matrix = output if learnt is None else torch.cat((output, learnt.to(dtype)), 1)
        total = bias.new_zeros(())
        to_inputs, to_bias = torch.empty_like(inputs), torch.zeros_like(bias)
        to_learnt = None if learnt is None else torch.zeros_like(learnt)
        for start in range(0, len(inputs), ROWS):
            rows = slice(start, start + ROWS)
            x = inputs[rows].to(dtype)
            distribution = F.linear(target[rows].to(dtype), output)
            logits = F.linear(x, matrix).float().add_(bias).requires_grad_(learning)
            with torch.set_grad_enabled(learning):
                part = (value(row_divergence(distribution, logits)) * weight[rows]).sum()
            total += part.detach()
            if not learning:
                continue
            (gradient,) = torch.autograd.grad(part, logits)
            to_bias += gradient.sum(0)
            gradient = gradient.to(dtype)
            to_inputs[rows] = gradient @ matrix
            if to_learnt is not None:
                to_learnt += gradient.T @ x[:, d:]
        ctx.save_for_backward(to_inputs, to_learnt, to_bias)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, upstream: Tensor) -> tuple[Tensor | None, ...]:
        to_inputs, to_learnt, to_bias = (
            x if x is None else x * upstream for x in ctx.saved_tensors
        )
        return to_inputs, None, None, None, to_learnt, to_bias, None, None, None
