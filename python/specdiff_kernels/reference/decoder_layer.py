"""A decoder layer, token by token where torch's bits may follow how many there are."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from ..inputs import CachedAttentionInputs, SkinnyLinearInputs
from ..ops.decoder_layer import DecoderLayer, GatedMlp, LayerCall, Linear, Norm
from .cached_attention import cached_attention
from .skinny_linear import skinny_linear

ACTIVATE = {
    "none": lambda x: x,
    "silu": F.silu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}


def decoder_layer(layer: DecoderLayer, call: LayerCall, *, out: Tensor | None) -> None:
    """x += attention(norm(x)); x += mlp(norm(x)).

    The MLP is down(activation(gate(y)) up(y)), without a gate down(activation(up(y))).
    """
    x, query = call.x, call.query
    B, Q, _ = x.shape
    if query is None:
        query = x.new_empty(B, Q, layer.heads, layer.size)
    if call.before:
        inputs = by_token(lambda row: normed(row, layer.attention_norm), x)
        parts = torch.cat([linear(inputs, part) for part in layer.qkv], -1)
        heads = parts.view(B, Q, -1, layer.size).split(
            [layer.heads, layer.kv_heads, layer.kv_heads], 2
        )
        query.copy_(layer.scale * rotated(heads[0], call.rotation))
        put(call.keys, rotated(heads[1], call.rotation), call)
        put(call.values, heads[2], call)
    if not call.after or out is None or call.lengths is None:
        return
    mixed = torch.empty_like(query)
    attention = CachedAttentionInputs(
        query, call.keys, call.values, call.lengths, call.tables, call.first, call.parents, None,
        1.0, layer.window or 0, layer.softcap or 0.0,
    )  # fmt: skip
    if call.limits is None:
        cached_attention(attention, out=mixed)
    else:  # as if the last entry that a token sees were its own
        for q, limits in enumerate(call.limits.unbind(1)):
            one = attention._replace(query=query[:, q : q + 1], lengths=limits - 1)
            cached_attention(one, out=mixed[:, q : q + 1])
    stream = linear(mixed.flatten(2), layer.output) + x
    inputs = by_token(lambda row: normed(row, layer.mlp_norm), stream)
    out.copy_(through_mlp(inputs, layer) + stream)


def through_mlp(x: Tensor, mlp: DecoderLayer | GatedMlp) -> Tensor:
    activate = ACTIVATE[mlp.activation]
    inner = linear(x, mlp.up)
    if mlp.gate is None:
        inner = by_token(activate, inner)
    else:
        inner = by_token(activate, linear(x, mlp.gate)) * inner
    return linear(inner, mlp.down)


def gated_mlp(x: Tensor, mlp: GatedMlp, *, out: Tensor) -> None:
    out.copy_(through_mlp(x, mlp))


def by_token(of: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """A function of each token's values [d] by themselves. [B, Q, d]"""
    out = torch.empty_like(x)
    for row, result in zip(x.view(-1, x.shape[-1]), out.view(-1, x.shape[-1]), strict=True):
        result.copy_(of(row.clone()))
    return out


def linear(x: Tensor, of: Linear) -> Tensor:
    """[B, Q, K] -> [B, Q, N]"""
    weight, N = (of.weight, len(of.weight)) if isinstance(of.weight, Tensor) else of.weight
    out = x.new_empty(*x.shape[:-1], N)
    inputs = SkinnyLinearInputs(x.reshape(-1, x.shape[-1]), weight, N, of.bias)
    skinny_linear(inputs, out=out.view(-1, N))
    return out


def rotated(x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
    """The first columns of each head turned, halves against each other. [B, Q, heads, size]"""
    if rotation is None:
        return x
    cos, sin = (part[:, :, None] for part in rotation)
    turning, rest = x.tensor_split([cos.shape[-1]], -1)
    low, high = turning.chunk(2, -1)
    return torch.cat((turning * cos + torch.cat((-high, low), -1) * sin, rest), -1)


def put(store: Tensor, new: Tensor, call: LayerCall) -> None:
    """New entries [B, Q, heads, size] into their slots."""
    slots = call.slots
    if slots is None:
        raise ValueError("slots is None, but the call writes keys and values")
    if call.tables is not None:
        store[slots // store.shape[1], slots % store.shape[1]] = new
    else:
        rows = torch.arange(len(slots), device=slots.device)[:, None]
        store.transpose(1, 2)[rows, slots] = new


def row_norm(x: Tensor, norm: Norm, *, out: Tensor) -> None:
    out.copy_(by_token(lambda row: normed(row, norm), x))


def normed(x: Tensor, norm: Norm) -> Tensor:
    weight = norm.weight + norm.offset
    if norm.kind == "layer":
        return F.layer_norm(x, x.shape[-1:], weight, norm.bias, norm.epsilon)
    scaled = F.rms_norm(x, x.shape[-1:], weight, norm.epsilon)
    return scaled if norm.bias is None else scaled + norm.bias
