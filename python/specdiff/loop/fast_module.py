"""FastModule: a module's native form, which follows its parts and weights."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules

from specdiff_kernels import PackedWeight
from specdiff_kernels.backends import find
from specdiff_kernels.ops.decoder_layer import Linear

from .only_packed import OnlyPacked, memory_of
from .packed import version_of


class FastModule(ABC):
    """A module's native form, made anew when its parts or weights have changed.

    Args:
        weight_of: gives the weight of a linear layer as its products take it.
    """

    linears: dict[str, Any]  # by names that `make` is given
    norms: list[Any]

    def __init__(self, weight_of: Callable[[Any], PackedWeight | Tensor]) -> None:
        self.weight_of = weight_of
        self.watch = find("watch", "cpu", None)
        self.children: list[tuple[Any, ...]] | None = None
        self.native: Any = None

    def __reduce__(self) -> tuple[type[FastModule], tuple[Any]]:
        return type(self), (self.weight_of,)  # a copied or saved module makes its own

    @abstractmethod
    def find(self, module: Any) -> str | None:
        """Set `linears` and `norms`; or say why the module has to go torch's way."""

    @abstractmethod
    def make(self, parts: dict[str, Linear]) -> Any:
        """The native form, of `linears` as they are now."""

    def ready(self, module: nn.Module) -> Any:
        """The native form; None where the module has to go torch's way."""
        if self.reason(module) is not None:
            return None
        if self.native is None or self.changed():
            self.native = None
            if self.find(module) is None:  # what has changed may not fit any more, or fit again
                self.read()
        return self.native

    def reason(self, module: nn.Module) -> str | None:
        """Why the module has to go torch's way; None: it has not. Made for each token."""
        if self.children is None or [tuple(d.values()) for d in self.parents] != self.children:
            self.look(module)
        if self.fault is not None:
            return self.fault
        if any(self.hooks):
            return "a module in it has hooks"
        if [own.get("forward") for own in self.inside] != self.forwards:
            return "the forward of a module in it was replaced"
        return None

    def look(self, module: nn.Module) -> None:
        """Find the module's parts."""
        found = list(module.modules())
        self.parents = [m._modules for m in found if m._modules]
        self.children = [tuple(d.values()) for d in self.parents]
        self.hooks = [h for m in found[1:] for h in (m._forward_hooks, m._forward_pre_hooks)]
        self.inside = [m.__dict__ for m in found[1:]]
        self.forwards = [own.get("forward") for own in self.inside]
        self.native = None
        self.fault = self.find(module)
        if self.fault is None and any("forward" not in vars(m) for m in self.linears.values()):
            self.fault = "a linear layer in it was restored"  # and its weight has another form

    def read(self) -> None:
        """Take the weights as they are now."""
        linears = self.linears.values()
        self.tensors = [
            (m._parameters, name, m._parameters[name])
            for m in (*linears, *self.norms)
            for name in ("weight", "bias")
            if name in m._parameters
        ]
        known = [tensor for _, _, tensor in self.tensors if tensor is not None]
        self.packed = [(tensor, tensor.kept) for tensor in known if type(tensor) is OnlyPacked]
        self.memory = [memory_of(tensor) for tensor in known]
        self.places = [tensor.data_ptr() for tensor in self.memory]
        weights = [m.weight for m in linears]
        self.weights = [w for w in weights if type(w) is not OnlyPacked]  # read where it is written
        self.versions = versions_of(self.weights)
        self.fingerprint = self.watch(self.weights)
        self.seen = self.fingerprint()
        self.native = self.make(
            {name: Linear(self.weight_of(m), m.bias) for name, m in self.linears.items()}
        )

    def changed(self) -> bool:
        """Whether a tensor is another one, or a weight was written to. Made for each token."""
        for own, name, tensor in self.tensors:
            if own.get(name) is not tensor:
                return True
        if any(vars(tensor).get("kept") is not kept for tensor, kept in self.packed):
            return True
        if [tensor.data_ptr() for tensor in self.memory] != self.places:
            return True
        return versions_of(self.weights) != self.versions or self.fingerprint() != self.seen

    def learns(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (
            x.requires_grad or any(t is not None and t.requires_grad for _, _, t in self.tensors)
        )


def versions_of(weights: list[Tensor]) -> list[int]:
    try:
        return [weight._version for weight in weights]
    except RuntimeError:  # inference tensors count none
        return [version_of(weight) for weight in weights]


def has_global_hooks() -> bool:
    return bool(modules._global_forward_hooks or modules._global_forward_pre_hooks)
