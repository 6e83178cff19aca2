"""`decoder_layer`: a layer of a language model on a CPU, in one native call.

A layer adds two things to each token's values: attention over a norm of them, and an MLP over a
norm of the sum. This is no part of the sampling distribution, and nothing here is registered with
PyTorch: it writes keys and values into caches, whose owner calls it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..backends import implementation
from ..types import PackedWeight

ACTIVATIONS = ("none", "silu", "gelu_tanh", "gelu", "relu")  # as csrc/ numbers them
NORMS = ("rms", "layer")
MOST_COLUMNS = 256  # of a head


class Norm(NamedTuple):
    """x / rms(x), or (x - mean) / deviation, times weight + offset, plus bias. f32 [d]"""

    kind: str  # of NORMS
    weight: Tensor
    bias: Tensor | None
    epsilon: float
    offset: float = 0.0


class Linear(NamedTuple):
    """x weight^T + bias, bias f32 [N] or None."""

    weight: PackedWeight | Tensor  # f32 or bf16; a tensor [N, K], rows contiguous, where it lies
    bias: Tensor | None

    @property
    def rows(self) -> int:
        weight = self.weight
        return weight.shape[0] if isinstance(weight, Tensor) else weight.rows

    @property
    def columns(self) -> int:
        weight = self.weight
        return weight.shape[1] if isinstance(weight, Tensor) else weight.packs.shape[1]


@dataclass
class DecoderLayer:
    """What a layer is, apart from its tokens.

    Args:
        heads, kv_heads: of queries, and of keys and values: heads is a multiple of kv_heads.
        size: columns of a head, at most 256.
        attention_norm, mlp_norm: before attention, and before the MLP.
        qkv: queries, keys and values, or all of them in one, in this order.
        output: behind attention.
        gate, up, down: the MLP is down(activation(gate(x)) up(x)), without a gate
            down(activation(up(x))).
        activation: one of ACTIVATIONS.
        scale: of queries.
        window: a token sees so many positions, itself among them; None: all.
        softcap: scores s become softcap tanh(s / softcap); None: they stay.
    """

    heads: int
    kv_heads: int
    size: int
    attention_norm: Norm
    mlp_norm: Norm
    qkv: tuple[Linear, ...]
    output: Linear
    gate: Linear | None
    up: Linear
    down: Linear
    activation: str
    scale: float
    window: int | None = None
    softcap: float | None = None
    native: Any = field(default=None, repr=False)  # a backend's own form of it

    @property
    def hidden(self) -> int:
        return self.attention_norm.weight.shape[0]

    @property
    def inner(self) -> int:
        """Columns between up and down."""
        return self.up.rows


@dataclass
class GatedMlp:
    """down(activation(gate(x)) up(x)).

    Args:
        gate, up, down: gate and up have weights of the same shape, both packed or both not.
        activation: one of ACTIVATIONS.
    """

    gate: Linear
    up: Linear
    down: Linear
    activation: str
    native: Any = field(default=None, repr=False)  # a backend's own form of it


class LayerCall(NamedTuple):
    """Tokens [B, Q] and where a layer finds and leaves what belongs to them.

    `before` attention the layer makes queries, keys and values and puts keys and values into their
    slots; `after` that it does the rest. Both at once where its caller owns the cache.
    """

    x: Tensor  # f32 [B, Q, d]
    query: Tensor | None  # f32 [B, Q, heads, size], kept between the two parts if they are two
    rotation: tuple[Tensor, Tensor] | None  # cos and sin, f32 [B or 1, Q, R]; R columns turn
    slots: Tensor | None  # i64 [B, Q], where keys and values go; for a pool, counted through it
    keys: Tensor  # f32 [B, kv_heads, S, size], or a pool [blocks, block_size, kv_heads, size]
    values: Tensor  # as keys
    tables: Tensor | None  # i32 [B, M], blocks of a pool that rows hold
    lengths: Tensor | None  # i64 [B], entries before the tokens
    first: Tensor | None  # i64 [B], first entry seen; None: 0
    limits: Tensor | None  # i64 [B, Q], end of what a token sees; None: its own entry is the last
    before: bool
    after: bool
    parents: Tensor | None = None  # i64 [B, Q], as of `cached_attention`; not beside limits


def decoder_layer(layer: DecoderLayer, call: LayerCall) -> Tensor | None:
    """Run a layer, or one of its two parts, for a caller who has checked all arguments.

    A token's result, keys and values do not depend on the other tokens of the call, nor on their
    number, the threads, or where entries of the cache lie, bit for bit, but on its own values and
    on the entries that it sees. Backends agree within rounding only.

    Returns:
        f32 [B, Q, d], new; None before attention.

    Source: the pre-norm transformer of Llama (2302.13971) and GPT-2.
    """
    out = torch.empty_like(call.x) if call.after else None
    implementation("decoder_layer", call.x.device, None)(layer, call, out=out)
    return out


def row_norm(x: Tensor, norm: Norm) -> Tensor:
    """A norm of each row of contiguous f32 x [..., d], which depends on that row alone, bit for
    bit; for a caller who has checked all arguments."""
    out = torch.empty_like(x)
    implementation("row_norm", x.device, None)(x, norm, out=out)
    return out


def gated_mlp(x: Tensor, mlp: GatedMlp) -> Tensor:
    """A gated MLP of each row of contiguous f32 x [..., K], as f32 [..., N], which depends on that
    row alone, bit for bit; for a caller who has checked all arguments.

    Source: Shazeer's GLU variants (2002.05202).
    """
    out = torch.empty((*x.shape[:-1], mlp.down.rows), dtype=torch.float32, device=x.device)
    implementation("gated_mlp", x.device, None)(x, mlp, out=out)
    return out
