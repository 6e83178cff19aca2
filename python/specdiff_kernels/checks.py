"""Argument checks that read shapes and dtypes only, never the device's memory."""

from __future__ import annotations

import operator
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import zip_longest
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from .fields import MAX_VOCABULARY, Array, Layout, Range, Record, Scalar, Sizes
from .seeds import seeds_for

INT64 = (torch.int64,)
PLAIN = (Tensor, torch.nn.Parameter)
NUMBERS = (int, float)
SUMS: dict[Any, str] = {"K1": "K+1", "N1": "N+1", "GH": "G*H"}  # words of shapes that are no names


def check_shape(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    words: Sequence[str],
    way_out: str = "",
) -> None:
    """Raise unless it is a tensor of this shape.

    Args:
        shape: None: any size.
        words: what the sizes are called.
        way_out: what to do about a wrong shape.
    """
    device_of(name, tensor)
    wrong = len(tensor.shape) != len(shape)
    for want, have in zip(shape, tensor.shape, strict=False):
        wrong = wrong or (want is not None and want != have)
    if wrong:
        expected = f"{name}: expected shape {in_words(shape, words)}, got {list(tensor.shape)}"
        raise ValueError(f"{expected}; {way_out}" if way_out else expected)


def check_tensor(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    words: Sequence[str],
    dtypes: Collection[torch.dtype],
    device: torch.device,
    way_out: str = "",
) -> Tensor:
    """`check_shape`, and raise unless `tensor` lies on `device` with one of `dtypes`."""
    check_shape(name, tensor, shape, words, way_out)
    if tensor.dtype not in dtypes:
        names = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(
            f"{name}: expected dtype {names}, got {str(tensor.dtype).removeprefix('torch.')}; "
            f"convert with {name}.to(torch.{names.split(',')[0]})"
        )
    if tensor.device != device:
        raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")
    return tensor


def bound(
    name: str,
    tensor: Tensor,
    shape: tuple[int | None, ...],
    spec: Array,
    device: torch.device,
    sizes: Sizes,
) -> torch.Size:
    """The shape of a tensor, after `check_tensor`; noted in `sizes` as what words stand for."""
    words = () if spec.is_whole else spec.shape
    check_tensor(name, tensor, shape, words, spec.dtypes, device, spec.way_out)
    sizes.update(zip(words, tensor.shape, strict=False))
    return tensor.shape


def in_words(shape: Sequence[int | None], words: Sequence[str]) -> str:
    """A shape as messages have it, such as [B=2, K+1=5, V]."""
    sizes = []
    for size, word in zip_longest(shape, words):
        word = SUMS.get(word, word)
        if size is None:
            sizes.append(f"{word}")
        else:
            sizes.append(f"{size}" if word is None or word.isdigit() else f"{word}={size}")
    return f"[{', '.join(sizes)}]"


def described(value: Any) -> str:
    """A wrong value in a message; one that takes long by its kind."""
    if isinstance(value, Tensor):
        return f"a tensor {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 80 and "\n" not in text else f"a {type(value).__name__}"


def kind_of(value: Any) -> str:
    return "None" if value is None else type(value).__name__


def integer(name: str, value: Any, low: int = 0, high: int = 2**63 - 1) -> int:
    """Raise ValueError unless it is an integer in [low, high]; NumPy's and the like become int."""
    try:
        number = value if type(value) is int else operator.index(value)
    except TypeError:
        number = low - 1
    if not low <= number <= high:
        limits = f"in [{low}, {high}]" if high < 2**63 - 1 else f">= {low}"
        raise ValueError(f"{name}: expected an integer {limits}, got {described(value)}")
    return number


def scalar(name: str, kind: type, value: Any) -> Any:
    """The value of a `Scalar`; None stands for 0."""
    try:
        if value is None or kind is bool:
            return kind(value or 0)
        # `torch.compile` has no operator.index
        return kind(value if isinstance(value, Integral) else operator.index(value))
    except (TypeError, ValueError, RuntimeError):
        members = getattr(kind, "__members__", None)
        number = "a bool, the same for all rows" if kind is bool else "an integer"
        expected = number if members is None else f"one of {', '.join(members)}"
        raise ValueError(f"{name}: expected {expected}, got {described(value)}") from None


def one_number(
    name: str,
    value: Any,
    kind: type,
    allowed: str,
    low: float,
    high: float,
    zero: bool = False,
    spread: bool = False,
) -> Any:
    """The value of a `Scalar` with a `Range`; None stands for 0."""
    if value is None:
        return kind(0)
    if not within(value, kind, low, high, zero):
        raise ValueError(f"{name}: expected {allowed}, got {described(value)}")
    return value if type(value) is kind else kind(value)


