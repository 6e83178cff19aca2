"""Registration of an op with PyTorch: a functional form, an `out` form and their fakes."""

from __future__ import annotations

import functools
import string
from collections.abc import Sequence
from enum import IntEnum
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from ..backends import check_name, implementation
from ..checks import PLAIN, check_workspace, checker, expect_record
from ..fields import (
    Record,
    Sizes,
    layout_of,
    schema,
    sizes_of,
    unflatten,
)

LIBRARY = torch.library.Library("specdiff", "DEF")
NO_TENSORS = (type(None), int, float, bool, str)
Inputs = TypeVar("Inputs", bound=tuple)


def watched(args: Sequence[Any]) -> bool:
    """Whether something other than the kernel has to see the call: a compiler, a mode, a transform,
    a tracer, a profiler, autograd, or a tensor, also in a list, that is more than its memory.

    Otherwise it skips PyTorch's dispatcher, which takes longer over the twenty arguments of
    `verify` than everything else around the kernel.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._get_tracing_state() is not None
        or torch.autograd._profiler_enabled()
    ):
        return True
    learns = torch.is_grad_enabled()
    for x in args:
        kind = type(x)
        if kind in PLAIN:
            if x.is_neg() or (learns and x.requires_grad):
                return True
        elif kind not in NO_TENSORS and (
            isinstance(x, Tensor) or (isinstance(x, list) and watched(x))
        ):
            return True
    return False


def numbers(args: Sequence[Any]) -> list[Any]:
    """As PyTorch's dispatcher takes them, which does not know enums."""
    return [int(x) if isinstance(x, IntEnum) else x for x in args]


def check_backend(name: str | None) -> None:
    """Raise unless PyTorch's dispatcher can be given the name."""
    if name is not None:
        check_name(name, "backend")


class Op(Generic[Inputs, Record]):
    """An op by the records of its inputs and outputs, registered as `specdiff::name` and
    `specdiff::name.out`.

    Its implementations are functions (inputs, out=outputs) -> None; outputs that are a single
    tensor are handed over as it is.
    """

    def __init__(
        self,
        name: str,
        inputs: type[Inputs],
        outputs: type[Record],
        *,
        workspace: bool = False,
        differentiable: bool = False,
    ) -> None:
        """
        Args:
            workspace: whether the `out` form takes one, behind the backend's name.
            differentiable: whether autograd is to know of the functional form. Otherwise its
                outputs require no gradient, as those of the `out` form.
        """
        self.name = name
        self.inputs, self.outputs = layout_of(inputs), layout_of(outputs)
        self.single = len(self.outputs.leaves) == 1
        self.takes_workspace = workspace
        self.check = checker(self.inputs)  # (sizes, device, values) -> inputs
        self.check_out = checker(self.outputs, "" if self.single else "out.", into=True)
        self.register(differentiable)
        self.packet = getattr(torch.ops.specdiff, name)

    def register(self, differentiable: bool) -> None:
        name, count = self.name, len(self.outputs.leaves)
        inputs = f"{schema(self.inputs, string.ascii_uppercase)}, str? backend"
        results = ", ".join(["Tensor"] * count)
        LIBRARY.define(f"{name}({inputs}) -> ({results})")
        scratch = "Tensor(z!)? workspace, " if self.takes_workspace else ""
        mutable = schema(self.outputs, string.ascii_lowercase, out=True)
        LIBRARY.define(f"{name}.out({inputs}, {scratch}{mutable}) -> ()")

        def allocate(*args: Any) -> tuple[Inputs, Record]:
            flat = args[:-1]
            inputs = unflatten(self.inputs, iter(flat))
            sizes = sizes_of(self.inputs, flat)
            return inputs, self.outputs.empty(sizes, flat[0].device, inputs)

        def result(out: Record) -> Any:
            return out[0] if self.single else self.outputs.flatten(out)

        def functional(*args: Any) -> Any:
            inputs, out = allocate(*args)
            self.run(inputs, args[0].device, args[-1], out)
            return result(out)

        def into(*args: Any) -> None:
            *flat, backend = args[: len(self.inputs.leaves) + 1]
            out = unflatten(self.outputs, iter(args[-count:]))
            workspace = args[len(flat) + 1] if self.takes_workspace else None
            self.run(unflatten(self.inputs, iter(flat)), flat[0].device, backend, out, workspace)

        for device in ("CPU", "CUDA"):
            # or autograd would find a derivative in the reference, which is written in PyTorch
            LIBRARY.impl(name, torch.no_grad()(functional), device)
            LIBRARY.impl(f"{name}.out", torch.no_grad()(into), device)
        # without it torch gives outputs a grad_fn that only warns, and keeps the inputs alive
        for form in (f"{name}.out",) if differentiable else (name, f"{name}.out"):
            LIBRARY.impl(form, torch.library.fallthrough_kernel, "Autograd")
        torch.library.register_fake(
            f"specdiff::{name}", lambda *args: result(allocate(*args)[1]), lib=LIBRARY
        )
        torch.library.register_fake(f"specdiff::{name}.out", lambda *args: None, lib=LIBRARY)

    def __call__(
        self,
        inputs: Inputs,
        sizes: Sizes,
        device: torch.device,
        backend: str | None,
        out: Record | None = None,
        workspace: Tensor | None = None,
    ) -> Record:
        """Run it on checked inputs, through PyTorch's dispatcher where something watches it."""
        if workspace is not None:
            check_workspace(workspace, out, device)
        flat = self.inputs.flatten(inputs)
        if out is not None:
            if type(out) is not self.outputs.kind:
                expect_record("out", self.outputs.kind, out)
            given = self.check_out(sizes, device, *out)
            results = self.outputs.flatten(given)
            if watched((*flat, *results, workspace)):
                check_backend(backend)
                scratch = [workspace] if self.takes_workspace else []
                self.packet.out(*numbers(flat), backend, *scratch, *results)
            else:
                self.run(inputs, device, backend, given, workspace)
            return out
        if watched(flat):
            check_backend(backend)
            result = self.packet.default(*numbers(flat), backend)
            return unflatten(self.outputs, iter([result] if self.single else result))
        given = self.outputs.empty(sizes, device, inputs)
        self.run(inputs, device, backend, given)
        return given

    def run(
        self,
        inputs: Inputs,
        device: torch.device,
        backend: str | None,
        out: Record,
        workspace: Tensor | None = None,
    ) -> None:
        function = implementation(self.name, device, backend)
        if workspace is not None and implementation("workspace_size", device, backend)(1, 1):
            function = functools.partial(function, workspace=workspace)
        function(inputs, out=out[0] if self.single else out)
