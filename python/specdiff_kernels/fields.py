"""Records of what an op takes and gives, each described once: by its annotations.

A record is a NamedTuple. Its annotated fields are what kernels are given; those without an
annotation stay in Python. A field that is a record itself stands for that one's fields. The schema
that PyTorch is told, checks, outputs, and what native code is given all follow from here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from enum import IntEnum
from functools import cache
from types import NoneType, UnionType
from typing import (
    Annotated,
    Any,
    Generic,
    NamedTuple,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

import torch
from torch import Tensor

Record = TypeVar("Record", bound=tuple)
Sizes = dict[str, Any]  # what the words of shapes stand for

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # as csrc/ numbers them
MAX_VOCABULARY = 2**19 - 1  # 2^19 weights of 2^44 would overflow an int64 total


class Range(NamedTuple):
    """Numbers that a scalar may be, or that may stand for all entries of a tensor."""

    allowed: str
    low: float
    high: float
    zero: bool = False  # 0 too
    spread: bool = False  # a seed: each entry gets its own, by `row_seeds`


NOT_NEGATIVE = Range("a number >= 0", 0, float("inf"))


class Array(NamedTuple):
    """A tensor of one of `dtypes`. Its shape is numbers and words that stand for a size each, which
    is what the tensor has if it is not known; or a word in small letters for a whole shape."""

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[str, ...]
    number: Range | None = None  # which number may stand for it
    rows: bool = False  # may have strides, but for its last dimension
    sized: bool = False  # native code is also given its sizes
    written: bool = False  # in place
    many: bool = False  # a list of them
    is_logits: bool = False
    like: str = ""  # of outputs: the input that it shares its dtype with
    way_out: str = ""  # what to do about a wrong shape

    @property
    def is_whole(self) -> bool:
        """Whether one word stands for the whole shape."""
        return self.shape[0].islower()


class Scalar(NamedTuple):
    """A number, None for 0; or one of the words of `choices`, which native code counts from 0."""

    kind: type = int
    schema: str = "SymInt"  # or `torch.compile` makes a graph for each value
    choices: tuple[str, ...] = ()
    number: Range | None = None  # which it may be, where it is given
    size: str = ""  # the word of shapes that it stands for


class Group(NamedTuple):
    """How a record stands in another one."""

    N: str = "N"  # what its N is there
    named: bool = True  # whether the caller knows it by its name
    given: tuple[str, ...] = ()  # what may not be left out of it there


def _array(*dtypes: torch.dtype, **fixed: Any) -> Any:
    def array(shape: str, number: Range | None = None, **options: Any) -> Array:
        return Array(dtypes, tuple(shape.split()), number, **(fixed | options))

    return array


F32, F64 = _array(torch.float32), _array(torch.float64)
I32, I64 = _array(torch.int32), _array(torch.int64)
BOOL = _array(torch.bool)
FLOATS = _array(torch.float32, torch.bfloat16, torch.float16)
Logits = _array(torch.float32, torch.bfloat16, torch.float16, rows=True, is_logits=True)
WEIGHTS = _array(torch.float32, torch.bfloat16, rows=True)
CACHE = _array(torch.float32, torch.bfloat16, torch.float16, rows=True)
SIZE, FLAG = Scalar(), Scalar(bool, "bool")


ITSELF = Group()


class Field(NamedTuple):
    name: str
    spec: Array | Scalar | None  # None: stays in Python, or is a record
    record: Layout | None
    optional: bool


class Layout(Generic[Record]):
    """A record's fields."""

    def __init__(self, kind: type[Record], group: Group = ITSELF) -> None:
        self.kind = kind
        self.named = group.named
        hints = get_type_hints(kind, include_extras=True)
        self.fields = tuple(_field(name, hints[name], group) for name in kind._fields)  # type: ignore[attr-defined]
        # of all annotated fields, those of records in it too: (name, optional, spec)
        self.leaves = tuple(self._leaves())
        # written out, as `collections.namedtuple` does: loops over fields would take longer than
        # all else that a call does beside its kernel
        self.flatten: Callable[[Any], tuple[Any, ...]] = eval(f"lambda record: ({self._items()})")
        scope = {"torch": torch, "new": tuple.__new__, "logits": _logits}
        self.pack: Callable[[Any], list[int]] = eval(f"lambda record: [{self._numbers()}]", scope)
        outputs = self._outputs(scope)
        self.empty: Callable[..., Record] = eval(f"lambda sizes, device, inputs: {outputs}", scope)

    def _items(self, record: str = "record") -> str:
        """Python expressions of a record's values, in the order in which kernels take them."""
        items = ""
        for index, (_, spec, inner, optional) in enumerate(self.fields):
            item = f"{record}[{index}]"
            if inner is not None:
                nothing = "None, " * len(inner.leaves)
                items += _or_else(item, nothing, inner._items(item), optional)
            elif spec is not None:
                items += f"{item}, "
        return items

    def _numbers(self, record: str = "record") -> str:
        """Source of the numbers that native code is given of a record. An address is 0 for none;
        logits and sized tensors are several numbers."""
        numbers = ""
        for index, (_, spec, inner, optional) in enumerate(self.fields):
            item = f"{record}[{index}]"
            if inner is not None:
                nothing = "0, " * sum(_width(leaf) for _, _, leaf in inner.leaves)
                numbers += _or_else(item, nothing, inner._numbers(item), optional)
            elif isinstance(spec, Scalar):
                numbers += f"{spec.choices}.index({item}), " if spec.choices else f"{item}, "
            elif spec is not None and not spec.many:
                parts = f"{item}.data_ptr(), " + f"*{item}.shape, " * spec.sized
                parts = f"*logits({item}), " if spec.is_logits else parts
                numbers += _or_else(item, "0, " * _width(spec), parts, optional)
        return numbers

    def _outputs(self, scope: dict[str, Any]) -> str:
        """New memory for it."""
        outputs = ""
        for _, spec, inner, _ in self.fields:
            if inner is not None:
                outputs += f"{inner._outputs(scope)}, "
            elif isinstance(spec, Array):
                words = (word if word.isdigit() else f"sizes[{word!r}]" for word in spec.shape)
                shape = "".join(f"{word}, " for word in words)
                dtype = f"inputs.{spec.like}.dtype" if spec.like else spec.dtypes[0]
                outputs += f"torch.empty(({shape}), dtype={dtype}, device=device), "
        scope[self.kind.__name__] = self.kind
        return f"new({self.kind.__name__}, ({outputs}))"

    def _leaves(self) -> Iterator[tuple[str, bool, Any]]:
        for name, spec, record, optional in self.fields:
            if record is not None:
                for inner, may_be_none, leaf in record.leaves:
                    yield f"{name}_{inner}", optional or may_be_none, leaf
            elif spec is not None:
                yield name, optional, spec


