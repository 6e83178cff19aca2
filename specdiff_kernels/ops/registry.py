"""Registration of an op with PyTorch: a functional form, an `out` form and their fakes."""

from __future__ import annotations

import functools
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import implementation
from .checks import PLAIN, check_tensor

Outputs = list[tuple[list[int], torch.dtype]]  # shape and dtype of each
LIBRARY = torch.library.Library("specdiff", "DEF")


class Op(NamedTuple):
    """The two forms of an op, as the public function calls them."""

    functional: Callable[..., Any]  # inputs, backend -> outputs
    into: Callable[..., None]  # inputs, backend, outputs


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
        if type(x) in PLAIN:
            if x.is_neg() or (learns and x.requires_grad):
                return True
        elif isinstance(x, Tensor) or (isinstance(x, list) and watched(x)):
            return True
    return False


def define(
    name: str,
    inputs: str,
    outputs: Sequence[str],
    specs: Callable[..., Outputs],
    call: Callable[..., None],
    *,
    shown: Sequence[str] | None = None,
    workspace: bool = False,
    differentiable: bool = False,
) -> Op:
    """Register `specdiff::name` and `specdiff::name.out`.

    Args:
        inputs: the schema of the inputs, without the backend's name. Sizes and counts are SymInt,
            or `torch.compile` makes a graph for each value.
        outputs: names of the output tensors, different from those of the inputs.
        specs: inputs -> shape and dtype of each output.
        call: (backend function, inputs, outputs) -> None, fills the outputs.
        shown: what the user calls the output tensors; None: out.<name>.
        workspace: whether the `out` form takes one, behind the backend's name.
        differentiable: whether autograd is to know of the functional form. Otherwise its outputs
            require no gradient, as those of the `out` form.

    Returns:
        Both forms; they go through PyTorch's dispatcher where something watches it.
    """
    inputs = f"{inputs}, str? backend"
    aliases = string.ascii_lowercase[: len(outputs)]
    mutable = ", ".join(f"Tensor({a}!) {o}" for a, o in zip(aliases, outputs, strict=True))
    results = ", ".join(["Tensor"] * len(outputs))
    shown = [f"out.{field}" for field in outputs] if shown is None else shown
    LIBRARY.define(f"{name}({inputs}) -> ({results})")
    scratch = ", Tensor(z!)? workspace" if workspace else ""
    LIBRARY.define(f"{name}.out({inputs}{scratch}, {mutable}) -> ()")

    def allocate(*args: Any) -> tuple[Tensor, ...]:
        device = args[0].device
        return tuple(
            torch.empty(shape, dtype=dtype, device=device) for shape, dtype in specs(*args[:-1])
        )

    def run(args: Sequence[Any], out: Sequence[Tensor], given: Tensor | None = None) -> None:
        device, backend = out[0].device, args[-1]
        function = implementation(name, device, backend)
        if given is not None and implementation("workspace_size", device, backend)(1, 1):
            function = functools.partial(function, workspace=given)
        call(function, *args[:-1], out=out)

    def functional(*args: Any) -> Any:
        out = allocate(*args)
        run(args, out)
        return out if len(out) > 1 else out[0]

    def into(*args: Any) -> None:
        inputs, out = args[: -len(outputs)], args[-len(outputs) :]
        given = None
        if workspace:
            inputs, given = inputs[:-1], inputs[-1]
        for field, tensor, (shape, dtype) in zip(shown, out, specs(*inputs[:-1]), strict=True):
            check_tensor(field, tensor, tuple(shape), (dtype,), args[0].device)
            if not tensor.is_contiguous():
                raise ValueError(f"{field}: expected contiguous memory, got a strided view")
        run(inputs, out, given)

    def fake(*args: Any) -> Any:
        out = allocate(*args)
        return out if len(out) > 1 else out[0]

    for device in ("CPU", "CUDA"):
        # or autograd would find a derivative in the reference, which is written in PyTorch
        LIBRARY.impl(name, torch.no_grad()(functional), device)
        LIBRARY.impl(f"{name}.out", torch.no_grad()(into), device)
    # without it torch gives outputs a grad_fn that only warns, and keeps the inputs alive
    for form in (f"{name}.out",) if differentiable else (name, f"{name}.out"):
        LIBRARY.impl(form, torch.library.fallthrough_kernel, "Autograd")
    torch.library.register_fake(f"specdiff::{name}", fake, lib=LIBRARY)
    torch.library.register_fake(f"specdiff::{name}.out", lambda *args: None, lib=LIBRARY)

    packet = getattr(torch.ops.specdiff, name)
    return Op(
        lambda *args: (packet.default if watched(args) else functional)(*args),
        lambda *args: (packet.out if watched(args) else into)(*args),
    )
