"""`skinny_linear`: a linear layer on a few rows, for one reading of its weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..backends import implementation
from .checks import check_tensor, concrete, contiguous, device_of
from .registry import Outputs, define, watched

FLOAT = (torch.float32,)
WEIGHTS = (torch.float32, torch.bfloat16)


def skinny_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x weight^T + bias in fp32, meant for M <= 32 rows and cheapest up to about 9.

    A target that checks K drafted tokens multiplies K + 1 rows by every weight. On a CPU the time
    goes into reading the weight, which one pass can serve all rows with.

    A row of the result does not depend on the other rows, nor on M or the number of threads, bit
    for bit. This is no part of the sampling law: backends agree within rounding only. Against fp64
    the error is at most twice that of `torch.nn.functional.linear` in fp32.

    Args:
        x: f32 [M, K], rows of any stride.
        weight: f32 or bf16 [N, K], rows of any stride, used where it lies; bf16 is widened,
            exactly.
        bias: f32 [N], or None.
        backend: force one; see `available_backends`.
        out: f32 [M, N] to write into; it may not overlap an input.

    Returns:
        f32 [M, N].

    Raises:
        ValueError, TypeError: an argument of the wrong shape or dtype.
        BackendError: a forced backend cannot run.

    Example:
        >>> skinny_linear(torch.ones(1, 3), torch.ones(2, 3), torch.tensor([0.0, 1.0])).tolist()
        [[3.0, 4.0]]
    """
    device = device_of("x", x)
    check_tensor("x", x, (None, None), FLOAT, device)
    check_tensor("weight", weight, (None, x.shape[1]), WEIGHTS, device)
    if bias is not None:
        check_tensor("bias", bias, (weight.shape[0],), FLOAT, device)
    x = x if x.stride(1) == 1 else x.contiguous()
    weight = weight if weight.stride(1) == 1 else weight.contiguous()
    args = (x, weight, *contiguous(bias), backend)
    if out is not None:
        check_apart(out, x=x, weight=weight, bias=bias)
        OP.into(*args, out)
        return out
    return OP.functional(*args)


def unchecked(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """`skinny_linear` of contiguous f32 x [..., K], not empty, for a caller who has checked all
    arguments, and that rows of the weight are contiguous.

    Checks take longer than a small product, and a model makes hundreds of them for each token.
    """
    N, K = weight.shape
    shape = (*x.shape[:-1], N)
    if watched((x, weight, bias)):
        return skinny_linear(x.reshape(-1, K), weight, bias).view(shape)
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    multiply = implementation("skinny_linear", x.device, None)
    multiply(x.view(-1, K), weight, bias, out=out.view(-1, N))
    return out


def check_apart(out: Tensor, **inputs: Tensor | None) -> None:
    """Raise if `out` shares memory with an input, which is read while `out` is written."""
    first, last = memory(out)
    for name, tensor in inputs.items():
        if tensor is not None and memory(tensor)[0] < last and first < memory(tensor)[1]:
            raise ValueError(f"out: expected memory of its own, got some of {name}'s")


def memory(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and behind the last one; none: 0, 0."""
    if not concrete(tensor) or tensor.numel() == 0:
        return 0, 0
    furthest = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + tensor.element_size() * (furthest + 1)


def _outputs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Outputs:
    return [([x.shape[0], weight.shape[0]], torch.float32)]


def _call(function: Callable[..., None], *args: Any, out: Any) -> None:
    function(*args, out=out[0])


OP = define(
    "skinny_linear",
    "Tensor x, Tensor weight, Tensor? bias",
    ["out"],
    _outputs,
    _call,
)
