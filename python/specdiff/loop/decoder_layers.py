"""Decoder layers of transformers' models as single native calls on a CPU, where they fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.modules import module as modules
from transformers import activations as acts
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer, GemmaRMSNorm
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoBlock
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRMSNorm
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer, MistralRMSNorm
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm
from transformers.pytorch_utils import Conv1D

from specdiff_kernels import PackedWeight
from specdiff_kernels.backends import find
from specdiff_kernels.ops.decoder_layer import (
    MOST_COLUMNS,
    DecoderLayer,
    LayerCall,
    Linear,
    Norm,
    decoder_layer,
)
from specdiff_kernels.ops.skinny_linear import PACK

from .attention import rows_seen
from .cache import OpenCache
from .only_packed import OnlyPacked, held, memory_of
from .packed import usable, version_of

CACHES = ("cache", "past_key_values", "layer_past")  # what layers call it
ACTIVATIONS = {
    nn.SiLU: "silu",
    acts.SiLUActivation: "silu",
    acts.NewGELUActivation: "gelu_tanh",
    acts.GELUTanh: "gelu_tanh",
    acts.GELUActivation: "gelu",
    nn.ReLU: "relu",
}
NORMS: dict[type, Callable[[Any], Norm]] = {
    LlamaRMSNorm: lambda m: Norm("rms", m.weight, None, m.variance_epsilon),
    MistralRMSNorm: lambda m: Norm("rms", m.weight, None, m.variance_epsilon),
    Qwen2RMSNorm: lambda m: Norm("rms", m.weight, None, m.variance_epsilon),
    GemmaRMSNorm: lambda m: Norm("rms", m.weight, None, m.eps, 1.0),
    nn.LayerNorm: lambda m: Norm("layer", m.weight, m.bias, m.eps),
    nn.RMSNorm: lambda m: Norm("rms", m.weight, None, m.eps or 2.0**-23),
}


class Shape(NamedTuple):
    """What a layer's attention is beside its weights."""

    size: int  # columns of a head
    scale: float
    number: int  # of the layer in a cache
    window: int | None = None
    fault: str | None = None  # what is not known here


class Family(NamedTuple):
    """Where layers of a class keep their parts."""

    shape: Callable[[Any], Shape]
    attention_norm: str
    qkv: tuple[str, ...]
    output: str
    mlp_norm: str
    gate: str | None
    up: str  # with the gate before it in one layer, if the two are the same
    activation: str
    down: str
    own: tuple[str, ...] = ()  # modules whose forward has to be the family's
    returns: Callable[[Tensor], Any] = lambda x: x
    windows_in_mask: bool = True  # whether the mask that it is given knows its window

    @property
    def linears(self) -> tuple[str, ...]:
        names = (*self.qkv, self.output, self.gate, self.up, self.down)
        return tuple(dict.fromkeys(name for name in names if name is not None))


def llama_shape(layer: Any) -> Shape:
    attention = layer.self_attn
    fault = None if attention.is_causal else "its attention is not causal"
    return Shape(attention.head_dim, attention.scaling, attention.layer_idx, None, fault)


def gpt2_shape(layer: Any) -> Shape:
    attention = layer.attn
    crossed = attention.is_cross_attention or hasattr(layer, "crossattention")
    fault = "it has cross-attention" if crossed else None
    return Shape(attention.head_dim, attention.scaling, attention.layer_idx, None, fault)


def gpt_neo_shape(layer: Any) -> Shape:
    attention = layer.attn.attention
    window = attention.config.window_size if attention.attention_type == "local" else None
    return Shape(attention.head_dim, 1.0, attention.layer_id, window)


LLAMA = Family(
    llama_shape, "input_layernorm", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.act_fn",
    "mlp.down_proj", ("self_attn", "mlp"),
)  # fmt: skip
GPT2 = Family(
    gpt2_shape, "ln_1", ("attn.c_attn",), "attn.c_proj", "ln_2", None, "mlp.c_fc", "mlp.act",
    "mlp.c_proj", ("attn", "mlp"),
)  # fmt: skip
GPT_NEO = GPT2._replace(
    shape=gpt_neo_shape,
    qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
    output="attn.attention.out_proj",
    own=("attn", "attn.attention", "mlp"),
    returns=lambda x: (x, None),
    windows_in_mask=False,
)
LAYERS: dict[type, Family] = {
    LlamaDecoderLayer: LLAMA,
    GemmaDecoderLayer: LLAMA,
    MistralDecoderLayer: LLAMA._replace(
        shape=lambda layer: llama_shape(layer)._replace(
            window=layer.self_attn.config.sliding_window
        )
    ),
    Qwen2DecoderLayer: LLAMA._replace(
        shape=lambda layer: llama_shape(layer)._replace(window=layer.self_attn.sliding_window)
    ),
    GPT2Block: GPT2,
    GPTNeoBlock: GPT_NEO,
}


