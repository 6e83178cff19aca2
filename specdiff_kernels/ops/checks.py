"""Argument checks that read shapes and dtypes only, never the device's memory."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..fields import MAX_VOCABULARY, Array, Layout, Record, Scalar, Sizes, bind
from ..types import Purpose

INT64 = (torch.int64,)
PLAIN = (Tensor, torch.nn.Parameter)
NUMBERS = (int, float)


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    dtypes: Collection[torch.dtype],
    device: torch.device,
) -> Tensor:
    """Raise unless `tensor` lies on `device` with one of `dtypes` and `shape` (None: any size)."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    wrong = len(tensor.shape) != len(shape)
    for want, have in zip(shape, tensor.shape, strict=False):
        wrong = wrong or (want is not None and want != have)
    if wrong:
        expected = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{expected}], got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(
            f"{name}: expected dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}; "
            f"convert with {name}.to(torch.{names.split(',')[0]})"
        )
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")
    return tensor


def checked(
    layout: Layout[Record],
    values: Sequence[Any],
    sizes: Sizes,
    device: torch.device,
    prefix: str = "",
    into: bool = False,
) -> Record:
    """The record of these values, as kernels take them: tensors contiguous, a number for all rows
    as a tensor; the entries of a tensor are checked by the kernel, through the row's status.

    Args:
        sizes: what is known of the sizes in shapes; what the tensors show is added. A shape in it
            stands for another one.
        prefix: what the caller writes before names.
        into: they will be written to, and have to be contiguous.

    Raises:
        ValueError, TypeError: the message names the field.
    """
    found: list[Any] = []
    for (name, spec, record, optional), value in zip(layout.fields, values, strict=True):
        if value is None and optional:
            pass
        elif record is not None:
            if not isinstance(value, (tuple, list)) or len(value) != len(record.fields):
                raise TypeError(
                    f"{prefix}{name}: expected a {record.kind.__name__}, got {type(value).__name__}"
                )
            inner = f"{prefix}{name}." if record.named else prefix
            value = checked(record, value, sizes, device, inner, into)
        elif isinstance(spec, Scalar):
            if not spec.choices and type(value) is not spec.kind:
                value = spec.kind(value or 0)
            if spec.size:
                sizes[spec.size] = value
        elif isinstance(spec, Array) and not spec.many:
            shape: Any = tuple(map(sizes.get, sizes.get(spec.shape, spec.shape)))
            if spec.number is not None and not isinstance(value, Tensor):
                value = number_for_all(prefix + name, value, spec, shape, device)
            elif (
                type(value) not in PLAIN
                or value.shape != shape
                or value.dtype not in spec.dtypes
                or value.device != device
            ):
                check_tensor(prefix + name, value, shape, spec.dtypes, device)
                bind(sizes, spec.shape, value)
            if into or spec.written:
                if not value.is_contiguous():
                    raise ValueError(
                        f"{prefix}{name}: expected contiguous memory, got a strided view"
                    )
            elif not spec.rows or value.shape[-1] != 1 != value.stride(-1):
                value = value.contiguous()
            if spec.is_logits and not 1 <= value.shape[-1] <= MAX_VOCABULARY:
                raise ValueError(
                    f"{prefix}{name}: expected a vocabulary of 1 to {MAX_VOCABULARY}, got "
                    f"{value.shape[-1]}"
                )
        found.append(value)
    return tuple.__new__(layout.kind, found)  # as it does, without its call


def columns(
    name: str,
    ids: Tensor | None,
    device: torch.device,
    shape: tuple[str, ...],
    target: tuple[str, ...],
) -> Sizes:
    """What is known of a draft's logits: they have a column for each id, or the target's."""
    if ids is None:
        return {shape: target}
    check_tensor(name, ids, (None,), INT64, device)
    return {shape[-1]: ids.shape[0]}


