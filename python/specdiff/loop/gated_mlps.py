"""Gated MLPs of transformers' models as single native calls on a CPU, where they fit."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from specdiff_kernels.ops.decoder_layer import GatedMlp, Linear, gated_mlp
from specdiff_kernels.ops.registry import watched

from .fast_module import FastModule, has_global_hooks
from .known import ACTIVATIONS, is_fp32_linear, is_itself
from .packed import usable

NAMES = ("gate_proj", "up_proj", "down_proj")


class FastMlp(FastModule):
    """A gated MLP's native form."""

    def find(self, module: Any) -> str | None:
        fault = fault_of(module)
        if fault is None:
            self.linears = {name: getattr(module, name) for name in NAMES}
            self.norms = []
            self.activation = ACTIVATIONS[type(module.act_fn)]
        return fault

    def make(self, parts: dict[str, Linear]) -> GatedMlp:
        gate, up, down = (parts[name] for name in NAMES)
        return GatedMlp(gate, up, down, self.activation)


def fault_of(module: Any) -> str | None:
    """Why a module that `is_gated_mlp` is left to torch; None: it is not."""
    if type(module.act_fn) not in ACTIVATIONS or not is_itself(module.act_fn):
        return f"its activation is a {type(module.act_fn).__name__}"
    parts = [getattr(module, name) for name in NAMES]
    for name, part in zip(NAMES, parts, strict=True):
        if type(part) is not nn.Linear or not is_fp32_linear(part) or not is_itself(part):
            return f"its {name} is no fp32 linear layer"
        if part.bias is not None and part.bias.shape != part.weight.shape[:1]:
            return f"its {name} has a bias of another size"
    gate, up, down = (part.weight.shape for part in parts)
    return None if gate == up and down[1] == up[0] else "its weights do not fit each other"


def mlp(module: Any, fast: FastMlp, x: Tensor) -> Tensor:
    """The forward of a swapped MLP. x [..., d] -> [..., d]"""
    if (
        not torch.compiler.is_compiling()
        and usable(x)
        and x.numel()
        and not has_global_hooks()
        and not watched((x,))
    ):
        native = fast.ready(module)
        if native is not None and not fast.learns(x) and x.shape[-1] == native.gate.columns:
            return gated_mlp(x.contiguous(), native)
    out: Tensor = type(module).forward(module, x)
    return out