class FastLayer:
    """A layer's native form, made anew when its parts or weights have changed.

    Args:
        weight_of: gives the weight of a linear layer as its products take it.
    """

    def __init__(self, weight_of: Callable[[Any], PackedWeight | Tensor]) -> None:
        self.weight_of = weight_of
        self.watch = find("watch", "cpu", None)
        self.children: list[tuple[Any, ...]] | None = None
        self.native: DecoderLayer | None = None

    def __reduce__(self) -> tuple[type[FastLayer], tuple[Any]]:
        return FastLayer, (self.weight_of,)  # a copied or saved layer makes its own

    def ready(self, layer: nn.Module) -> DecoderLayer | None:
        """The native form; None where the layer has to go torch's way."""
        if self.reason(layer) is not None:
            return None
        if self.native is None or self.changed():
            self.read()
        return self.native

    def reason(self, layer: nn.Module) -> str | None:
        """Why the layer has to go torch's way; None: it has not. Made for each token."""
        if self.children is None or [tuple(d.values()) for d in self.parents] != self.children:
            self.look(layer)
        if self.fault is not None:
            return self.fault
        if any(self.hooks):
            return "a module in it has hooks"
        if [own.get("forward") for own in self.inside] != self.forwards:
            return "the forward of a module in it was replaced"
        return None

    def look(self, layer: nn.Module) -> None:
        """Find the layer's parts."""
        modules = list(layer.modules())
        self.parents = [m._modules for m in modules if m._modules]
        self.children = [tuple(d.values()) for d in self.parents]
        self.hooks = [h for m in modules[1:] for h in (m._forward_hooks, m._forward_pre_hooks)]
        self.inside = [m.__dict__ for m in modules[1:]]
        self.forwards = [own.get("forward") for own in self.inside]
        self.native = None
        self.family = family = LAYERS[type(layer)]
        self.fault = fault_of(layer)
        if self.fault is None:
            part: Callable[[str], Any] = layer.get_submodule
            self.shape = family.shape(layer)
            self.linears: list[Any] = [part(name) for name in family.linears]
            self.norms: list[Any] = [part(family.attention_norm), part(family.mlp_norm)]
            self.activation = ACTIVATIONS[type(part(family.activation))]

    def read(self) -> None:
        """Take the weights as they are now."""
        family, shape = self.family, self.shape
        self.tensors = [
            (m._parameters, name, m._parameters[name])
            for m in (*self.linears, *self.norms)
            for name in ("weight", "bias")
            if name in m._parameters
        ]
        known = [tensor for _, _, tensor in self.tensors if tensor is not None]
        self.packed = [(tensor, tensor.kept) for tensor in known if type(tensor) is OnlyPacked]
        self.memory = [memory_of(tensor) for tensor in known]
        self.places = [tensor.data_ptr() for tensor in self.memory]
        weights = [m.weight for m in self.linears]
        self.weights = [w for w in weights if type(w) is not OnlyPacked]  # read where it is written
        self.versions = versions_of(self.weights)
        self.fingerprint = self.watch(self.weights)
        self.seen = self.fingerprint()
        parts = {
            name: Linear(self.weight_of(m), m.bias)
            for name, m in zip(family.linears, self.linears, strict=True)
        }
        heads = columns_of(parts[family.output]) // shape.size
        outputs = sum(rows_of(parts[name]) for name in family.qkv)
        gate, up = None if family.gate is None else parts[family.gate], parts[family.up]
        if gate is up:
            gate, up = halves_of(up)
        self.native = DecoderLayer(
            heads=heads,
            kv_heads=(outputs // shape.size - heads) // 2,
            size=shape.size,
            attention_norm=NORMS[type(self.norms[0])](self.norms[0]),
            mlp_norm=NORMS[type(self.norms[1])](self.norms[1]),
            qkv=tuple(parts[name] for name in family.qkv),
            output=parts[family.output],
            gate=gate,
            up=up,
            down=parts[family.down],
            activation=self.activation,
            scale=shape.scale,
            window=shape.window,
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


def columns_of(linear: Linear) -> int:
    weight = linear.weight
    return weight.shape[1] if isinstance(weight, Tensor) else weight.packs.shape[1]


def rows_of(linear: Linear) -> int:
    weight = linear.weight
    return weight.shape[0] if isinstance(weight, Tensor) else weight.rows


def halves_of(linear: Linear) -> tuple[Linear, Linear]:
    """Two layers of two that are one, [2 N, K]; N is a multiple of PACK."""
    weight, N = linear.weight, rows_of(linear) // 2
    if isinstance(weight, Tensor):
        parts: Any = weight.split(N)
    else:
        parts = [PackedWeight(packs, N) for packs in weight.packs.split(N // PACK)]
    biases = (None, None) if linear.bias is None else linear.bias.split(N)
    return Linear(parts[0], biases[0]), Linear(parts[1], biases[1])


def fault_of(layer: nn.Module) -> str | None:
    """Why a layer of a class in LAYERS is left to torch; None: it is not."""
    family, part = LAYERS[type(layer)], layer.get_submodule
    home = {type(layer).__module__, __package__ + ".target"}  # where a GPT-Neo's is replaced
    for name in family.own:
        child = part(name)
        if type(child).__module__ not in home or "forward" in vars(child):
            return f"its {name} is a {type(child).__name__} of its own"
    shape = family.shape(layer)
    if shape.fault is not None:
        return shape.fault
    if shape.size > MOST_COLUMNS:
        return f"its heads have {shape.size} columns, more than {MOST_COLUMNS}"
    for name in (family.attention_norm, family.mlp_norm):
        if type(part(name)) not in NORMS or not usable(part(name)._parameters.get("weight")):
            return f"its {name} is no fp32 norm that is known here"
    if type(part(family.activation)) not in ACTIVATIONS:
        return f"its activation is a {type(part(family.activation)).__name__}"
    for name in family.linears:
        own: Any = part(name)
        weight, bias = own._parameters.get("weight"), own._parameters.get("bias")
        if (
            type(own) not in (nn.Linear, Conv1D)
            or not (usable(weight) or held(own, weight))
            or not (bias is None or usable(bias))
        ):
            return f"its {name} is no fp32 linear layer"
    up: Any = part(family.up)
    if family.gate == family.up and up.weight.shape[0] % (2 * PACK) != 0:
        return f"its {family.up} has {up.weight.shape[0]} rows, no multiple of {2 * PACK}"
    return None


def has_global_hooks() -> bool:
    return bool(modules._global_forward_hooks or modules._global_forward_pre_hooks)


@cache
def parameters_of(kind: Any) -> tuple[str, ...]:
    """Names of what a layer's forward is given, without the layer itself."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]


def layer(module: Any, fast: FastLayer, *args: Any, **kwargs: Any) -> Any:
    """The forward of a swapped decoder layer. x [B, Q, d] -> [B, Q, d]"""
    if not torch.compiler.is_compiling():
        out = native(module, fast, args, kwargs)
        if out is not None:
            return fast.family.returns(out)
    return type(module).forward(module, *args, **kwargs)


def native(
    module: Any, fast: FastLayer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """The native call's result; None where torch has to make it."""
    given = {**dict(zip(parameters_of(module.__class__), args, strict=False)), **kwargs}
    x = given["hidden_states"]
    if not usable(x) or x.numel() == 0 or has_global_hooks() or module.training:
        return None
    if torch._C._len_torch_dispatch_stack() or torch._C._functorch.peek_interpreter_stack():
        return None  # something that counts or transforms operations looks on
    if given.get("encoder_hidden_states") is not None or given.get("output_attentions"):
        return None
    description = fast.ready(module)
    if description is None or fast.learns(x):
        return None
    rotation = given.get("position_embeddings")
    if rotation is not None and not all(usable(part) and part.is_contiguous() for part in rotation):
        return None
    x = x.contiguous()
    entries = next((given[name] for name in CACHES if name in given), None)
    if isinstance(entries, OpenCache):
        return over_open(description, x, rotation, entries, fast.shape.number)
    mask = given.get("attention_mask")
    whole = entries is None or type(entries) is DynamicCache  # all of it is seen without a mask
    if whole or (isinstance(entries, Cache) and mask is not None):
        window = description.window if fast.family.windows_in_mask else None
        return over_any(description, x, rotation, entries, fast.shape.number, mask, window)
    return None


def over_open(
    description: DecoderLayer, x: Tensor, rotation: Any, cache: OpenCache, index: int
) -> Tensor | None:
    """A layer over a cache of ours, which the native code writes to."""
    entries = cache.entries(index, x, description.kv_heads, description.size)
    if entries is None or entries.keys.dtype is not torch.float32:
        return None
    slots, keys, values, tables, lengths, limits = entries
    call = LayerCall(
        x, None, rotation, slots, keys, values, tables, lengths, None, limits, True, True
    )
    return decoder_layer(description, call)


def over_any(
    description: DecoderLayer,
    x: Tensor,
    rotation: Any,
    entries: Cache | None,
    index: int,
    mask: Tensor | None,
    window: int | None,
) -> Tensor | None:
    """A layer over a cache of transformers', or none: it is written to between two native calls."""
    B, Q, _ = x.shape
    heads, kv_heads, size = description.heads, description.kv_heads, description.size
    known = Q if entries is None else entries.get_mask_sizes(Q, index)[0]
    seen = rows_seen(mask, B, Q, known, window)
    if seen is None:
        return None
    lengths, first = seen
    query = x.new_empty(B, Q, heads, size)
    keys, values = x.new_empty(B, kv_heads, Q, size), x.new_empty(B, kv_heads, Q, size)
    slots = torch.arange(Q).expand(B, Q).contiguous()
    before = LayerCall(x, query, rotation, slots, keys, values, None, None, None, None, True, False)
    decoder_layer(description, before)
    if entries is not None:
        keys, values = entries.update(keys, values, index)
    after = before._replace(
        keys=keys, values=values, lengths=lengths, first=first, before=False, after=True
    )
    return decoder_layer(description, after)
