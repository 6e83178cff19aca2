"""A decoder layer in one call."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import specdiff_kernels._C as _C

from ..arguments import address
from ..fields import DTYPES
from ..ops.decoder_layer import ACTIVATIONS, NORMS, DecoderLayer, GatedMlp, LayerCall, Linear, Norm

NO_WEIGHT = [0, 0, 0, 0, 0, 0]


def decoder_layer(layer: DecoderLayer, call: LayerCall, *, out: Tensor | None) -> None:
    if layer.native is None:
        layer.native = native(layer)
    (x, query, rotation, slots, keys, values, tables, lengths, first, limits, before, after,
     parents) = call  # fmt: skip
    cos, sin, rotary, turns = (0, 0, 0, 0) if rotation is None else addresses(*rotation)
    B, Q, _ = x.shape
    if tables is None:
        key_row, key_head, key_position, _ = keys.stride()
        value_row, value_head, value_position, _ = values.stride()
        pages = (keys.shape[2], 0, 0, 0, 0)
    else:
        key_row, key_position, key_head, _ = keys.stride()
        value_row, value_position, value_head, _ = values.stride()
        blocks, size = keys.shape[:2]
        slots_a_row = tables.shape[1] * size
        pages = (slots_a_row, tables.data_ptr(), tables.stride(0), size, blocks)
    _C.decoder_layer(
        layer.native,
        [
            before, after, x.data_ptr(), B, Q, cos, sin, rotary, turns, address(query),
            address(slots), keys.data_ptr(), values.data_ptr(), 0,
            key_row, key_head, key_position, value_row, value_head, value_position, *pages,
            address(lengths), address(first), address(parents), address(limits), address(out),
        ],
        torch.get_num_threads(),
    )  # fmt: skip


def addresses(cos: Tensor, sin: Tensor) -> tuple[int, int, int, int]:
    """Where they lie, columns, and the stride between rows of the batch."""
    return cos.data_ptr(), sin.data_ptr(), cos.shape[2], cos.stride(0) if len(cos) > 1 else 0


def native(layer: DecoderLayer) -> Any:
    """Its addresses and sizes, read once. The tensors stay with the layer."""
    of_qkv = [weight(linear, layer.hidden) for linear in layer.qkv]
    of_qkv += [NO_WEIGHT] * (3 - len(of_qkv))
    mixed = layer.heads * layer.size
    inner = layer.inner
    gate = NO_WEIGHT if layer.gate is None else weight(layer.gate, layer.hidden)
    return _C.DecoderLayer(
        [
            layer.hidden, layer.heads, layer.kv_heads, layer.size, inner,
            *norm_numbers(layer.attention_norm), *norm_numbers(layer.mlp_norm),
            *of_qkv[0], *of_qkv[1], *of_qkv[2], *weight(layer.output, mixed),
            *gate, *weight(layer.up, layer.hidden), *weight(layer.down, inner),
            ACTIVATIONS.index(layer.activation), layer.window or 0,
        ],
        [
            layer.attention_norm.epsilon, layer.attention_norm.offset,
            layer.mlp_norm.epsilon, layer.mlp_norm.offset, layer.scale, layer.softcap or 0.0,
        ],
    )  # fmt: skip


def weight(linear: Linear, columns: int) -> list[int]:
    of, bias = linear.weight, address(linear.bias)
    if isinstance(of, Tensor):
        return [of.data_ptr(), DTYPES[of.dtype], False, of.shape[0], of.stride(0), bias]
    return [of.packs.data_ptr(), DTYPES[of.packs.dtype], True, of.rows, columns, bias]


def norm_numbers(norm: Norm) -> list[int]:
    return [norm.weight.data_ptr(), address(norm.bias), NORMS.index(norm.kind)]


def row_norm(x: Tensor, norm: Norm, *, out: Tensor) -> None:
    d = x.shape[-1]
    _C.row_norm(
        x.data_ptr(), x.numel() // max(d, 1), d, norm_numbers(norm), norm.epsilon, norm.offset,
        out.data_ptr(), torch.get_num_threads(),
    )  # fmt: skip


def gated_mlp(x: Tensor, mlp: GatedMlp, *, out: Tensor) -> None:
    K = x.shape[-1]
    if mlp.native is None:
        mlp.native = [
            *weight(mlp.gate, K), *weight(mlp.up, K), *weight(mlp.down, mlp.up.rows),
            ACTIVATIONS.index(mlp.activation),
        ]  # fmt: skip
    _C.gated_mlp(
        x.data_ptr(), x.numel() // max(K, 1), K, mlp.native, out.data_ptr(), torch.get_num_threads()
    )
