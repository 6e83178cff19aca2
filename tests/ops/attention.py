"""Inputs of attention over a cache, its formula, and what a query's result may not depend on."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .products import NAN, rms

Arguments = dict[str, Any]  # of cached_attention
Attend = Callable[..., Tensor]
PAGES = (1, 5, 16)  # positions in a block
PADDINGS = (1, 13, 64, 256)


def inputs(
    B: int,
    Q: int,
    G: int,
    H: int,
    D: int,
    lengths: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    tree: bool = False,
    sinks: bool = False,
    **options: Any,
) -> Arguments:
    """A dense cache with NaN in all slots that no query has to see."""
    draw = torch.Generator().manual_seed(hash((B, Q, G, H, D, *lengths)) % 2**31)
    S = max(lengths) + Q + 3
    made: Arguments = {"query": 2 * torch.randn(B, Q, G * H, D, generator=draw)}
    for name in ("keys", "values"):
        cache = torch.randn(B, H, S, D, generator=draw).to(dtype)
        for b, length in enumerate(lengths):
            cache[b, :, length + Q :] = NAN
        made[name] = cache
    made["lengths"] = torch.tensor(lengths)
    if tree:
        made["parents"] = torch.tensor([a_tree(Q, seed) for seed in range(B)])
    if sinks:
        made["sinks"] = torch.randn(G * H, generator=draw)
    return made | options


def a_tree(Q: int, seed: int) -> list[int]:
    """A random forest whose paths do not lie side by side."""
    draw = random.Random(seed)
    return [draw.randint(-1, i - 1) for i in range(Q)]


# --- the formula ---------------------------------------------------------------------------------


def slots(a: Arguments) -> int:
    """Of a row."""
    keys, tables = a["keys"], a.get("tables")
    return keys.shape[2] if tables is None else tables.shape[1] * keys.shape[1]


def visible(a: Arguments) -> Tensor:
    """Which slots each query sees: bool [B, Q, slots]."""
    B, Q = a["query"].shape[:2]
    first, window, parents, tables = map(a.get, ("first", "window", "parents", "tables"))
    lengths = a["lengths"].clamp(min=0)
    first = torch.zeros(B) if first is None else first
    related = torch.eye(Q, dtype=torch.bool).repeat(B, 1, 1)  # query i, its ancestor k
    for b in range(B):
        for i in range(Q):
            parent = i - 1 if parents is None else int(parents[b, i])
            if 0 <= parent < i:
                related[b, i] |= related[b, parent]
    own = lengths[:, None] + related.sum(-1) - 1  # positions [B, Q]
    slot = torch.arange(slots(a))
    position = slot.repeat(B, 1)
    mask = (slot < lengths[:, None])[:, None].repeat(1, Q, 1)
    for b in range(B):
        there = min(Q, max(0, slots(a) - int(lengths[b])))
        where = slice(int(lengths[b]), int(lengths[b]) + there)
        position[b, where], mask[b, :, where] = own[b, :there], related[b, :, :there]
    mask &= (position >= first[:, None])[:, None]
    if window is not None:
        mask &= position[:, None] > own[..., None] - window
    if tables is not None:
        exists = (tables >= 0) & (tables < len(a["keys"]))
        mask &= exists.repeat_interleave(a["keys"].shape[1], 1)[:, None]
    return mask


def dense(a: Arguments) -> tuple[Tensor, Tensor]:
    """Keys and values [B, H, slots, D]."""
    tables = a.get("tables")
    if tables is None:
        return a["keys"], a["values"]
    pools = (a[name][tables.long().clamp(0, len(a[name]) - 1)] for name in ("keys", "values"))
    keys, values = (pool.flatten(1, 2).transpose(1, 2) for pool in pools)
    return keys, values


def formula(a: Arguments, dtype: torch.dtype, *, sizes: bool = False) -> Tensor:
    """Attention by matrix products. sizes: of the absolute values."""
    query, mask = a["query"].to(dtype), visible(a)
    B, Q, heads, D = query.shape
    keys, values = (x.to(dtype).masked_fill(~mask.any(1)[:, None, :, None], 0) for x in dense(a))
    keys, values = (x.repeat_interleave(heads // x.shape[1], 1) for x in (keys, values))
    scale, softcap, sinks = map(a.get, ("scale", "softcap", "sinks"))
    scores = query.transpose(1, 2) @ keys.mT * (D**-0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * (scores / softcap).tanh()
    scores = scores.masked_fill(~mask[:, None], -torch.inf)
    if sinks is not None:
        sink = sinks.to(dtype).view(1, heads, 1, 1).expand(B, heads, Q, 1)
        scores = torch.cat([scores, sink], -1)
    weights = scores.softmax(-1).nan_to_num()[..., : mask.shape[2]]
    return (weights @ (values.abs() if sizes else values)).transpose(1, 2)


def by_torch(a: Arguments) -> Tensor:
    """In fp32, by torch's own attention where it has what is asked for."""
    if a.get("softcap") is not None or a.get("sinks") is not None:
        return formula(a, torch.float32)
    mask, (keys, values) = visible(a), dense(a)
    keys, values = (
        x.float().masked_fill(~mask.any(1)[:, None, :, None], 0) for x in (keys, values)
    )
    return F.scaled_dot_product_attention(
        a["query"].transpose(1, 2), keys, values, mask[:, None], scale=a.get("scale"),
        enable_gqa=True,
    ).transpose(1, 2)  # fmt: skip


