"""Registration of an op with PyTorch: a functional form, an `out` form and their fakes."""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends import implementation

LIBRARY = torch.library.Library("specdiff", "DEF")


def define(
    name: str,
    inputs: str,
    outputs: Sequence[str],
    allocate: Callable[..., tuple[Tensor, ...]],
    call: Callable[..., None],
) -> None:
    """Register `specdiff::name` and `specdiff::name.out`.

    Args:
        inputs: the schema of the inputs, without the backend's name.
        outputs: names of the output tensors.
        allocate: inputs -> uninitialised outputs; it is the fake implementation as well.
        call: (backend function, inputs, outputs) -> None, fills the outputs.
    """
    inputs = f"{inputs}, str? backend"
    aliases = string.ascii_lowercase[: len(outputs)]
    mutable = ", ".join(f"Tensor({a}!) {o}" for a, o in zip(aliases, outputs, strict=True))
    results = ", ".join(["Tensor"] * len(outputs))
    LIBRARY.define(f"{name}({inputs}) -> ({results})")
    LIBRARY.define(f"{name}.out({inputs}, {mutable}) -> ()")

    def run(args: Sequence[Any], out: Sequence[Tensor]) -> None:
        function = implementation(name, out[0].device, args[-1])
        call(function, *args[:-1], out=out)

    def functional(*args: Any) -> Any:
        out = allocate(*args[:-1])
        run(args, out)
        return out if len(out) > 1 else out[0]

    def into(*args: Any) -> None:
        run(args[: -len(outputs)], args[-len(outputs) :])

    def fake(*args: Any) -> Any:
        out = allocate(*args[:-1])
        return out if len(out) > 1 else out[0]

    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, functional, device)
        LIBRARY.impl(f"{name}.out", into, device)
    torch.library.register_fake(f"specdiff::{name}", fake, lib=LIBRARY)
    torch.library.register_fake(f"specdiff::{name}.out", lambda *args: None, lib=LIBRARY)
