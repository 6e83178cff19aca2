"""Argument checks that read shapes and dtypes only, never the device's memory."""

from __future__ import annotations

from collections.abc import Collection
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..types import DISTRIBUTION_DTYPES, MAX_VOCABULARY, Purpose, RowDistribution

INT64 = (torch.int64,)
LOGIT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN = (Tensor, torch.nn.Parameter)


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
    if tensor.shape != shape and not fits(tensor.shape, shape):
        want = ", ".join("*" if size is None else str(size) for size in shape)
        raise ValueError(f"{name}: expected shape [{want}], got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(
            f"{name}: expected dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}; "
            f"convert with {name}.to(torch.{names.split(',')[0]})"
        )
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")
    return tensor


def fits(shape: torch.Size, wanted: tuple[int | None, ...]) -> bool:
    return len(shape) == len(wanted) and all(
        want is None or want == have for want, have in zip(wanted, shape, strict=True)
    )


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


def check_logits(
    name: str, logits: Tensor, shape: tuple[int | None, ...], device: torch.device
) -> Tensor:
    """Logits of a supported dtype and vocabulary, with contiguous rows (copied if need be)."""
    check_tensor(name, logits, shape, LOGIT_DTYPES, device)
    V = logits.shape[-1]
    if not 1 <= V <= MAX_VOCABULARY:
        raise ValueError(f"{name}: expected a vocabulary of 1 to {MAX_VOCABULARY}, got {V}")
    return logits if logits.stride(-1) == 1 or V == 1 else logits.contiguous()


def check_increasing(name: str, ids: Tensor, V: int) -> None:
    """Raise unless the token ids increase strictly within [0, V), where they can be looked at."""
    if not readable(ids) or ids.shape[0] == 0:
        return
    inside = int(ids[0]) >= 0 and int(ids[-1]) < V
    if not inside or not bool((ids[1:] > ids[:-1]).all()):
        raise ValueError(
            f"{name}: expected strictly increasing ids in [0, {V}), got others; "
            "sort the columns of the drafter's head once"
        )


def check_distribution(
    name: str, distribution: RowDistribution, N: int, device: torch.device
) -> RowDistribution:
    """The distribution with contiguous fields of N entries each."""
    for field, tensor, dtype in zip(
        RowDistribution._fields, distribution, DISTRIBUTION_DTYPES, strict=True
    ):
        check_tensor(f"{name}.{field}", tensor, (N,), (dtype,), device)
    return RowDistribution(*contiguous(*distribution))


# name: (dtype, what is allowed, test)
PARAMETERS = {
    "temperature": (torch.float32, "0 or a number in [2^-95, 2^95]",
                    lambda x: x == 0 or 2.0**-95 <= x <= 2.0**95),
    "top_k": (torch.int64, "an integer in [0, 2^63) (0: off)",
              lambda x: 0 <= x < 2**63 and x == int(x)),
    "top_p": (torch.float32, "a number in [2^-149, 1]", lambda x: 2.0**-149 <= x <= 1),
    "min_p": (torch.float32, "a number in [0, 1]", lambda x: 0 <= x <= 1),
    "rate": (torch.float64, "a number >= 0", lambda x: x >= 0),
}  # fmt: skip


def per_row(name: str, value: float | Tensor | None, N: int, device: torch.device) -> Tensor | None:
    """A parameter as a tensor [N]; None stays None. Numbers are checked here, the
    entries of a tensor by the kernel, through the row's status."""
    if value is None:
        return None
    dtype, allowed, test = PARAMETERS[name]
    if isinstance(value, Tensor):
        check_tensor(name, value, (N,), (dtype,), device)
        return value.contiguous()
    if not isinstance(value, Real) or not test(value):
        raise ValueError(f"{name}: expected {allowed}, got {value!r}")
    value = plain_number(value, int if dtype == torch.int64 else float)
    return torch.full((N,), value, dtype=dtype, device=device)


def plain_number(value: Any, kind: type) -> Any:
    """NumPy's numbers and the like as Python's, which are left alone: a compiler's are symbols."""
    return value if type(value) in (int, float) else kind(value)


def check_random(
    N: int,
    device: torch.device,
    words_shape: tuple[int, ...],
    words: Tensor | None,
    **key: Tensor | None,
) -> None:
    """Raise unless the draws come either from `words` or from all tensors [N] of their key."""
    if words is not None:
        check_tensor("words", words, words_shape, INT64, device)
    for name, tensor in key.items():
        if tensor is not None:
            check_tensor(name, tensor, (N,), INT64, device)
        elif words is None:
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


def check_workspace(workspace: Tensor | None, out: Any, device: torch.device) -> None:
    """Raise unless a workspace is int64 [n] and comes with outputs; its size is the backend's."""
    if workspace is None:
        return
    check_tensor("workspace", workspace, (None,), INT64, device)
    if out is None:
        raise ValueError("workspace: expected `out` with it, got None; allocate the outputs too")
    if not workspace.is_contiguous():
        raise ValueError("workspace: expected contiguous memory, got a strided view")


def contiguous(*tensors: Tensor | None) -> tuple[Any, ...]:
    """Each tensor with contiguous memory; None stays None."""
    return tuple(t if t is None else t.contiguous() for t in tensors)