def within(value: Any, kind: type, low: float, high: float, zero: bool) -> bool:
    """Whether it is an integer or a float of a `Range`."""
    plain = type(value) in NUMBERS  # NumPy's and the like become so; a compiler's are symbols
    inside = (plain or isinstance(value, Real)) and (low <= value <= high or (zero and value == 0))
    if inside and kind is int:
        inside = type(value) is int or isinstance(value, Integral)
    return inside


def refuse(name: str, expected: str, got: Any) -> None:
    raise ValueError(f"{name}: expected {expected}, got {got}")


def expect_record(name: str, kind: type, value: Any) -> None:
    if not isinstance(value, (tuple, list)) or len(value) != len(kind._fields):  # type: ignore[attr-defined]
        raise TypeError(f"{name}: expected a {kind.__name__}, got {kind_of(value)}")


def checker(layout: Layout[Record], prefix: str = "", into: bool = False) -> Callable[..., Record]:
    """A function (sizes, device, values of the fields) -> the record as kernels take it: tensors
    contiguous, a number for all rows as a tensor. (Entries of tensors are checked by the kernel,
    through the row's status.)

    It is written out, a few lines for each field, as `collections.namedtuple` does: a loop over
    fields takes longer than all that a call does beside its kernel.

    Its sizes are what the caller knows of words in shapes; what the tensors show is added. It
    raises ValueError or TypeError, whose message names the field.

    Args:
        prefix: what the caller writes before names.
        into: tensors will be written to, and have to be contiguous.
    """
    scope: dict[str, Any] = dict(
        PLAIN=PLAIN, Tensor=Tensor, new=tuple.__new__, bound=bound,
        refuse=refuse, expect_record=expect_record, number_for_all=number_for_all, scalar=scalar,
        one_number=one_number,
    )  # fmt: skip
    words = {word for _, _, spec in layout.leaves for word in getattr(spec, "shape", ())}
    names = [name for name, *_ in layout.fields]
    lines = [f"def check(sizes, device, {', '.join(names)}):"]
    lines += [f"    _{word} = sizes.get({word!r})" for word in sorted(words) if word.isidentifier()]
    lines += [f"    {line}" for line in check_lines(layout, "", prefix, into, scope)]
    exec("\n".join([*lines, "    return record"]), scope)
    return scope["check"]


def check_lines(
    layout: Layout, path: str, prefix: str, into: bool, scope: dict[str, Any]
) -> Iterator[str]:
    """Lines that check the fields of a record, held by variables, and assign it to `path`record."""

    def constant(value: Any) -> str:
        scope[f"c{len(scope)}"] = value
        return f"c{len(scope) - 1}"

    for name, spec, record, optional in layout.fields:
        variable, shown = path + name, repr(prefix + name)
        indent = "    " if optional and (record or spec) else ""
        if indent:
            yield f"if {variable} is not None:"
        if record is not None:
            inner = f"{prefix}{name}." if record.named else prefix
            if record.named:
                kind = constant(record.kind)
                expect = f"expect_record({shown}, {kind}, {variable})"
                yield f"{indent}if type({variable}) is not {kind}: {expect}"
            items = ", ".join(f"{variable}_{item}" for item, *_ in record.fields)
            yield f"{indent}{items}, = {variable}"
            for line in check_lines(record, f"{variable}_", inner, into, scope):
                yield indent + line
            yield f"{indent}{variable} = {variable}_record"
        elif isinstance(spec, Scalar):
            if spec.number is not None:
                value = f"{variable}, {spec.kind.__name__}, {literals(spec.number)}"
                yield f"{variable} = one_number({shown}, {value})"
            elif not spec.choices:
                kind = constant(spec.kind)
                value = f"scalar({shown}, {kind}, {variable})"
                yield f"if type({variable}) is not {kind}: {variable} = {value}"
            if spec.size:
                yield f"_{spec.size} = sizes[{spec.size!r}] = {variable}"
        elif spec is not None and not spec.many:
            for line in array_lines(variable, shown, spec, into or spec.written, constant):
                yield indent + line
    values = ", ".join(path + name for name, *_ in layout.fields)
    yield f"{path}record = new({constant(layout.kind)}, ({values},))"


