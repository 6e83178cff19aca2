"""`skinny_linear`: a linear layer on a few rows, for one reading of its weight."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..backends import implementation
from ..checks import check_apart, check_constant, check_tensor, device_of, integer
from ..fields import F32, Sizes
from ..inputs import SkinnyLinearInputs
from ..types import PackedWeight
from .registry import Op, watched


class Product(NamedTuple):
    out: Annotated[Tensor, F32("M N")]


OP = Op("skinny_linear", SkinnyLinearInputs, Product)
FLOAT = (torch.float32,)
WEIGHTS = (torch.float32, torch.bfloat16)
PACK = 16  # rows of the weight side by side


def pack_weight(
    weight: Tensor, dtype: torch.dtype | None = None, *, out: Tensor | None = None
) -> PackedWeight:
    """A copy of a weight, laid out for `skinny_linear`: 16 rows side by side, column after column.

    As much memory as the weight, rounded up to whole packs, or half of it as bf16.

    Args:
        weight: f32 or bf16 [N, K], any strides.
        dtype: of the copy, torch.float32 or torch.bfloat16; None: the weight's.
        out: contiguous [ceil(N / 16), K, 16] of that dtype, memory for the copy; None: new.

    Raises:
        ValueError, TypeError: an argument of the wrong shape or dtype.

    Example:
        >>> pack_weight(torch.ones(20, 3)).packs.shape
        torch.Size([2, 3, 16])
    """
    device = device_of("weight", weight)
    check_tensor("weight", weight, (None, None), ("N", "K"), WEIGHTS, device)
    dtype = weight.dtype if dtype is None else dtype
    if dtype not in WEIGHTS:
        raise TypeError(f"dtype: expected torch.float32 or torch.bfloat16, got {dtype}")
    N, K = weight.shape
    rows = F.pad(weight.detach().to(dtype), (0, 0, 0, -N % PACK))
    packs = rows.view(rows.shape[0] // PACK, PACK, K).transpose(1, 2)
    if out is None:
        return PackedWeight(packs.contiguous(), N)
    check_tensor("out", out, packed_shape(N, K), ("packs", "K", f"{PACK}"), (dtype,), device)
    if not out.is_contiguous():
        raise ValueError("out: expected contiguous memory, got a strided view")
    return PackedWeight(out.copy_(packs), N)


def packed_shape(N: int, K: int) -> tuple[int, int, int]:
    """Of the copy of a weight [N, K]."""
    return -(-N // PACK), K, PACK


def skinny_linear(
    x: Tensor,
    weight: Tensor | PackedWeight,
    bias: Tensor | None = None,
    *,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """x weight^T + bias in fp32, meant for M <= 32 rows and cheapest up to about 9.

    A target that checks K drafted tokens multiplies K + 1 rows by every weight. On a CPU the time
    goes into reading the weight, which one pass can serve all rows with. One that is
    used where it lies is turned on the way, which takes about half as long again as a packed one.

    A row of the result does not depend on the other rows, nor on M or the number of threads, nor on
    whether the weight is packed, bit for bit. This is no part of the sampling distribution:
    backends agree within rounding only. Against fp64 the error is at most twice that of
    `torch.nn.functional.linear` in fp32.

    Args:
        x: f32 [M, K], rows of any stride.
        weight: f32 or bf16 [N, K], rows of any stride, used where it lies, or what `pack_weight`
            made of it; bf16 is widened, exactly.
        bias: f32 [N], or None.
        backend: force one; see `available_backends`.
        out: f32 [M, N] to write into; it may not overlap an input.

    Returns:
        f32 [M, N].

    Raises:
        ValueError, TypeError: an argument of the wrong shape or dtype, or one that requires a
            gradient where they are enabled: there is no derivative.
        BackendError: a forced backend cannot run.

    Example:
        >>> skinny_linear(torch.ones(1, 3), torch.ones(2, 3), torch.tensor([0.0, 1.0])).tolist()
        [[3.0, 4.0]]
    """
    device = device_of("x", x)
    check_tensor("x", x, (None, None), ("M", "K"), FLOAT, device)
    if isinstance(weight, PackedWeight):
        weight, N = weight
        N = N if type(N) is int else integer("weight.rows", N)
        shape = packed_shape(N, x.shape[1])
        check_tensor("weight.packs", weight, shape, ("packs", "K", f"{PACK}"), WEIGHTS, device)
        weight = weight.contiguous()
    else:
        check_tensor("weight", weight, (None, x.shape[1]), ("N", "K"), WEIGHTS, device)
        N = weight.shape[0]
    for name, value in (("x", x), ("weight", weight), ("bias", bias)):
        check_constant(name, value, "use torch.nn.functional.linear, or torch.no_grad()")
    sizes: Sizes = {"weight": weight.shape}
    inputs = OP.check(sizes, device, x, weight, N, bias)
    if out is None:
        return OP(inputs, sizes, device, backend).out
    check_apart(out, x=x, weight=weight, bias=bias)
    return OP(inputs, sizes, device, backend, Product(out)).out


def unchecked(x: Tensor, weight: Tensor | PackedWeight, bias: Tensor | None) -> Tensor:
    """`skinny_linear` of contiguous f32 x [..., K], not empty, for a caller who has checked all
    arguments, and that rows of the weight are contiguous.

    Checks take longer than a small product, and a model makes hundreds of them for each token.
    """
    tensor, N = weight if isinstance(weight, PackedWeight) else (weight, weight.shape[0])
    K = x.shape[-1]
    shape = (*x.shape[:-1], N)
    if watched((x, tensor, bias)):
        return skinny_linear(x.reshape(-1, K), weight, bias).view(shape)
    out = torch.empty(shape, dtype=torch.float32, device=x.device)
    multiply = implementation("skinny_linear", x.device, None)
    multiply(SkinnyLinearInputs(x.view(-1, K), tensor, N, bias), out=out.view(-1, N))
    return out
