"""Faster forwards of a Hugging Face model on a CPU, where a few tokens at a time are decoded."""

from __future__ import annotations

from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from specdiff_kernels import PackedWeight, pack_weight
from specdiff_kernels.backends import find
from specdiff_kernels.ops.skinny_linear import packed_shape, unchecked

from .memory import Store

LAYERS = (nn.Linear, Conv1D)  # and no subclass, which may compute something else
Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, *, packed: bool = True, bf16: bool = False) -> Model:
    """Swap the linear layers of an fp32 model on a CPU for `skinny_linear`, in place.

    Forwards of 2 to 9 rows (tokens times batch) then cost little more than one of a single row. A
    row's product is the same, bit for bit, in every forward: linear layers give a token the same
    whether it is decoded alone, verified among K + 1 or read with its prompt. Attention is torch's
    own and may round differently.

    Each layer packs a copy of its weight when it is first used, in huge pages, and keeps the weight
    too: linear layers take twice the memory. A forward that needs gradients, or is not in fp32 on a
    CPU, goes the usual way.

    Args:
        model: any module.
        packed: False uses weights where they lie, without a copy and with the same bits, and takes
            about half as long again for few rows. GPT-2's are transposed in place.
        bf16: round the copies to bf16, which halves them and the traffic, and changes the logits.

    Returns:
        the same model. Its copies follow its weights: each is made again when its weight has
        changed. A write through `weight.data`, or NumPy, leaves no trace but in the values, of
        which each call looks at 64: it sees that a LoRA adapter was merged, or all values
        changed in some other way. After such a write to a part of a weight, as to one row,
        accelerate anew; or write to the weight itself under `torch.no_grad()`, which is counted.

    Raises:
        ValueError: bf16 without packed.

    Example:
        >>> target = Target(accelerate(model))
    """
    if bf16 and not packed:
        raise ValueError("bf16: a rounded weight is a copy, which is packed: leave packed=True")
    restore(model)
    store = Store()
    module: Any
    for module in model.modules():
        if type(module) not in LAYERS or "forward" in vars(module) or not usable(module.weight):
            continue
        if type(module) is Conv1D and not packed:  # [in, out]: laid out as [out, in], seen as ever
            module.weight.data = module.weight.data.t().contiguous().t()
        copy = Packed(torch.bfloat16 if bf16 else torch.float32, store) if packed else None
        module.forward = partial(linear, module, copy)
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
    """Whether it is fp32 in memory; a subclass, as of quantised weights, may only say so."""
    return (
        type(tensor) in (Tensor, nn.Parameter) and tensor.dtype is torch.float32 and tensor.is_cpu
    )


def fits(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether `unchecked` may have them; what does not fit is torch's, and so is the error."""
    if bias is not None and not (usable(bias) and bias.shape == weight.shape[:1]):
        return False
    return usable(x) and usable(weight) and x.shape[-1] == weight.shape[1]


def learns(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class Packed:
    """A weight's packed copy, made anew when writes were counted or its fingerprint differs."""

    __slots__ = ("dtype", "fingerprint", "key", "store", "weight")

    def __init__(self, dtype: torch.dtype, store: Store) -> None:
        self.dtype, self.store = dtype, store
        self.weight = PackedWeight(torch.empty(0, dtype=dtype), 0)
        self.fingerprint = find("fingerprint", "cpu", None)  # the same of every backend
        self.key: tuple[int, int] | None = None

    def of(self, weight: Tensor) -> PackedWeight:
        try:
            version = weight._version
        except RuntimeError:  # an inference tensor counts none; asking first takes longer
            version = 0
        key = (version, self.fingerprint(weight))
        if key != self.key:
            shape, place = packed_shape(*weight.shape), self.weight.packs
            if place.shape != shape:
                place = self.store.take(shape, self.dtype)
            self.weight, self.key = pack_weight(weight, self.dtype, out=place), key
        return self.weight

    def __reduce__(self) -> tuple[type[Packed], tuple[torch.dtype, Store]]:
        return Packed, (self.dtype, self.store)  # a copied or saved model packs for itself


def linear(module: Any, copy: Packed | None, x: Tensor) -> Tensor:
    """The forward of a swapped layer. x [..., K] -> [..., N]"""
    own = module._parameters  # an attribute of a module takes longer to find than a row to multiply
    if "weight" not in own or "bias" not in own:  # parametrized, or replaced by a tensor
        return type(module).forward(module, x)
    weight, bias = own["weight"], own["bias"]
    if weight is None or x.numel() == 0 or learns(x, weight, bias):
        return type(module).forward(module, x)
    if type(module) is Conv1D:
        weight = weight.t()
    if not fits(x, weight, bias):
        return type(module).forward(module, x)
    if copy is not None and torch.compiler.is_compiling():  # a copy cannot be followed there
        weight = weight.to(copy.dtype)
    elif copy is not None:
        weight = copy.of(weight)
    if isinstance(weight, Tensor) and weight.stride(1) != 1:
        weight = weight.contiguous()
    return unchecked(x.contiguous(), weight, bias if bias is None else bias.contiguous())
