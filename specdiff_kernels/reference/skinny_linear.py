"""A linear layer, row by row."""

from __future__ import annotations

from torch import Tensor


def skinny_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *, out: Tensor) -> None:
    """[..., K], [N, K], [N] -> [..., N]

    Rows one at a time, as copies: none can depend on the others, nor any on where it lies.
    """
    weight = weight.float().contiguous()
    products = out.flatten(0, -2)
    for m, row in enumerate(x.flatten(0, -2)):
        product = weight @ row.clone()
        products[m] = product if bias is None else product + bias