def assert_error_at_most_twice_that_of_torch(result: Tensor, a: Arguments) -> None:
    """Root mean square over all outputs, against fp64. An output is a sum of weights times values:
    an ulp of the sum of their sizes is allowed anyway, since the sum itself may be near 0."""
    exact = formula(a, torch.float64)
    ulp = 2.0**-23 * rms(formula(a, torch.float64, sizes=True))
    error, allowed = rms(result - exact), 2 * rms(by_torch(a) - exact) + ulp
    assert error <= allowed, (error, allowed)


# --- the same in other forms ---------------------------------------------------------------------


def one_row(a: Arguments, b: int) -> Arguments:
    rows = ("query", "lengths", "tables", "first", "parents")
    if a.get("tables") is None:
        rows += ("keys", "values")
    return a | {name: a[name][b : b + 1] for name in rows if a.get(name) is not None}


def some_queries(a: Arguments, lo: int, hi: int) -> Arguments:
    """Queries of a chain: those before them are in the cache."""
    return a | {"query": a["query"][:, lo:hi], "lengths": a["lengths"] + lo}


def paged(a: Arguments, size: int) -> Arguments:
    """The same entries in scattered blocks of a pool; a few blocks are nobody's, and NaN."""
    B, H, S, D = a["keys"].shape
    columns = -(-S // size)
    order = torch.randperm(B * columns + 3, generator=torch.Generator().manual_seed(size))
    tables = order[: B * columns].view(B, columns)
    pools = {}
    for name in ("keys", "values"):
        pool = torch.full((len(order), size, H, D), NAN, dtype=a[name].dtype)
        rows = F.pad(a[name], (0, 0, 0, columns * size - S), value=NAN).transpose(1, 2)
        pool[tables] = rows.reshape(B, columns, size, H, D)
        pools[name] = pool
    return a | pools | {"tables": tables.int()}


def padded(a: Arguments, n: int) -> Arguments:
    """With n slots of padding before each row, more than it had."""
    first = a.get("first")
    first = torch.zeros_like(a["lengths"]) if first is None else first
    caches = {name: F.pad(a[name], (0, 0, n, 0), value=NAN) for name in ("keys", "values")}
    return a | caches | {"lengths": a["lengths"] + n, "first": first + n}


def restrided(a: Arguments) -> Arguments:
    """As views of [B, S, H, D + 2] and of wider queries, surrounded by NaN."""

    def framed(x: Tensor) -> Tensor:
        return F.pad(x, (1, 1), value=NAN)[..., 1:-1]

    caches = {
        name: framed(a[name].transpose(1, 2).contiguous()).transpose(1, 2)
        for name in ("keys", "values")
    }
    return a | caches | {"query": framed(a["query"].transpose(1, 2)).transpose(1, 2)}


def path_as_chain(a: Arguments, b: int, node: int) -> tuple[Arguments, list[int]]:
    """A node of a tree, and its ancestors before it, as a row of their own; and their indices."""
    path = [node]
    while (parent := int(a["parents"][b, path[0]])) >= 0:
        path.insert(0, parent)
    row = one_row(a, b)
    length = int(row["lengths"])
    taken = [*range(length), *(length + i for i in path)]
    caches = {name: row[name][:, :, taken] for name in ("keys", "values")}
    return row | caches | {"query": row["query"][:, path], "parents": None}, path


def hidden_from(a: Arguments, i: int, filling: float) -> Arguments:
    """With something else in all slots that query i does not see."""
    unseen = ~visible(a)[:, i, None, :, None]
    return a | {name: a[name].masked_fill(unseen, filling) for name in ("keys", "values")}


@contextmanager
def threads(count: int) -> Iterator[None]:
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(count)
        yield
    finally:
        torch.set_num_threads(before)


# --- what a result may not depend on -------------------------------------------------------------


def pairs(attend: Attend, a: Arguments) -> Iterator[tuple[str, Tensor, Tensor]]:
    """Of a dense cache: what is changed, the result then, and what it has to be."""
    whole = attend(**a)
    B, Q = whole.shape[:2]
    yield "nothing", attend(**a), whole
    yield "rows", torch.cat([attend(**one_row(a, b)) for b in range(B)]), whole
    for size in PAGES:
        yield "pages", attend(**paged(a, size)), whole
    for n in PADDINGS:
        yield "padding", attend(**padded(a, n)), whole
    yield "strides", attend(**restrided(a)), whole
    for i in sorted({0, Q // 2, Q - 1}):
        for filling in (NAN, torch.inf, 7.0):
            yield "unseen", attend(**hidden_from(a, i, filling))[:, i], whole[:, i]
    if a.get("parents") is None:
        for step in sorted({1, Q // 2 + 1}):
            parts = [attend(**some_queries(a, i, i + step)) for i in range(0, Q, step)]
            yield "queries", torch.cat(parts, 1), whole
        return
    for b in range(B):
        for node in range(Q):
            chain, path = path_as_chain(a, b, node)
            yield "siblings", attend(**chain), whole[b : b + 1, path]


def over_threads(attend: Attend, a: Arguments) -> tuple[Tensor, Tensor]:
    """The result with three threads, and with one."""
    with threads(3):
        three = attend(**a)
    with threads(1):
        return three, attend(**a)


def dependences(attend: Attend, a: Arguments) -> set[str]:
    """What an implementation's bits depend on that they may not depend on."""
    return {name for name, have, want in pairs(attend, a) if not torch.equal(have, want)}


def split(chunk: Callable[[Arguments, Tensor], Tensor]) -> Attend:
    """Attention whose sums are made in parts that are then added: of a query's seen slots [n],
    `chunk` says in which part each is."""

    def attend(**a: Any) -> Tensor:
        mask, (keys, values) = visible(a), dense(a)
        B, Q, heads, D = a["query"].shape
        out = torch.empty(B, Q, heads, D)
        for b in range(B):
            for i in range(Q):
                seen = mask[b, i].nonzero()[:, 0]
                part = chunk(one_row(a, b) | {"B": B}, seen)
                sums = [
                    sums_of(a["query"][b, i] * D**-0.5, keys[b, :, slots], values[b, :, slots])
                    for slots in (seen[part == p] for p in part.unique())
                ]
                most = torch.stack([most for most, _, _ in sums]).amax(0)
                total, weighted = torch.zeros(heads, 1), torch.zeros(heads, D)
                for high, weight, value in sums:
                    total = total + (high - most).exp() * weight
                    weighted = weighted + (high - most).exp() * value
                out[b, i] = weighted / total
        return out

    return attend


def sums_of(query: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """[heads, D], [H, n, D] twice -> largest score, sum of weights [heads, 1], of weighted values
    [heads, D]."""
    keys, values = (x.repeat_interleave(len(query) // len(x), 0).clone() for x in (keys, values))
    scores = (query[:, None] * keys).sum(-1)
    most = scores.amax(-1, keepdim=True)
    weights = (scores - most).exp()
    return most, weights.sum(-1, keepdim=True), (weights[..., None] * values).sum(1)


def reads_all(**a: Any) -> Tensor:
    """Attention that gives unseen values the weight 0 instead of not reading them."""
    keys, values = (x.repeat_interleave(a["query"].shape[2] // x.shape[1], 1) for x in dense(a))
    scores = a["query"].transpose(1, 2) @ keys.mT * a["query"].shape[-1] ** -0.5
    weights = scores.masked_fill(~visible(a)[:, None], -torch.inf).softmax(-1)
    return (weights @ values).transpose(1, 2)
