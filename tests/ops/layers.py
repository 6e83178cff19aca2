"""Decoder layers and their tokens, the formula, and what a token's bits may not depend on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from specdiff_kernels import pack_weight
from specdiff_kernels.ops.decoder_layer import DecoderLayer, LayerCall, Linear, Norm
from specdiff_kernels.reference.decoder_layer import ACTIVATE

from . import attention
from .attention import threads
from .products import NAN, rms

Run = Callable[[DecoderLayer, LayerCall], Tensor | None]
EPSILON = 1e-5
PAGES = (1, 5, 16)  # positions in a block


@dataclass(frozen=True)
class Shape:
    """Of a layer: `groups` queries' heads share one of the `kv_heads`."""

    hidden: int = 24
    inner: int = 40
    groups: int = 2
    kv_heads: int = 2
    size: int = 8
    norm: str = "rms"
    offset: float = 0.0
    biases: bool = False
    joined: bool = False
    gate: bool = True
    activation: str = "silu"
    rotary: int = 8
    window: int | None = None
    softcap: float | None = None
    dtype: torch.dtype = torch.float32

    @property
    def heads(self) -> int:
        return self.groups * self.kv_heads


class Tokens(NamedTuple):
    """x [B, Q, hidden], rotation [B, Q, rotary] twice, and a dense cache with `lengths` entries,
    the first of which is `first`; NaN in all other slots."""

    x: Tensor
    rotation: tuple[Tensor, Tensor] | None
    keys: Tensor
    values: Tensor
    lengths: Tensor
    first: Tensor | None

    @property
    def positions(self) -> Tensor:
        return self.lengths[:, None] + torch.arange(self.x.shape[1])

    def row(self, b: int) -> Tokens:
        return Tokens(*(one(part, b) for part in self))

    def some(self, lo: int, hi: int, keys: Tensor, values: Tensor) -> Tokens:
        """Tokens lo, ..., hi - 1 over a cache that holds those before them."""
        turned = self.rotation and tuple(part[:, lo:hi].contiguous() for part in self.rotation)
        x = self.x[:, lo:hi].contiguous()
        return Tokens(x, turned, keys, values, self.lengths + lo, self.first)


def one(part: Any, b: int) -> Any:
    if isinstance(part, tuple):
        return tuple(one(x, b) for x in part)
    return part if part is None else part[b : b + 1].contiguous()


class Result(NamedTuple):
    out: Tensor  # [B, Q, hidden]
    new_keys: Tensor  # [B, Q, kv_heads, size]
    new_values: Tensor
    keys: Tensor  # the cache after it, dense
    values: Tensor


# --- inputs --------------------------------------------------------------------------------------


def layer_of(shape: Shape, *, packed: bool, seed: int = 0) -> DecoderLayer:
    draw = torch.Generator().manual_seed(seed)

    def norm() -> Norm:
        weight = torch.randn(shape.hidden, generator=draw) * 0.3 + 1 - shape.offset
        bias = torch.randn(shape.hidden, generator=draw) if shape.biases else None
        return Norm(shape.norm, weight, bias, EPSILON, shape.offset)

    def linear(N: int, K: int) -> Linear:
        weight = (torch.randn(N, K, generator=draw) * K**-0.5).to(shape.dtype)
        bias = torch.randn(N, generator=draw) if shape.biases else None
        return Linear(pack_weight(weight) if packed else weight, bias)

    mixed, kept = shape.heads * shape.size, shape.kv_heads * shape.size
    rows = (mixed + 2 * kept,) if shape.joined else (mixed, kept, kept)
    return DecoderLayer(
        shape.heads,
        shape.kv_heads,
        shape.size,
        norm(),
        norm(),
        tuple(linear(N, shape.hidden) for N in rows),
        linear(shape.hidden, mixed),
        linear(shape.inner, shape.hidden) if shape.gate else None,
        linear(shape.inner, shape.hidden),
        linear(shape.hidden, shape.inner),
        shape.activation,
        shape.size**-0.5,
        shape.window,
        shape.softcap,
    )


