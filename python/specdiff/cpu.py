"""Faster forwards of a Hugging Face model on a CPU, where a few tokens at a time are decoded."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from specdiff_kernels.ops.skinny_linear import unchecked

ROWS = 32  # most rows that a weight is read for once; more go to torch
LAYERS = (nn.Linear, Conv1D)  # and no subclass, which may compute something else
Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, *, bf16: bool = False) -> Model:
    """Swap the linear layers of an fp32 model on a CPU for `skinny_linear`, in place.

    Forwards of 2 to 5 rows (tokens times batch) then cost little more than one of a single row,
    and up to 32 rows gain. Up to there a row's product is the same, bit for bit, in every forward:
    linear layers give a token the same whether it is decoded alone or verified among K + 1.
    Attention is torch's own and may round differently.

    A forward that needs gradients, has more rows, or is not in fp32 on a CPU goes the usual way.
    Weights are used where they lie; GPT-2's are transposed in place.

    Args:
        model: any module.
        bf16: read weights rounded to bf16 instead, which halves the traffic and changes the
            logits. The fp32 weights stay as well, so memory grows by half. Pays for few rows.
            After a change through `weight.data`, which nothing tells of, accelerate anew.

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
        module.forward = partial(linear, module, Halved() if bf16 else None)
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
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func is linear


def usable(tensor: Tensor) -> bool:
    return tensor.dtype is torch.float32 and tensor.is_cpu


def fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `unchecked` may have them; what does not fit is torch's, and so is the error."""
    if bias is not None and not (usable(bias) and bias.shape == weight.shape[:1]):
        return False
    return usable(x) and usable(weight) and x.shape[-1] == weight.shape[1]


def learns(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class Halved:
    """A weight rounded to bf16, rounded anew when it has changed, but for changes through .data."""

    def __init__(self) -> None:
        self.key: tuple[Any, ...] | None = None

    def of(self, weight: Tensor) -> Tensor:
        version = 0 if weight.is_inference() else weight._version
        key = (weight.data_ptr(), version, weight.shape, weight.stride())
        if key != self.key:
            self.weight, self.key = weight.detach().bfloat16(), key
        return self.weight


def linear(module: Any, halved: Halved | None, x: Tensor) -> Tensor:
    """The forward of a swapped layer. x [..., K] -> [..., N]"""
    own = module._parameters  # an attribute of a module takes longer to find than a row to multiply
    if "weight" not in own or "bias" not in own:  # parametrized, or replaced by a tensor
        return type(module).forward(module, x)
    weight, bias = own["weight"], own["bias"]
    size = x.numel()
    if weight is None or size == 0 or learns(x, weight, bias):
        return type(module).forward(module, x)
    if type(module) is Conv1D:
        weight = weight.t()
    if not fits(x, weight, bias):
        return type(module).forward(module, x)
    few = size <= ROWS * x.shape[-1]
    if halved is None and not few:
        return type(module).forward(module, x)
    if halved is not None:
        weight = halved.of(weight)
    if not few:
        return F.linear(x, weight.float(), bias)
    if weight.stride(1) != 1:
        weight = weight.contiguous()
    return unchecked(x.contiguous(), weight, bias if bias is None else bias.contiguous())
