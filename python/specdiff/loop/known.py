"""Modules whose computation is known here by their class, or by the code of its forward."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from types import FunctionType
from typing import Any

from torch import nn
from transformers import activations as acts
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaMLP, LlamaRMSNorm
from transformers.pytorch_utils import Conv1D

from specdiff_kernels.ops.decoder_layer import Norm

from .only_packed import held
from .packed import usable

LINEAR = (nn.Linear, Conv1D)  # and no subclass, which may compute something else
ACTIVATIONS = {
    nn.SiLU: "silu",
    acts.SiLUActivation: "silu",
    acts.NewGELUActivation: "gelu_tanh",
    acts.GELUTanh: "gelu_tanh",
    acts.GELUActivation: "gelu",
    nn.ReLU: "relu",
}


def llama_norm(norm: Any) -> Norm:
    return Norm("rms", norm.weight, None, norm.variance_epsilon)


def gemma_norm(norm: Any) -> Norm:
    return Norm("rms", norm.weight, None, norm.eps, 1.0)


def torch_layer_norm(norm: Any) -> Norm:
    return Norm("layer", norm.weight, norm.bias, norm.eps)


def torch_rms_norm(norm: Any) -> Norm:
    return Norm("rms", norm.weight, None, norm.eps or 2.0**-23)


NORMS: dict[type, Callable[[Any], Norm]] = {
    nn.LayerNorm: torch_layer_norm,
    nn.RMSNorm: torch_rms_norm,
}
TRANSFORMERS = "transformers.models."
LLAMA_NORM = (LlamaRMSNorm.forward,)  # as they are now, before others may change the classes
GEMMA_NORM = (GemmaRMSNorm.forward, GemmaRMSNorm._norm)
LLAMA_MLP = (LlamaMLP.forward,)


def norm_of(kind: type) -> Callable[[Any], Norm] | None:
    """What reads a norm of a class; None: it is no norm that is known here."""
    if kind in NORMS:
        return NORMS[kind]
    if has_code(kind, *LLAMA_NORM):
        return llama_norm
    return gemma_norm if has_code(kind, *GEMMA_NORM) else None


def read_norm(norm: nn.Module) -> Norm:
    """Of a norm that is known here."""
    read = norm_of(type(norm))
    if read is None:
        raise ValueError(f"norm: expected one that is known here, got a {type(norm).__name__}")
    return read(norm)


def is_gated_mlp(kind: type) -> bool:
    """Whether modules of a class compute down_proj(act_fn(gate_proj(x)) * up_proj(x))."""
    return has_code(kind, *LLAMA_MLP)


def has_code(kind: type, *methods: Any) -> bool:
    """Whether a class of transformers has the very code of other classes' methods, which it copies
    between model files."""
    return kind.__module__.startswith(TRANSFORMERS) and all(
        same_code(getattr(kind, of.__name__, None), of) for of in methods
    )


@cache
def same_code(function: Any, of: Any) -> bool:
    """A function that was put into a class from elsewhere, or wraps another, is no copy."""
    for each in (function, of):
        if type(each) is not FunctionType or not each.__module__.startswith(TRANSFORMERS):
            return False
    return bool(code_of(function) == code_of(of))


def code_of(function: Any) -> tuple[Any, ...]:
    """All that a function does, by names of attributes; its docstring is left out."""
    code = function.__code__
    constants = [(type(value), value) for value in code.co_consts if value != function.__doc__]
    return code.co_code, code.co_names, code.co_argcount, code.co_kwonlyargcount, constants


def is_fp32_linear(module: nn.Module) -> bool:
    """Whether it is a linear layer whose weight and bias native code can read."""
    weight, bias = module._parameters.get("weight"), module._parameters.get("bias")
    return (
        type(module) in LINEAR
        and (usable(weight) or held(module, weight) is not None)
        and (bias is None or (usable(bias) and bias.is_contiguous()))
    )


def is_fp32_norm(module: nn.Module) -> bool:
    """Whether it is a norm that is known here."""
    return norm_of(type(module)) is not None and usable(module._parameters.get("weight"))


def is_itself(module: nn.Module) -> bool:
    """Whether its forward is its class's, or ours in place of it."""
    forward = vars(module).get("forward")
    ours = isinstance(forward, partial) and forward.func.__module__.startswith(f"{__package__}.")
    return forward is None or ours
