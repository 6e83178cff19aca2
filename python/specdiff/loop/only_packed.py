"""OnlyPacked: a weight whose values lie in its packed copy and nowhere else."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map
from transformers.pytorch_utils import Conv1D

from specdiff_kernels import PackedWeight, pack_weight
from specdiff_kernels.ops.skinny_linear import packed_shape

from .memory import Store

aten = torch.ops.aten


class Step(NamedTuple):
    """How a view is made of a tensor."""

    function: Any
    args: tuple[Any, ...]  # without the tensor
    kwargs: dict[str, Any]
    number: int | None = None  # of several views

    def __call__(self, tensor: Tensor) -> Tensor:
        made: Any = self.function(tensor, *self.args, **self.kwargs)
        return made if self.number is None else made[self.number]


class Kept(NamedTuple):
    """Where a weight's values lie."""

    packed: PackedWeight
    store: Store  # where the memory of copies comes from
    transposed: bool  # as a Conv1D's weight, which is [K, N]

    def read(self) -> Tensor:
        """The weight, unpacked, in memory of its own."""
        packs, N = self.packed
        K, width = packs.shape[1:]
        shape = (K, N) if self.transposed else (N, K)
        weight = torch.empty(shape, dtype=packs.dtype, device=packs.device)
        rows = weight.t() if self.transposed else weight
        whole = N // width
        rows[: whole * width].view(whole, width, K).copy_(packs[:whole].transpose(1, 2))
        if N % width:
            rows[whole * width :] = packs[whole].t()[: N % width]
        return weight

    def write(self, weight: Tensor) -> None:
        packs = self.packed.packs
        pack_weight(weight.t() if self.transposed else weight, packs.dtype, out=packs)


def kept(weight: Tensor, store: Store, transposed: bool) -> Kept:
    """A packed copy of a weight."""
    N, K = reversed(weight.shape) if transposed else weight.shape
    packs = store.take(packed_shape(N, K), weight.dtype)
    made = Kept(PackedWeight(packs, N), store, transposed)
    made.write(weight)
    return made


