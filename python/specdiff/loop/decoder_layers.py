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

from .cache import RowCache, RowLayer
from .only_packed import OnlyPacked, held, place_of
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


class Names(NamedTuple):
    """Where a layer keeps its parts."""

    attention_norm: str
    attention: str
    qkv: tuple[str, ...]
    output: str
    mlp_norm: str
    gate: str | None
    up: str
    activation: str
    down: str
    returns: Callable[[Tensor], Any] = lambda x: x
    windows_in_mask: bool = True  # whether the mask that it is given knows its window

    @property
    def linears(self) -> tuple[str, ...]:
        names = (*self.qkv, self.output, self.gate, self.up, self.down)
        return tuple(name for name in names if name is not None)


LLAMA = Names(
    "input_layernorm", "self_attn", ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "self_attn.o_proj", "post_attention_layernorm", "mlp.gate_proj", "mlp.up_proj", "mlp.act_fn",
    "mlp.down_proj",
)  # fmt: skip
GPT2 = Names(
    "ln_1", "attn", ("attn.c_attn",), "attn.c_proj", "ln_2", None, "mlp.c_fc", "mlp.act",
    "mlp.c_proj",
)  # fmt: skip
GPT_NEO = GPT2._replace(
    attention="attn.attention",
    qkv=("attn.attention.q_proj", "attn.attention.k_proj", "attn.attention.v_proj"),
    output="attn.attention.out_proj",
    returns=lambda x: (x, None),
    windows_in_mask=False,
)
LAYERS = {
    LlamaDecoderLayer: LLAMA,
    MistralDecoderLayer: LLAMA,
    Qwen2DecoderLayer: LLAMA,
    GemmaDecoderLayer: LLAMA,
    GPT2Block: GPT2,
    GPTNeoBlock: GPT_NEO,
}


class Shape(NamedTuple):
    """What a layer is beside its weights."""

    size: int
    scale: float
    window: int | None
    index: int  # in a cache


def shape_of(layer: nn.Module, attention: Any) -> Shape:
    size = attention.head_dim
    if isinstance(layer, GPTNeoBlock):
        window = attention.config.window_size if attention.attention_type == "local" else None
        return Shape(size, 1.0, window, attention.layer_id)
    window = None
    if isinstance(layer, MistralDecoderLayer):
        window = attention.config.sliding_window
    elif isinstance(layer, Qwen2DecoderLayer):
        window = attention.sliding_window
    return Shape(size, attention.scaling, window, attention.layer_idx)


