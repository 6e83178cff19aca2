"""Faster forwards of a Hugging Face model on a CPU, where a few tokens at a time are decoded."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from specdiff_kernels.ops.checks import concrete
from specdiff_kernels.ops.skinny_linear import unchecked

ROWS = 32  # most rows that a weight is read for once; more go to torch
LAYERS = (nn.Linear, Conv1D)  # and no subclass, which may compute something else
Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, *, bf16: bool = False) -> Model:
    """Swap the linear layers of an fp32 model on a CPU for `skinny_linear`, in place.

    Forwards of 2 to 9 rows (tokens times batch) then cost little more than one of a single row,
    and up to 32 rows gain. Up to there a row's product is the same, bit for bit, in every forward:
    linear layers give a token the same whether it is decoded alone or verified among K + 1.
    Attention is torch's own and may round differently.

    A forward that needs gradients, has more rows, or is not in fp32 on a CPU goes the usual way.
    Weights are used where they lie; GPT-2's are transposed in place.

    Args:
        model: any module.
        bf16: read weights rounded to bf16 instead, which halves the traffic and changes the
            logits. The fp32 weights stay as well, so memory grows by half. Pays for few rows.

    Returns:
        the same model.

    Example:
        >>> target = Target(accelerate(model))
    """
    restore(model)
    module: Any
    for module in model.modules():
        if type(module) not in LAYERS or "forward" in vars(module) or not usable(module.weight):
            continue
        if type(module) is Conv1D:  # [in, out]: laid out as [out, in], seen as before
            module.weight.data = module.weight.data.t().contiguous().t()
        module.forward = Swapped(module, bf16)
    return model


def restore(model: Model) -> Model:
    """Undo `accelerate`. Returns the same model."""
    module: Any
    for module in model.modules():
        if swapped(module):
            del module.forward
            if type(module) is Conv1D:
                module.weight.data = module.weight.data.contiguous()
    return model


def is_accelerated(model: nn.Module) -> bool:
    """Whether any layer of a model is swapped."""
    return any(swapped(module) for module in model.modules())


def swapped(module: nn.Module) -> bool:
    return isinstance(vars(module).get("forward"), Swapped)


def usable(tensor: Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.is_cpu


class Swapped:
    """The forward of a swapped layer.

    A model makes hundreds of calls for each token, and each finds its objects far from the caches,
    which the weights have been through. So what is known of a layer's parameters is looked up once
    for as long as they stay.
    """

    def __init__(self, module: Any, bf16: bool) -> None:
        self.module, self.bf16 = module, bf16
        self.key: tuple[Any, ...] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """x [..., K] -> [..., N]"""
        own = self.module._parameters
        parameters = own.get("weight"), own.get("bias")
        weight, bias = self.known(*parameters), parameters[1]
        size = x.numel()
        if weight is None or size == 0 or not usable(x) or learns(x, *parameters):
            return self.usual(x)
        K = weight.shape[1]
        if x.shape[-1] == K and size <= ROWS * K:
            return unchecked(x.contiguous(), weight, bias)
        return F.linear(x, weight.float(), bias) if self.bf16 else self.usual(x)

    def known(self, weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
        """`prepared`, kept for as long as both are what they were."""
        if weight is None or not concrete(weight) or not (bias is None or concrete(bias)):
            return self.prepared(weight, bias)
        key = (identity(weight), identity(bias))
        if key != self.key:
            self.key, self.weight = key, self.prepared(weight, bias)
            self.held = weight, bias  # or another could be made in their memory
        return self.weight

    def usual(self, x: Tensor) -> Tensor:
        return type(self.module).forward(self.module, x)

    def prepared(self, weight: Tensor | None, bias: Tensor | None) -> Tensor | None:
        """The weight as [N, K] with contiguous rows; None if torch has to have it, as when the
        layer has been parametrized since, and with it the error, if it is one."""
        if weight is None or not usable(weight):
            return None
        weight = weight.detach().t() if type(self.module) is Conv1D else weight.detach()
        if bias is not None and not (
            usable(bias) and bias.shape == weight.shape[:1] and bias.is_contiguous()
        ):
            return None
        weight = weight.bfloat16() if self.bf16 else weight
        return weight if weight.stride(1) == 1 else weight.contiguous()


def identity(tensor: Tensor | None) -> tuple[int, int, int] | None:
    """Another one for another tensor, other memory, or after a change in place."""
    if tensor is None:
        return None
    return id(tensor), tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def learns(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