def tokens_of(shape: Shape, Q: int, lengths: tuple[int, ...], *, first: bool = False) -> Tokens:
    """first: the first entry seen is in the middle of those before the tokens."""
    draw = torch.Generator().manual_seed(Q)
    B, S = len(lengths), max(lengths) + Q + 3
    caches = torch.randn(2, B, shape.kv_heads, S, shape.size, generator=draw)
    rotation = None
    if shape.rotary:
        angles = torch.randn(B, Q, shape.rotary // 2, generator=draw).repeat(1, 1, 2)
        rotation = angles.cos(), angles.sin()
    known = torch.tensor(lengths)
    start = known // 2 if first else None
    for b, length in enumerate(lengths):
        caches[:, b, :, length:] = NAN
        if first:
            caches[:, b, :, : length // 2] = NAN
    x = 2 * torch.randn(B, Q, shape.hidden, generator=draw)
    return Tokens(x, rotation, caches[0], caches[1], known, start)


# --- the formula ---------------------------------------------------------------------------------


def formula(layer: DecoderLayer, tokens: Tokens, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """Result, keys and values of the tokens, by matrix products. The layer's weights lie as they
    are."""

    def linear(x: Tensor, of: Linear) -> Tensor:
        return F.linear(x, of.weight.to(dtype), None if of.bias is None else of.bias.to(dtype))

    x = tokens.x.to(dtype)
    (B, Q, _), heads, kv_heads = x.shape, layer.heads, layer.kv_heads
    inputs = normed(x, layer.attention_norm)
    parts = torch.cat([linear(inputs, part) for part in layer.qkv], -1)
    query, key, value = parts.view(B, Q, -1, layer.size).split([heads, kv_heads, kv_heads], 2)
    query, key = (turned(part, tokens.rotation) for part in (query, key))
    rows = torch.arange(B)[:, None]
    caches = [cache.to(dtype).transpose(1, 2).clone() for cache in (tokens.keys, tokens.values)]
    for cache, new in zip(caches, (key, value), strict=True):
        cache[rows, tokens.positions] = new
    keys, values = (cache.transpose(1, 2) for cache in caches)
    arguments = {
        "query": query, "keys": keys, "values": values, "lengths": tokens.lengths,
        "first": tokens.first, "scale": layer.scale, "window": layer.window,
        "softcap": layer.softcap,
    }  # fmt: skip
    stream = x + linear(attention.formula(arguments, dtype).flatten(2), layer.output)
    inputs = normed(stream, layer.mlp_norm)
    activate = ACTIVATE[layer.activation]
    inner = linear(inputs, layer.up)
    if layer.gate is None:
        return stream + linear(activate(inner), layer.down), key, value
    inner = activate(linear(inputs, layer.gate)) * inner
    return stream + linear(inner, layer.down), key, value


def normed(x: Tensor, norm: Norm) -> Tensor:
    if norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + norm.epsilon).sqrt()
    x = x * (norm.weight.to(x.dtype) + norm.offset)
    return x if norm.bias is None else x + norm.bias.to(x.dtype)


def turned(x: Tensor, rotation: tuple[Tensor, Tensor] | None) -> Tensor:
    if rotation is None:
        return x
    cos, sin = (part[:, :, None].to(x.dtype) for part in rotation)
    R = cos.shape[-1]
    a, b = x[..., : R // 2], x[..., R // 2 : R]
    return torch.cat([x[..., :R] * cos + torch.cat([-b, a], -1) * sin, x[..., R:]], -1)


def assert_error_at_most_twice_that_of_torch(
    result: tuple[Tensor, ...], layer: DecoderLayer, tokens: Tokens
) -> None:
    """Root mean square over all numbers of the result, and of keys and of values, against fp64; an
    ulp of their size is allowed anyway."""
    exact, by_torch = (formula(layer, tokens, dtype) for dtype in (torch.float64, torch.float32))
    for have, near, want in zip(result[:3], by_torch, exact, strict=True):
        error, allowed = rms(have - want), 2 * rms(near - want) + 2.0**-23 * rms(want)
        assert error <= allowed, (error, allowed)


# --- calls ---------------------------------------------------------------------------------------


def run(
    implementation: Run,
    layer: DecoderLayer,
    tokens: Tokens,
    *,
    block: int | None = None,
    parts: bool = False,
    limits: Tensor | None = None,
) -> Result:
    """Over a copy of the cache, in which nothing but the tokens' slots may change.

    block: positions of a block; None: a dense cache. parts: in two calls. limits: see LayerCall.
    """
    (B, Q, _), S = tokens.x.shape, tokens.keys.shape[2]
    caches = {"keys": tokens.keys.clone(), "values": tokens.values.clone()}
    slots, tables = tokens.positions, None
    if block is not None:
        caches = attention.paged(caches, block)
        tables = caches["tables"]
        slots = tables.gather(1, slots // block).long() * block + slots % block
    before = [caches[name].clone() for name in ("keys", "values")]
    x = tokens.x.clone()
    call = LayerCall(
        x, None, tokens.rotation, slots, caches["keys"], caches["values"], tables, tokens.lengths,
        tokens.first, limits, True, True,
    )  # fmt: skip
    if parts:
        query = torch.full((B, Q, layer.heads, layer.size), NAN)
        nothing = implementation(layer, call._replace(query=query, lengths=None, after=False))
        assert nothing is None
        out = implementation(layer, call._replace(query=query, slots=None, before=False))
    else:
        out = implementation(layer, call)
    assert out is not None and torch.equal(x.view(torch.int32), tokens.x.view(torch.int32))
    new = []
    for name, cache in zip(("keys", "values"), before, strict=True):
        new.append(entries(caches[name], slots, tables))
        entries(cache, slots, tables, new[-1])
        assert torch.equal(caches[name].view(torch.int32), cache.view(torch.int32)), name
    keys, values = (cache[:, :, :S] for cache in attention.dense(caches))
    return Result(out, new[0], new[1], keys.contiguous(), values.contiguous())


def entries(
    cache: Tensor, slots: Tensor, tables: Tensor | None, write: Tensor | None = None
) -> Tensor:
    """What lies in the slots, [B, Q, kv_heads, size]; `write` is put there before."""
    rows = torch.arange(len(slots))[:, None] if tables is None else slots // cache.shape[1]
    places = slots if tables is None else slots % cache.shape[1]
    by_position = cache.transpose(1, 2) if tables is None else cache
    if write is not None:
        by_position[rows, places] = write
    return by_position[rows, places]


def in_steps(implementation: Run, layer: DecoderLayer, tokens: Tokens, step: int) -> list[Tensor]:
    """Result, keys and values of calls of `step` tokens, one after another."""
    keys, values, made = tokens.keys, tokens.values, []
    for lo in range(0, tokens.x.shape[1], step):
        part = run(implementation, layer, tokens.some(lo, lo + step, keys, values))
        keys, values = part.keys, part.values
        made.append(part[:3])
    return [torch.cat(parts, 1) for parts in zip(*made, strict=True)]


# --- what a result may not depend on -------------------------------------------------------------


def dependences(
    implementation: Run,
    shape: Shape,
    tokens: Tokens,
    names: tuple[str, ...] = ("nothing", "rows", "queries", "pages", "parts", "packs", "unseen"),
) -> set[str]:
    """What an implementation's bits depend on that they may not depend on, of `names`."""
    return {
        name
        for name in names
        for have, want in PAIRS[name](implementation, shape, tokens)
        if not all(torch.equal(a, b) for a, b in zip(have[:3], want[:3], strict=True))
    }


Pairs = Iterator[tuple[Any, Any]]  # what there is and what there has to be


def same(implementation: Run, shape: Shape, tokens: Tokens) -> Pairs:
    layer = layer_of(shape, packed=True)
    yield run(implementation, layer, tokens), run(implementation, layer, tokens)


def rows(implementation: Run, shape: Shape, tokens: Tokens) -> Pairs:
    layer = layer_of(shape, packed=True)
    alone = [run(implementation, layer, tokens.row(b))[:3] for b in range(len(tokens.x))]
    parts = [torch.cat(parts) for parts in zip(*alone, strict=True)]
    yield parts, run(implementation, layer, tokens)


def queries(implementation: Run, shape: Shape, tokens: Tokens) -> Pairs:
    layer, Q = layer_of(shape, packed=True), tokens.x.shape[1]
    whole = run(implementation, layer, tokens)
    for step in sorted({1, Q // 2 + 1}):
        yield in_steps(implementation, layer, tokens, step), whole


def pages(implementation: Run, shape: Shape, tokens: Tokens) -> Pairs:
    layer = layer_of(shape, packed=True)
    whole = run(implementation, layer, tokens)
    for block in PAGES:
        yield run(implementation, layer, tokens, block=block), whole


def parts(implementation: Run, shape: Shape, tokens: Tokens) -> Pairs:
    layer = layer_of(shape, packed=True)
    whole = run(implementation, layer, tokens)
    yield run(implementation, layer, tokens, parts=True), whole
    yield run(implementation, layer, tokens, parts=True, block=5), whole


def packs(implementation: Run, shape: Shape, tokens: Tokens) -> Pairs:
    packed, lying = (layer_of(shape, packed=packed) for packed in (True, False))
    yield run(implementation, lying, tokens), run(implementation, packed, tokens)


def unseen(implementation: Run, shape: Shape, tokens: Tokens) -> Pairs:
    """Tokens after the one in the middle, and other rows, are something else."""
    layer, half = layer_of(shape, packed=True), (tokens.x.shape[1] + 1) // 2
    whole = run(implementation, layer, tokens)
    for filling in (NAN, torch.inf, 7.0):
        x = tokens.x.clone()
        x[0, half:], x[1:] = filling, filling
        other = run(implementation, layer, tokens._replace(x=x))
        yield [part[0, :half] for part in other[:3]], [part[0, :half] for part in whole[:3]]


def over_threads(implementation: Run, shape: Shape, tokens: Tokens) -> Pairs:
    layer = layer_of(shape, packed=True)
    with threads(1):
        one = run(implementation, layer, tokens)
    for count in (2, 3):
        with threads(count):
            yield run(implementation, layer, tokens), one


PAIRS: dict[str, Callable[[Run, Shape, Tokens], Pairs]] = {
    "nothing": same,
    "rows": rows,
    "queries": queries,
    "pages": pages,
    "parts": parts,
    "packs": packs,
    "unseen": unseen,
    "threads": over_threads,
}
