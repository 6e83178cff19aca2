"""Decoder layers of transformers' models as single native calls on a CPU, where they fit."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer
from transformers.models.gpt2.modeling_gpt2 import GPT2Block
from transformers.models.gpt_neo.modeling_gpt_neo import GPTNeoBlock
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer

from specdiff_kernels import PackedWeight
from specdiff_kernels.ops.decoder_layer import (
    MOST_COLUMNS,
    DecoderLayer,
    LayerCall,
    Linear,
    decoder_layer,
)
from specdiff_kernels.ops.skinny_linear import PACK

from .attention import rows_seen
from .cache import OpenCache
from .fast_module import FastModule, has_global_hooks
from .known import ACTIVATIONS, is_fp32_linear, is_fp32_norm, is_itself, read_norm
from .packed import usable

CACHES = ("cache", "past_key_values", "layer_past")  # what layers call it


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


class FastLayer(FastModule):
    """A decoder layer's native form."""

    def find(self, layer: Any) -> str | None:
        self.family = family = LAYERS[type(layer)]
        fault = fault_of(layer)
        if fault is None:
            part: Callable[[str], Any] = layer.get_submodule
            self.shape = family.shape(layer)
            self.linears = {name: part(name) for name in family.linears}
            self.norms = [part(family.attention_norm), part(family.mlp_norm)]
            self.activation = ACTIVATIONS[type(part(family.activation))]
        return fault

    def make(self, parts: dict[str, Linear]) -> DecoderLayer:
        family, shape = self.family, self.shape
        heads = parts[family.output].columns // shape.size
        outputs = sum(parts[name].rows for name in family.qkv)
        gate, up = None if family.gate is None else parts[family.gate], parts[family.up]
        if gate is up:
            gate, up = halves_of(up)
        attention_norm, mlp_norm = (read_norm(norm) for norm in self.norms)
        return DecoderLayer(
            heads=heads,
            kv_heads=(outputs // shape.size - heads) // 2,
            size=shape.size,
            attention_norm=attention_norm,
            mlp_norm=mlp_norm,
            qkv=tuple(parts[name] for name in family.qkv),
            output=parts[family.output],
            gate=gate,
            up=up,
            down=parts[family.down],
            activation=self.activation,
            scale=shape.scale,
            window=shape.window,
        )


def halves_of(linear: Linear) -> tuple[Linear, Linear]:
    """Two layers of two that are one, [2 N, K]; N is a multiple of PACK."""
    weight, N = linear.weight, linear.rows // 2
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
        if type(child).__module__ not in home or not is_itself(child):
            return f"its {name} is a {type(child).__name__} of its own"
    shape = family.shape(layer)
    if shape.fault is not None:
        return shape.fault
    if shape.size > MOST_COLUMNS:
        return f"its heads have {shape.size} columns, more than {MOST_COLUMNS}"
    for name in (family.attention_norm, family.mlp_norm):
        if not is_fp32_norm(part(name)):
            return f"its {name} is no fp32 norm that is known here"
    if type(part(family.activation)) not in ACTIVATIONS:
        return f"its activation is a {type(part(family.activation)).__name__}"
    for name in family.linears:
        if not is_fp32_linear(part(name)):
            return f"its {name} is no fp32 linear layer"
    for name in (family.attention_norm, family.mlp_norm, family.activation, *family.linears):
        if not is_itself(part(name)):
            return f"its {name} has a forward of its own"
    up: Any = part(family.up)
    if family.gate == family.up and up.weight.shape[0] % (2 * PACK) != 0:
        return f"its {family.up} has {up.weight.shape[0]} rows, no multiple of {2 * PACK}"
    return None


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
    slots, keys, values, tables, lengths, limits, parents = entries
    call = LayerCall(
        x, None, rotation, slots, keys, values, tables, lengths, None, limits, True, True, parents
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