def array_lines(
    x: str, shown: str, spec: Array, written: bool, constant: Callable[[Any], str]
) -> Iterator[str]:
    """Lines that check a tensor, held by the variable `x`."""
    dtypes, whole = constant(spec.dtypes), spec.is_whole
    words = [f"_{word}" if word.isidentifier() else word for word in spec.shape]
    shape = words[0] if whole else f"({', '.join(words)},)"
    found = "_" if whole else ", ".join(w if w.isidentifier() else "_" for w in words) + ","
    indent = ""
    if spec.number is not None:
        bounds = literals(spec.number)
        number = f"number_for_all({shown}, {x}, {bounds}, {dtypes}[0], {shape}, device)"
        yield f"if not isinstance({x}, Tensor): {x} = {number}"
        yield "else:"
        indent = "    "
    yield (
        f"{indent}if type({x}) not in PLAIN or {x}.shape != {shape} or {x}.dtype not in {dtypes} "
        f"or {x}.device != device:"
    )
    expected = f"{shape}, {constant(spec)}, device, sizes"
    yield f"{indent}    {found} = bound({shown}, {x}, {expected})"
    if written:
        refusal = f"refuse({shown}, 'contiguous memory', 'a strided view')"
        yield f"if not {x}.is_contiguous(): {refusal}"
    elif spec.rows:
        yield f"if {x}.shape[-1] != 1 and {x}.stride(-1) != 1: {x} = {x}.contiguous()"
    else:
        yield f"{indent}{x} = {x}.contiguous()"
    if spec.is_logits:
        allowed = f"a vocabulary of 1 to {MAX_VOCABULARY}"
        yield f"if not 1 <= {words[-1]} <= {MAX_VOCABULARY}:"
        yield f"    refuse({shown}, {allowed!r}, {words[-1]})"


def literals(number: Range) -> str:
    """A range in the text of a check: PyTorch's compiler takes a float from elsewhere for one that
    may change, and begins again for each."""
    return ", ".join("1e999" if item == float("inf") else repr(item) for item in number)


def columns(name: str, ids: Tensor | None, V: int, device: torch.device) -> int:
    """How many columns a draft's logits have: one for each id, or the target's V."""
    if ids is None:
        return V
    return check_tensor(name, ids, (None,), ("Vd",), INT64, device).shape[0]


def number_for_all(
    name: str,
    value: Any,
    allowed: str,
    low: float,
    high: float,
    zero: bool,
    spread: bool,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    device: torch.device,
) -> Tensor:
    """A number that may stand for all entries, as a tensor; see `Range`."""
    kind: type = int if dtype == torch.int64 else float
    if not within(value, kind, low, high, zero):
        tensor = f"a tensor {list(shape)} {str(dtype).removeprefix('torch.')}"
        raise ValueError(f"{name}: expected {allowed}, or {tensor}, got {described(value)}")
    plain = type(value) in NUMBERS
    if spread:
        return seeds_for(value if plain else kind(value), shape[0], device)
    as_is = plain and -(2**63) <= value < 2**63  # an int beyond is a float's affair
    return torch.full(shape, value if as_is else kind(value), dtype=dtype, device=device)


def device_of(name: str, tensor: Tensor) -> torch.device:
    """Where a tensor lies. All tensors of an op must lie where it runs."""
    if isinstance(tensor, Tensor):
        return tensor.device
    message = f"{name}: expected a tensor, got {kind_of(tensor)}"
    listed = isinstance(tensor, (list, tuple)) and not hasattr(tensor, "_fields")
    if listed or hasattr(tensor, "__array__"):
        message += f"; convert with torch.as_tensor({name})"
    raise TypeError(message)


def as_device(device: Any) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError):
        raise ValueError(f"device: expected 'cpu', 'cuda' or the like, got {device!r}") from None


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


def check_apart(out: Tensor, **inputs: Tensor | None) -> None:
    """Raise if `out` shares memory with an input, which is read while `out` is written."""
    for name, tensor in inputs.items():
        if overlap(out, tensor):
            raise ValueError(f"out: expected memory of its own, got some of {name}'s")


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


def random_key(N: int, temperature: Any, **key: Tensor | int | None) -> list[Any]:
    """The parts of a key, for draws without words. Raise if one is missing, unless the temperature
    is the number 0: what is missing is 0 then, since nothing is drawn."""
    for name, value in key.items():
        if value is None:
            if not (isinstance(temperature, Real) and temperature == 0):
                raise ValueError(
                    f"{name}: expected an integer, or a tensor [{N}] int64, got None; pass "
                    f"{' and '.join(key)}, or words"
                )
            key[name] = 0
    return list(key.values())


def check_constant(name: str, value: float | Tensor | None, way_out: str) -> None:
    """Raise if a gradient is asked of what has none."""
    if torch.is_grad_enabled() and isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(
            f"{name}: expected a tensor without gradient, got one that requires it; {way_out}"
        )


def check_workspace(workspace: Tensor, out: Any, device: torch.device) -> None:
    """Raise unless a workspace is int64 [n] and comes with outputs; its size is the backend's."""
    check_tensor("workspace", workspace, (None,), ("words",), INT64, device)
    if out is None:
        raise ValueError("workspace: expected `out` with it, got None; allocate the outputs too")
    if not workspace.is_contiguous():
        raise ValueError("workspace: expected contiguous memory, got a strided view")