def _field(name: str, hint: Any, group: Group) -> Field:
    """A field by its annotation."""
    spec = None
    if get_origin(hint) is Annotated:
        hint, spec = get_args(hint)
    kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    optional = NoneType in kinds and name not in group.given and not isinstance(spec, Scalar)
    records = [kind for kind in kinds if hasattr(kind, "_fields")]
    if records:
        return Field(name, None, Layout(records[0], spec or ITSELF), optional)
    if isinstance(spec, Array):
        spec = spec._replace(shape=tuple(group.N if size == "N" else size for size in spec.shape))
    return Field(name, spec, None, optional)


def _or_else(item: str, nothing: str, parts: str, optional: bool) -> str:
    return f"*(({nothing}) if {item} is None else ({parts})), " if optional else parts


def _width(spec: Array | Scalar) -> int:
    """How many numbers native code is given for it."""
    if isinstance(spec, Scalar):
        return 1
    return 6 if spec.is_logits else 1 - spec.many + len(spec.shape) * spec.sized


def _logits(logits: Tensor) -> tuple[int, ...]:
    """[N, V] or [B, N, V] -> address, dtype, V, batch stride, row stride, N"""
    *batch_stride, row_stride, _ = logits.stride()
    *_, N, V = logits.shape
    batch = batch_stride[0] if batch_stride else 0
    return logits.data_ptr(), DTYPES[logits.dtype], V, batch, row_stride, N


layout_of: Callable[[Any], Layout] = cache(Layout)


def unflatten(layout: Layout[Record], flat: Iterator[Any]) -> Record:
    """The record again; what stays in Python takes its default."""
    values = {}
    for name, spec, inner, optional in layout.fields:
        if inner is not None:
            value = unflatten(inner, flat)
            values[name] = None if optional and not any_given(inner, value) else value
        elif isinstance(spec, Scalar) and issubclass(spec.kind, IntEnum):
            values[name] = spec.kind(next(flat))
        elif spec is not None:
            values[name] = next(flat)
    return layout.kind(**values)


def any_given(layout: Layout, record: Any) -> bool:
    return any(value is not None for value in layout.flatten(record))


def sizes_of(layout: Layout, flat: Sequence[Any]) -> Sizes:
    """Sizes of the words in shapes, from checked inputs."""
    sizes: Sizes = {}
    for (_, _, spec), value in zip(layout.leaves, flat, strict=True):
        if isinstance(value, Tensor):
            sizes.update(zip(spec.shape, value.shape, strict=False))
        elif isinstance(spec, Scalar) and spec.size:
            sizes[spec.size] = value
    return sizes


def schema(layout: Layout, aliases: str, *, out: bool = False) -> str:
    """Its fields as PyTorch's schemas have them; `aliases` name what is written."""
    names = iter(aliases)
    parts = []
    for name, optional, spec in layout.leaves:
        if isinstance(spec, Scalar):
            kind = spec.schema
        else:
            kind = f"Tensor({next(names)}!)" if out or spec.written else "Tensor"
            kind += "[]" if spec.many else ""
        parts.append(f"{kind}{'?' * optional} {'out_' * out}{name}")
    return ", ".join(parts)


def describe(record: type, **fields: str) -> None:
    """Give the fields of a NamedTuple docstrings, which `help` shows."""
    for name, text in fields.items():
        getattr(record, name).__doc__ = text