class FastLayer:
    """A layer's native form, made anew when its parts or weights have changed.

    Args:
        weight_of: gives the weight of a linear layer as its products take it.
    """

    def __init__(self, weight_of: Callable[[Any], PackedWeight | Tensor]) -> None:
        self.weight_of = weight_of
        self.watch = find("watch", "cpu", None)
        self.parents: list[tuple[dict[str, Any], tuple[Any, ...]]] | None = None
        self.native: DecoderLayer | None = None

    def __reduce__(self) -> tuple[type[FastLayer], tuple[Any]]:
        return FastLayer, (self.weight_of,)  # a copied or saved layer makes its own

    def ready(self, layer: nn.Module) -> DecoderLayer | None:
        """The native form; None where the layer has to go torch's way."""
        if self.parents is None or any(children(own) != part for own, part in self.parents):
            self.look(layer)
        if self.fault is not None:
            return None
        for own, forward in self.inside:
            if own["_forward_hooks"] or own["_forward_pre_hooks"]:
                return None
            if own.get("forward") is not forward:
                return None
        if self.native is None or self.changed():
            self.read()
        return self.native

    def look(self, layer: nn.Module) -> None:
        """Find the layer's parts."""
        modules = list(layer.modules())
        self.parents = [(m.__dict__, children(m.__dict__)) for m in modules if m._modules]
        self.inside = [(m.__dict__, m.__dict__.get("forward")) for m in modules[1:]]
        self.native = None
        self.names = names = LAYERS[type(layer)]
        self.fault = fault_of(layer)
        if self.fault is None:
            part = layer.get_submodule
            self.shape = shape_of(layer, part(names.attention))
            self.linears = [part(name) for name in names.linears]
            self.norms = [part(names.attention_norm), part(names.mlp_norm)]
            self.activation = ACTIVATIONS[type(part(names.activation))]

    def read(self) -> None:
        """Take the weights as they are now."""
        names, (size, scale, window, _) = self.names, self.shape
        self.tensors = [
            (m._parameters, name, m._parameters[name], place_of(m._parameters[name]))
            for m in (*self.linears, *self.norms)
            for name in ("weight", "bias")
            if name in m._parameters
        ]
        weights = [m.weight for m in self.linears]
        self.weights = [w for w in weights if type(w) is not OnlyPacked]  # read where it is written
        self.versions = [version_of(weight) for weight in self.weights]
        self.fingerprint = self.watch(self.weights)
        self.seen = self.fingerprint()
        parts = {
            name: Linear(self.weight_of(m), m.bias)
            for name, m in zip(names.linears, self.linears, strict=True)
        }
        heads = columns_of(parts[names.output]) // size
        outputs = sum(rows_of(parts[name]) for name in names.qkv)
        self.native = DecoderLayer(
            heads,
            (outputs // size - heads) // 2,
            size,
            *(NORMS[type(norm)](norm) for norm in self.norms),
            tuple(parts[name] for name in names.qkv),
            parts[names.output],
            None if names.gate is None else parts[names.gate],
            parts[names.up],
            parts[names.down],
            self.activation,
            scale,
            window,
        )

    def changed(self) -> bool:
        """Whether a tensor is another one, or a weight was written to."""
        for own, name, tensor, where in self.tensors:
            if own.get(name) is not tensor or place_of(tensor) != where:
                return True
        if self.fingerprint() != self.seen:
            return True
        return self.versions != [version_of(weight) for weight in self.weights]

    def learns(self, x: Tensor) -> bool:
        return torch.is_grad_enabled() and (
            x.requires_grad
            or any(t is not None and t.requires_grad for _, _, t, _ in self.tensors)
        )


def children(attributes: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(attributes["_modules"].values())


def columns_of(linear: Linear) -> int:
    weight = linear.weight
    return weight.shape[1] if isinstance(weight, Tensor) else weight.packs.shape[1]


def rows_of(linear: Linear) -> int:
    weight = linear.weight
    return weight.shape[0] if isinstance(weight, Tensor) else weight.rows


def fault_of(layer: nn.Module) -> str | None:
    """Why a layer of a class in LAYERS is left to torch; None: it is not."""
    names, kind, part = LAYERS[type(layer)], type(layer).__name__, layer.get_submodule
    attention: Any = part(names.attention)
    home = {type(layer).__module__, __package__ + ".target"}  # where a GPT-Neo's is replaced
    for child in (attention, part("mlp")):
        if type(child).__module__ not in home or "forward" in vars(child):
            return f"its {type(child).__name__} is none of transformers'"
    if getattr(layer, "crossattention", None) is not None:
        return "it has cross-attention"
    if not attention.is_causal:
        return "its attention is not causal"
    if attention.head_dim > MOST_COLUMNS:
        return f"its heads have {attention.head_dim} columns, more than {MOST_COLUMNS}"
    for name in (names.attention_norm, names.mlp_norm):
        if type(part(name)) not in NORMS or not usable(part(name)._parameters.get("weight")):
            return f"its {name} is no fp32 norm that is known here"
    if type(part(names.activation)) not in ACTIVATIONS:
        return f"its activation is a {type(part(names.activation)).__name__}"
    for name in names.linears:
        own: Any = part(name)
        weight, bias = own._parameters.get("weight"), own._parameters.get("bias")
        if (
            type(own) not in (nn.Linear, Conv1D)
            or not (usable(weight) or held(own, weight))
            or not (bias is None or usable(bias))
        ):
            return f"its {name} is no fp32 linear layer"
    return None


def has_global_hooks() -> bool:
    return bool(modules._global_forward_hooks or modules._global_forward_pre_hooks)


@cache
def parameters(kind: type) -> tuple[str, ...]:
    """Names of what a layer's forward is given, without the layer itself."""
    return tuple(inspect.signature(kind.forward).parameters)[1:]  # type: ignore[attr-defined]


def layer(module: Any, fast: FastLayer, *args: Any, **kwargs: Any) -> Any:
    """The forward of a swapped decoder layer. x [B, Q, d] -> [B, Q, d]"""
    if not torch.compiler.is_compiling():
        out = native(module, fast, args, kwargs)
        if out is not None:
            return fast.names.returns(out)
    return type(module).forward(module, *args, **kwargs)


def native(
    module: Any, fast: FastLayer, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Tensor | None:
    """The native call's result; None where torch has to make it."""
    given = {**dict(zip(parameters(type(module)), args, strict=False)), **kwargs}
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
    if isinstance(entries, RowCache):
        return over_rows(description, x, rotation, entries.layers[fast.shape.index])
    if entries is None or type(entries) is DynamicCache:
        mask = given.get("attention_mask")
        window = description.window if fast.names.windows_in_mask else None
        return over_any(description, x, rotation, entries, fast.shape.index, mask, window)
    return None


def over_rows(
    description: DecoderLayer, x: Tensor, rotation: Any, entries: RowLayer
) -> Tensor | None:
    """A layer over a cache of ours, which the native code writes to."""
    B, Q, _ = x.shape
    window = entries.window
    if window.positions.shape != (B, Q):
        return None
    whole = entries.whole
    if not whole.is_initialized:
        shape = (B, description.kv_heads, Q, description.size)
        whole.lazy_initialization(x.new_empty(shape), x.new_empty(shape))
    keys, values, tables = whole.keys, whole.values, window.tables
    if keys.dtype is not torch.float32:
        return None
    if tables is None:
        keys, values = keys[entries.rows], values[entries.rows]
    call = LayerCall(
        x, None, rotation, window.slots, keys, values, tables, window.lengths, None, True, True
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
    before = LayerCall(
        x, query, rotation, slots, keys, values, None, None, None, True, False
    )  # fmt: skip
    decoder_layer(description, before)
    if entries is not None:
        keys, values = entries.update(keys, values, index)
    after = before._replace(
        keys=keys, values=values, lengths=lengths, first=first, before=False, after=True
    )
    return decoder_layer(description, after)


def rows_seen(
    mask: Tensor | None, B: int, Q: int, known: int, window: int | None
) -> tuple[Tensor, Tensor | None] | None:
    """Entries before the queries and the first entry seen of each row, i64 [B], from a mask of
    transformers'; None if it is another than that of causal attention with padding on the left.

    Args:
        mask: bool or float [B or 1, 1, Q, known], None for causal attention over all entries.
        known: entries of a row with those of the queries.
    """
    if mask is None:
        return torch.full((B,), known - Q), None
    results: dict[int | None, Any] = vars(mask).setdefault("specdiff_rows", {})
    if window not in results:  # a mask serves all layers of a forward
        results[window] = read_mask(mask, B, Q, known, window)
    return results[window]


def read_mask(
    mask: Tensor, B: int, Q: int, known: int, window: int | None
) -> tuple[Tensor, Tensor] | None:
    if mask.ndim != 4 or mask.shape[1:] != (1, Q, known):
        return None
    seen = mask[:, 0] if mask.dtype is torch.bool else mask[:, 0] >= 0  # hidden: far below 0
    first = seen.any(1).int().argmax(1)
    keys, queries = torch.arange(known), torch.arange(known - Q, known)[:, None]
    expected = (keys >= first[:, None, None]) & (keys <= queries)
    if window is not None:
        expected &= keys > queries - window
    if not torch.equal(seen, expected):
        return None
    return torch.full((B,), known - Q), first.expand(B).contiguous()