def refused(name: str) -> Any:
    def refuse(self: Tensor, *args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(  # which peft expects of a tied embedding without an address
            f"{name}: expected a weight with memory of its own, got one whose values lie packed "
            "(accelerate(packed='only')): clone() it to read, or call specdiff.restore(model) first"
        )

    return refuse


class OnlyPacked(Tensor):
    """A weight, or a view of one, whose values lie packed, for `skinny_linear`.

    It has a weight's shape, dtype, gradient and values. An operation on it is given an unpacked
    copy for as long as it runs, and what it writes is packed again, through views as well. Rows
    are looked up where they lie. What asks for its memory raises a NotImplementedError. A tensor
    that is assigned to `data` is copied if it fits, and else it takes the place of the values.

    Args:
        kept: the weight's values.
        steps: from the weight to this view.
        requires_grad: whether gradients are accumulated.

    Example:
        >>> torch.equal(parameter(kept(torch.eye(3), Store(), False)), torch.eye(3))
        True
    """

    kept: Kept
    steps: tuple[Step, ...]
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(
        cls, kept: Kept, steps: tuple[Step, ...] = (), requires_grad: bool = False
    ) -> OnlyPacked:
        packs, N = kept.packed
        shape = (packs.shape[1], N) if kept.transposed else (N, packs.shape[1])
        with torch.inference_mode(False):  # views in inference mode share its count of writes
            like = torch.empty(shape, dtype=packs.dtype, device="meta")
            for step in steps:
                like = step(like)
            made: OnlyPacked = Tensor._make_wrapper_subclass(
                cls,
                like.shape,
                strides=like.stride(),
                dtype=like.dtype,
                device=packs.device,
                requires_grad=requires_grad,
            )
        made.kept, made.steps = kept, steps
        return made

    @classmethod
    @torch.compiler.disable  # a compiler leaves its graph here, but not for layers' own forwards
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if function in (aten.detach.default, aten.alias.default):
            return cls(args[0].kept, args[0].steps)
        if function is aten.embedding.default:
            rows = looked_up(*args[:2])
            if rows is not None:
                return rows
        composed = function.decompose(*args, **kwargs)  # only inference mode brings such here
        if composed is not NotImplemented:
            return composed
        opened: dict[int, Opened] = {}

        def open(x: Any) -> Any:
            if type(x) is not cls:
                return x
            if id(x) not in opened:
                opened[id(x)] = Opened(x)
            return opened[id(x)].view

        out = function(*tree_map(open, args), **tree_map(open, kwargs))
        written = [x for x in written_to(function, args, kwargs) if type(x) is cls]
        for x in written:
            opened[id(x)].close(str(function))
        if written:
            given = {id(each.view): each.tensor for each in opened.values()}
            return tree_map(lambda y: given.get(id(y), y), out)
        if function.is_view and type(args[0]) is cls:
            x, step = args[0], Step(function, tuple(args[1:]), kwargs)
            if isinstance(out, Tensor):
                return cls(x.kept, (*x.steps, step))
            return [cls(x.kept, (*x.steps, step._replace(number=i))) for i in range(len(out))]
        return out

    @property
    def data(self) -> Tensor:
        alias: Tensor = vars(torch._C.TensorBase)["data"].__get__(self)
        return alias

    @data.setter
    def data(self, new: Tensor) -> None:
        if type(new) is OnlyPacked and new.kept is self.kept and new.steps == self.steps:
            return
        if (new.shape, new.dtype, new.device) != (self.shape, self.dtype, self.device):
            self._become(new)
            return
        with torch.no_grad():
            self.data.copy_(new)

    def _become(self, new: Tensor) -> None:
        """Hold a tensor that does not fit into the packed memory, as `Module.to` assigns it."""
        plain = new.detach()
        if isinstance(self, nn.Parameter):
            plain = nn.Parameter(plain, self.requires_grad)
            if self.grad is not None and self.shape == new.shape:
                plain.grad = self.grad.to(new.device, new.dtype)
        try:
            torch.utils.swap_tensors(self, plain)
        except RuntimeError as error:
            raise RuntimeError(
                f"data: a weight that lies packed (accelerate(packed='only')), referred to by "
                f"others cannot become {new.dtype} of shape {list(new.shape)} on {new.device}: "
                "call specdiff.restore(model) first"
            ) from error

    data_ptr = refused("data_ptr")
    numpy = refused("numpy")
    __array__ = refused("numpy")
    __dlpack__ = refused("__dlpack__")
    storage = refused("storage")
    _typed_storage = refused("storage")
    untyped_storage = refused("untyped_storage")
    share_memory_ = refused("share_memory_")

    def tolist(self) -> Any:
        return values_of(self).tolist()

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"OnlyPacked({values_of(self)!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        if not isinstance(self, nn.Parameter):
            return values_of(self)
        packed, store, transposed = self.kept
        store = deepcopy(store, memo)  # one for all weights of a model
        packs = store.take(packed.packs.shape, packed.packs.dtype).copy_(packed.packs)
        copy = Kept(PackedWeight(packs, packed.rows), store, transposed)
        return parameter(copy, self.requires_grad)

    def __reduce_ex__(self, protocol: Any) -> Any:
        if not isinstance(self, nn.Parameter):
            return values_of(self).__reduce_ex__(protocol)
        _, store, transposed = self.kept
        return rebuilt, (self.kept.read(), store, transposed, self.requires_grad)


class Opened:
    """A view of an unpacked copy, for one operation."""

    def __init__(self, tensor: OnlyPacked) -> None:
        self.tensor = tensor
        self.whole = self.view = tensor.kept.read()
        for step in tensor.steps:
            self.view = step(self.view)
        self.place = self.view.data_ptr(), self.view.shape, self.view.stride()

    def close(self, name: str) -> None:
        """Pack what was written."""
        if self.place != (self.view.data_ptr(), self.view.shape, self.view.stride()):
            refused(name)(self.tensor)
        self.tensor.kept.write(self.whole)


def written_to(function: Any, args: Any, kwargs: dict[str, Any]) -> Iterator[Any]:
    """The arguments of an operator that it writes to."""
    for place, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            yield from value if isinstance(value, (list, tuple)) else [value]


def parameter(kept: Kept, requires_grad: bool = True) -> OnlyPacked:
    """A module's parameter with those values."""
    made = OnlyPacked(kept, (), requires_grad)
    made._is_param = True  # by which torch knows parameters of such types
    return made


def rebuilt(weight: Tensor, store: Store, transposed: bool, requires_grad: bool) -> OnlyPacked:
    """What a pickle makes."""
    return parameter(kept(weight, store, transposed), requires_grad)


def values_of(weight: OnlyPacked) -> Tensor:
    """A plain contiguous copy, without a gradient."""
    with torch.no_grad():
        view = Opened(weight).view
        return view.clone(memory_format=torch.contiguous_format) if weight.steps else view


def looked_up(weight: Any, ids: Tensor) -> Tensor | None:
    """Rows of a weight; None where they are not looked up in packed memory."""
    if type(weight) is not OnlyPacked or weight.steps or weight.kept.transposed:
        return None
    packs, N = weight.kept.packed
    if ids.numel() == 0 or int(ids.min()) < 0 or int(ids.max()) >= N:  # torch's error
        return None
    return packs[ids // packs.shape[2], :, ids % packs.shape[2]]


def held(module: nn.Module, weight: Any) -> PackedWeight | None:
    """What a linear layer multiplies with, if its weight lies packed in that way."""
    if type(weight) is not OnlyPacked or weight.steps:
        return None
    return weight.kept.packed if weight.kept.transposed == (type(module) is Conv1D) else None


def memory_of(tensor: Tensor) -> Tensor:
    """Where a tensor's values lie."""
    return tensor.kept.packed.packs if type(tensor) is OnlyPacked else tensor


def with_values(module: nn.Module, states: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Hook of a module's `state_dict`, which then holds plain tensors: one a weight, that others
    may share."""
    key = f"{prefix}weight"
    weight: Any = states.get(key)
    if type(weight) is not OnlyPacked or isinstance(weight, nn.Parameter):  # keep_vars
        return
    mark = id(weight.kept)
    for value in states.values():
        if getattr(value, "specdiff_packed", None) == mark:
            states[key] = value
            return
    states[key] = values_of(weight)
    states[key].specdiff_packed = mark
