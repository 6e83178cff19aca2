"""Faster forwards of a Hugging Face model on a CPU, where a few tokens at a time are decoded."""

from __future__ import annotations

from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from specdiff_kernels import skinny_linear

ROWS = 32  # most rows that a weight is read for once; more go to torch
Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, *, bf16: bool = False) -> Model:
    """Swap the linear layers of an fp32 model on a CPU for `skinny_linear`, in place.

    Several tokens, up to 32 counted over the batch, then cost little more than one. A row's product
    is the same, bit for bit, in every such forward: linear layers give a token the same whether it
    is decoded alone or verified among K + 1. Attention is torch's own and may round differently.

    Layers that are not fp32 on a CPU are left alone, and so is a forward that needs gradients.
    Weights are used where they lie; GPT-2's are transposed in place.

    Args:
        model: any module.
        bf16: read weights rounded to bf16 instead, which halves the traffic and changes the
            logits. The fp32 weights are kept for `restore`, so memory grows by half.

    Returns:
        the same model.

    Example:
        >>> target = Target(accelerate(model))
    """
    restore(model)
    for module in model.modules():
        if not isinstance(module, (nn.Linear, Conv1D)):
            continue
        weight = module.weight
        if weight.dtype != torch.float32 or weight.device.type != "cpu":
            continue
        if isinstance(module, Conv1D):  # [in, out]: laid out as [out, in], seen as before
            weight.data = weight.data.t().contiguous().t()
            weight = weight.t()
        if bf16:
            weight = weight.detach().bfloat16()
        forward = partial(linear, weight=weight, bias=module.bias)
        module.forward = forward  # type: ignore[method-assign]
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`. Returns the same model."""
    for module in model.modules():
        if swapped(module):
            del module.forward
    return model


def is_accelerated(model: nn.Module) -> bool:
    """Whether any layer of a model is swapped."""
    return any(swapped(module) for module in model.modules())


def swapped(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func is linear


def linear(x: Tensor, *, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x [..., K], weight [N, K] -> [..., N]"""
    K = x.shape[-1]
    gradient = torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)
    if gradient or x.numel() > ROWS * K or x.dtype != torch.float32:
        return F.linear(x, weight.to(x.dtype), bias)
    return skinny_linear(x.reshape(-1, K), weight, bias).view(*x.shape[:-1], weight.shape[0])
