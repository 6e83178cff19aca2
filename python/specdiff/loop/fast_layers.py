"""Faster forwards of a Hugging Face model on a CPU, where a few tokens at a time are decoded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any, Literal, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.gemma.modeling_gemma import GemmaRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.mistral.modeling_mistral import MistralRotaryEmbedding
from transformers.models.qwen2.modeling_qwen2 import Qwen2RotaryEmbedding
from transformers.pytorch_utils import Conv1D

from specdiff_kernels import PackedWeight
from specdiff_kernels.ops.decoder_layer import row_norm
from specdiff_kernels.ops.registry import watched
from specdiff_kernels.ops.skinny_linear import unchecked

from . import decoder_layers, gated_mlps
from .decoder_layers import LAYERS as DECODER_LAYERS
from .decoder_layers import FastLayer, fault_of
from .gated_mlps import FastMlp
from .known import LINEAR, is_fp32_norm, is_gated_mlp, norm_of
from .memory import CHUNK, Store, trim
from .only_packed import OnlyPacked, held, kept, parameter, values_of, with_values
from .packed import Packed, usable, version_of

ROTARY = (
    LlamaRotaryEmbedding, MistralRotaryEmbedding, Qwen2RotaryEmbedding, GemmaRotaryEmbedding,
)  # fmt: skip
LENGTH_DEPENDENT = ("dynamic", "longrope")  # one rescaling for the whole batch
Model = TypeVar("Model", bound=nn.Module)


def accelerate(model: Model, *, packed: bool | Literal["only"] = True, bf16: bool = False) -> Model:
    """Swap layers of an fp32 model on a CPU for native ones, in place.

    Linear layers and torch's norms of any model are swapped, norms and gated MLPs of transformers'
    models where their code is that of Llama's or Gemma's, rotary positions of the following
    models, and whole decoder layers of GPT-2, GPT-Neo, Llama, Mistral, Qwen2 and Gemma. Forwards
    of 2 to 9 rows (tokens times batch) then cost little more than one of a single row. A token's
    result is the same, bit for bit, whether it is decoded alone, verified among K + 1, or read with
    its prompt or beside other rows; `Target.inconsistency` says where that holds of a whole model.
    A decoder layer or an MLP goes module by module where something in it has hooks, was replaced or
    is not known here.

    Each linear layer packs a copy of its weight when it is first used, in huge pages, and keeps the
    weight too: linear layers take twice the memory. A forward that needs gradients, or is not in
    fp32 on a CPU, goes the usual way.

    Args:
        model: any module.
        packed: False uses weights where they lie, without a copy and with the same bits, and takes
            about half as long again for few rows. GPT-2's are transposed in place. "only" packs now
            and keeps nothing but the copies: the model takes as much memory as before. See below.
        bf16: round the copies to bf16, which halves them and the traffic, and changes the logits.

    With packed="only" a weight is a new parameter, whose values lie packed, and so is an embedding
    that is tied to it; make an optimizer afterwards. What reads or writes it finds or leaves the
    true values, and takes an unpacked copy for as long as it runs: `state_dict`, saving, loading
    in place, adapters, training, forwards that go the usual way. Copies and pickles of the model
    are like it. What asks for a weight's memory, as NumPy does, raises a NotImplementedError. A
    weight that is replaced, by `to(dtype)` or `load_state_dict(assign=True)`, lies unpacked beside
    a copy until the model is accelerated anew. So does one whose memory is shared with something
    that is neither a linear layer nor an embedding of the model.

    Returns:
        the same model. Its copies follow its weights: each is made again when its weight has
        changed. A write through `weight.data`, or NumPy, leaves no trace but in the values, of
        which each call looks at 64: it sees that a LoRA adapter was merged, or all values
        changed in some other way. After such a write to a part of a weight, as to one row,
        accelerate anew; or write to the weight itself under `torch.no_grad()`, which is counted.

    Raises:
        ValueError: bf16 without packed=True, or packed is none of the three.

    Example:
        >>> target = Target(accelerate(model))
    """
    if packed not in (True, False, "only"):
        raise ValueError(f"packed: expected True, False or 'only', got {packed!r}")
    if bf16 and not packed:
        raise ValueError("bf16: a rounded weight is a copy, which is packed: leave packed=True")
    if bf16 and packed == "only":
        raise ValueError(
            "bf16: `restore` makes the weights of what packed='only' keeps, and these would be "
            "rounded: leave packed=True"
        )
    restore(model)
    store = Store()
    module: Any
    for module in model.modules():
        kind = type(module)
        if "forward" in vars(module):
            continue
        if kind in LINEAR and usable(module.weight):
            if kind is Conv1D and not packed:  # [in, out]: laid out as [out, in], seen as ever
                module.weight.data = module.weight.data.t().contiguous().t()
            copy = Packed(torch.bfloat16 if bf16 else torch.float32, store) if packed else None
            module.forward = partial(linear, module, copy)
        elif is_fp32_norm(module):
            module.forward = partial(norm, module)
        elif is_gated_mlp(kind) and gated_mlps.fault_of(module) is None:
            module.forward = partial(gated_mlps.mlp, module, FastMlp(weight_of))
        elif kind in DECODER_LAYERS and fault_of(module) is None:
            module.forward = partial(decoder_layers.layer, module, FastLayer(weight_of))
    if packed == "only":
        keep_packed(model, store)
    if is_accelerated(model):
        for module in model.modules():
            if type(module) in ROTARY and module.rope_type not in LENGTH_DEPENDENT:
                module.forward = partial(rotary, module, RotaryTable())
    return model


def keep_packed(model: nn.Module, store: Store) -> None:
    """Put packed weights in place of those that only linear layers and embeddings use."""
    uses: dict[int, list[tuple[Any, str]]] = {}
    tensor: Any
    for module in model.modules():
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if usable(tensor) and tensor.numel():
                place = tensor.untyped_storage().data_ptr()
                uses.setdefault(place, []).append((module, name))
    freed = 0  # bytes since memory was last given back, so that two copies never lie there
    for users in uses.values():
        weights = {id(module._parameters.get(name)) for module, name in users}
        kinds = {kind_of(module) if name == "weight" else None for module, name in users}
        weight = users[0][0]._parameters.get(users[0][1])
        if len(weights) > 1 or weight is None:
            continue
        if kinds not in ({Conv1D}, {nn.Linear}, {nn.Linear, nn.Embedding}):
            if not weight.is_inference():  # or the file that it was mapped from would stay mapped
                weight.data = weight.data.clone()
            continue
        packed = parameter(kept(weight, store, kinds == {Conv1D}), weight.requires_grad)
        packed.grad = weight.grad
        for module, name in users:
            module._parameters[name] = packed
            module.register_state_dict_post_hook(with_values)
        freed += weight.nbytes
        del weight
        if freed >= CHUNK:
            trim()
            freed = 0
    trim()


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """Of those that may use a weight that lies packed alone."""
    if isinstance(module, nn.Embedding):
        return nn.Embedding
    return type(module) if swapped(module) and type(module) in LINEAR else None


def restore(model: Model) -> Model:
    """Undo `accelerate`. Returns the same model."""
    plain: dict[int, nn.Parameter] = {}
    module: Any
    for module in model.modules():
        if swapped(module):
            del module.forward
            if type(module) is Conv1D and type(module.weight) is not OnlyPacked:
                module.weight.data = module.weight.data.contiguous()
        weight = module._parameters.get("weight")
        if type(weight) is OnlyPacked:
            if id(weight) not in plain:
                plain[id(weight)] = nn.Parameter(values_of(weight), weight.requires_grad)
                plain[id(weight)].grad = weight.grad
            module._parameters["weight"] = plain[id(weight)]
        hooks = module._state_dict_hooks
        for key in [key for key, hook in hooks.items() if hook is with_values]:
            del hooks[key]
    return model


def is_accelerated(model: nn.Module) -> bool:
    """Whether any layer of a model is swapped."""
    return any(swapped(module) for module in model.modules())


def left_to_torch(model: Any, layers: Iterable[nn.Module]) -> str | None:
    """What of a causal language model is computed by torch, with sums that depend on how many
    tokens there are; None: nothing is.

    Args:
        layers: the model's decoder layers.
    """
    inside: set[nn.Module] = set()
    for index, layer in enumerate(layers):
        forward = vars(layer).get("forward")
        inside.update(layer.modules())
        if not isinstance(forward, partial) or forward.func is not decoder_layers.layer:
            known = type(layer) in DECODER_LAYERS
            fault = fault_of(layer) if known else f"it is a {type(layer).__name__}"
            return f"layer {index} is torch's: {fault or 'it is not accelerated'}"
        if (fault := forward.args[1].reason(layer)) is not None:
            return f"layer {index} is torch's: {fault}"
    for name, module in model.named_modules():
        computes = module._parameters and not isinstance(module, nn.Embedding)
        if module not in inside and not swapped(module) and (computes or is_rotary(module)):
            return f"{name} is torch's: a {type(module).__name__} that is not accelerated"
    return None


def is_rotary(module: nn.Module) -> bool:
    return "inv_freq" in module._buffers


def swapped(module: nn.Module) -> bool:
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func in FORWARDS


def fits(x: Tensor, shape: Sequence[int], bias: Tensor | None) -> bool:
    """Whether `unchecked` may have them with a weight of that shape; what does not fit is torch's,
    and so is the error."""
    if bias is not None and not (usable(bias) and bias.shape == (shape[0],)):
        return False
    return usable(x) and x.shape[-1] == shape[1]


def learns(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


def weight_of(module: Any) -> PackedWeight | Tensor:
    """The weight that a linear layer multiplies with, [out, in]."""
    packs = held(module, module.weight)
    if packs is not None:
        return packs
    weight = module.weight.t() if type(module) is Conv1D else module.weight
    if swapped(module) and module.forward.args[1] is not None:
        packed: PackedWeight = module.forward.args[1].of(weight)
        return packed
    return weight if weight.stride(1) == 1 else weight.contiguous()


def linear(module: Any, copy: Packed | None, x: Tensor) -> Tensor:
    """The forward of a swapped layer. x [..., K] -> [..., N]"""
    own = module._parameters  # an attribute of a module takes longer to find than a row to multiply
    if "weight" not in own or "bias" not in own:  # parametrized, or replaced by a tensor
        return type(module).forward(module, x)
    weight, bias = own["weight"], own["bias"]
    if weight is None or x.numel() == 0 or learns(x, weight, bias):
        return type(module).forward(module, x)
    packs = held(module, weight)
    if packs is not None:
        if not fits(x, (packs.rows, packs.packs.shape[1]), bias):
            return type(module).forward(module, x)
        return unchecked(x.contiguous(), packs, bias if bias is None else bias.contiguous())
    if type(module) is Conv1D:
        weight = weight.t()
    if not (usable(weight) and fits(x, weight.shape, bias)):
        return type(module).forward(module, x)
    if copy is not None and torch.compiler.is_compiling():  # a copy cannot be followed there
        weight = weight.to(copy.dtype)
    elif copy is not None:
        weight = copy.of(weight)
    if isinstance(weight, Tensor) and weight.stride(1) != 1:
        weight = weight.contiguous()
    return unchecked(x.contiguous(), weight, bias if bias is None else bias.contiguous())


def norm(module: Any, x: Tensor) -> Tensor:
    """The forward of a swapped norm. x [..., d] -> [..., d]"""
    own = module._parameters
    weight, bias = own.get("weight"), own.get("bias")
    read = norm_of(type(module))
    if (
        read is None
        or torch.compiler.is_compiling()
        or not (usable(x) and usable(weight) and (bias is None or usable(bias)))
        or x.shape[-1:] != weight.shape
        or watched((x, weight, bias))
    ):
        return type(module).forward(module, x)
    return row_norm(x.contiguous(), read(module))


class RotaryTable:
    """Cosines and sines by position, made 256 positions at a time, so that each has one value."""

    rows = 256

    def __init__(self) -> None:
        self.key: tuple[int, int] | None = None
        self.parts: tuple[Tensor, ...] = ()

    def __reduce__(self) -> tuple[type[RotaryTable], tuple[()]]:
        return RotaryTable, ()

    def of(self, module: Any, x: Tensor, longest: int) -> tuple[Tensor, ...]:
        """cos and sin [positions, columns] up to a position."""
        key = (module.inv_freq.data_ptr(), version_of(module.inv_freq))
        if key != self.key:
            self.key, self.parts = key, ()
        have = len(self.parts[0]) if self.parts else 0
        if longest >= have:
            end = max(longest + 1, 2 * have)
            like, new = x.detach()[:1, :1], []
            for start in range(have, end, self.rows):
                positions = torch.arange(start, start + self.rows)[None]
                new.append([part[0] for part in type(module).forward(module, like, positions)])
            joined = zip(*([self.parts] if self.parts else []), *new, strict=True)
            self.parts = tuple(torch.cat(parts) for parts in joined)
        return self.parts


def rotary(module: Any, table: RotaryTable, x: Tensor, position_ids: Tensor) -> Any:
    """The forward of swapped rotary positions. -> cos and sin [B, Q, columns]"""
    if torch.compiler.is_compiling() or not usable(x) or watched((x, position_ids)):
        return type(module).forward(module, x, position_ids)
    if position_ids.numel() == 0 or int(position_ids.min()) < 0:
        return type(module).forward(module, x, position_ids)
    parts = table.of(module, x, int(position_ids.max()))
    return tuple(F.embedding(position_ids, part) for part in parts)


FORWARDS = (linear, norm, rotary, gated_mlps.mlp, decoder_layers.layer)
