"""A linear layer, row by row."""

from __future__ import annotations

from torch import Tensor

from ..inputs import SkinnyLinearInputs


def skinny_linear(inputs: SkinnyLinearInputs, *, out: Tensor) -> None:
    """[M, K], [N, K] or packed [ceil(N / 16), K, 16], [N] -> [M, N]. Rows one at a time, as copies:
    none can depend on the others, nor any on where it lies."""
    x, weight, N, bias = inputs
    if weight.ndim == 3:
        weight = weight.transpose(1, 2).reshape(-1, weight.shape[1])[:N]
    weight = weight.float().contiguous()
    for m, row in enumerate(x):
        product = weight @ row.clone()
        out[m] = product if bias is None else product + bias