def number_for_all(
    name: str, value: Any, spec: Array, shape: tuple[int, ...], device: torch.device
) -> Tensor:
    """A number that may stand for all entries, as a tensor."""
    dtype, (allowed, low, high, zero) = spec.dtypes[0], spec.number  # type: ignore[misc]
    kind = int if dtype == torch.int64 else float
    plain = type(value) in NUMBERS or isinstance(value, Real)
    if not plain or not (low <= value <= high or (zero and value == 0)) or (
        kind is int and value != int(value)
    ):  # fmt: skip
        raise ValueError(f"{name}: expected {allowed}, got {value!r}")
    return torch.full(shape, plain_number(value, kind), dtype=dtype, device=device)


def device_of(name: str, tensor: Tensor) -> torch.device:
    """Where the op runs: all its tensors must lie there."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
    return tensor.device


def concrete(tensor: Tensor) -> bool:
    """Whether it has memory: no compiler is looking on, and it is neither fake nor a wrapper."""
    return not torch.compiler.is_compiling() and type(tensor) in PLAIN


def readable(tensor: Tensor) -> bool:
    """Whether its entries can be looked at without waiting for a device or breaking a graph."""
    return tensor.device.type == "cpu" and concrete(tensor)


def memory(tensor: Tensor | None) -> tuple[int, int]:
    """Addresses of the first byte and behind the last one; none that can be looked at: 0, 0."""
    if tensor is None or not concrete(tensor) or tensor.numel() == 0:
        return 0, 0
    furthest = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + tensor.element_size() * (furthest + 1)


def overlap(a: Tensor | None, b: Tensor | None) -> bool:
    """Whether two tensors share memory, as far as it can be looked at."""
    (first, last), (start, end) = memory(a), memory(b)
    return start < last and first < end


ordered: tuple[Any, Any, int] = (lambda: None, None, 0)  # ids last found to increase, state, end


def check_increasing(name: str, ids: Tensor, V: int) -> None:
    """Raise unless the token ids increase strictly within [0, V), where they can be looked at.

    All of them are looked at once, and again when somebody wrote to them.
    """
    global ordered
    if not readable(ids) or ids.shape[0] == 0:
        return
    state = None if ids.is_inference() else (ids.data_ptr(), ids._version, ids.shape, ids.stride())
    seen, before, end = ordered
    if seen() is not ids or state is None or state != before:
        increase = int(ids[0]) >= 0 and bool((ids[1:] > ids[:-1]).all())
        end = int(ids[-1]) + 1 if increase else V + 1
        if increase:
            ordered = weakref.ref(ids), state, end
    if end > V:
        raise ValueError(
            f"{name}: expected strictly increasing ids in [0, {V}), got others; "
            "sort the columns of the drafter's head once"
        )


def plain_number(value: Any, kind: type) -> Any:
    """NumPy's numbers and the like as Python's, which are left alone: a compiler's are symbols."""
    return value if type(value) in NUMBERS else kind(value)


def check_random(N: int, words: Tensor | None, **key: Tensor | None) -> None:
    """Raise unless the draws come either from `words` or from all tensors [N] of their key."""
    if words is not None:
        return
    for name, tensor in key.items():
        if tensor is None:
            raise ValueError(
                f"{name}: expected a tensor [{N}] int64, got None; pass {' and '.join(key)}, or "
                "words"
            )


def check_constant(name: str, value: float | Tensor | None, way_out: str) -> None:
    """Raise if a gradient is asked of what has none."""
    if torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor without gradient, got one that requires it; {way_out}"
        )


def check_purpose(purpose: int) -> int:
    if purpose not in set(Purpose):
        raise ValueError(f"purpose: expected one of {[p.name for p in Purpose]}, got {purpose!r}")
    return int(purpose)


def check_workspace(workspace: Tensor, out: Any, device: torch.device) -> None:
    """Raise unless a workspace is int64 [n] and comes with outputs; its size is the backend's."""
    check_tensor("workspace", workspace, (None,), INT64, device)
    if out is None:
        raise ValueError("workspace: expected `out` with it, got None; allocate the outputs too")
    if not workspace.is_contiguous():
        raise ValueError("workspace: expected contiguous memory, got a strided view")
