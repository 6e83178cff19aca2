"""`cached_attention`: attention for few queries a row, over a cache of keys and values."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from ..checks import check_apart, check_constant, check_tensor, device_of
from ..fields import DTYPES, F32, Sizes
from ..inputs import CachedAttentionInputs
from .registry import Op


class Attended(NamedTuple):
    out: Annotated[Tensor, F32("B Q GH D")]


OP = Op("cached_attention", CachedAttentionInputs, Attended)
FLOAT = (torch.float32,)
WIDEST = 256  # D


def cached_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    lengths: Tensor,
    *,
    tables: Tensor | None = None,
    first: Tensor | None = None,
    parents: Tensor | None = None,
    sinks: Tensor | None = None,
    scale: float | None = None,
    window: int | None = None,
    softcap: float | None = None,
    backend: str | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Attention of Q queries a row over a cache that holds their own keys and values already, in
    fp32: softmax(scale query . keys) values over the entries that a query sees.

    lengths[b] is the number of entries that row b had before its queries; the entry of query i is
    in slot lengths[b] + i. A query with t queries before it stands at position lengths[b] + t. In a
    chain that is t = i. In a tree (`parents`) t is the number of its ancestors among the queries.
    A query sees

    - the slots below lengths[b], whose slot is their position;
    - the entries of its ancestors and its own, each at the position of its query;

    of these the ones at positions >= first[b] and, with a window, > its own position - window. One
    without any, as in padding before first[b], gives zeros. Entries that a query does not see are
    never read for it: they may be NaN or infinite.

    A query's result depends on itself and on the entries that it sees, in the order of their
    positions, and on nothing else, bit for bit: not on the number of queries, rows or threads, nor
    on strides or the blocks of a paged cache, nor on padding (entries that lie n slots further,
    with `first` n larger, give the same bits), nor on where in a tree its path lies (a node has the
    bits that its path has as a chain). So tokens that are checked together have the bits of tokens
    that are decoded one at a time. (The reference keeps this promise for a fixed number of threads:
    its products are torch's.) This is no part of the sampling distribution: backends agree within
    rounding only. Against fp64 the error is at most twice that of
    `torch.nn.functional.scaled_dot_product_attention` in fp32.

    Contents of the integer tensors are not checked, but nothing is read out of bounds. A length or
    first below 0 counts as 0, a parent outside [-1, i) as -1. Slots from S on (M block_size with
    tables), and those in a block outside [0, blocks), do not exist, and nobody sees them: a
    query whose own slot does not exist sees the entries that do; its result is finite, and means
    nothing.

    Args:
        query: f32 [B, Q, G*H, D], any strides (but a last dimension that is not contiguous is
            copied), with 1 <= D <= 256. Heads h G to h G + G - 1 read head h of the keys.
        keys, values: f32, bf16 or f16 [B, H, S, D]; with tables the pool [blocks, block_size, H,
            D]. Strides as those of query, so views of other layouts serve as they are:
            `keys.transpose(1, 2)` of [B, S, H, D]. 16-bit ones are widened, exactly.
        lengths: i64 [B], entries of each row before the queries.
        tables: i32 [B, M]: slot j of row b lies in block tables[b, j // block_size], at
            j % block_size, as in `Pages`. None: the cache is dense.
        first: i64 [B], the first position that is seen, in rows with padding on the left; None: 0.
        parents: i64 [B, Q], index in [-1, i) of the query before query i; -1: it follows the row's
            last entry before the queries. None: i - 1, a chain.
        sinks: f32 [G*H], one logit more in the softmax of each head, which takes weight and has no
            value.
        scale: of the scores, a number in (-2^128, 2^128); None: D^-0.5.
        window: how many positions a query sees, its own among them, an integer >= 1; None: all.
        softcap: scores s become softcap tanh(s / softcap), a number in [2^-126, 2^128); None: they
            stay.
        backend: force one; see `available_backends`. It exists in cpp and reference.
        out: f32 [B, Q, G*H, D], contiguous, to write into; it may not overlap an input.

    Returns:
        f32 [B, Q, G*H, D].

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or range, or one that requires
            a gradient where they are enabled: there is no derivative.
        BackendError: a forced backend cannot run.

    Example:
        >>> values = torch.tensor([1.0, 3.0, 8.0]).view(1, 1, 3, 1)  # [B, H, S, D]
        >>> query, keys = torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 3, 1)
        >>> cached_attention(query, keys, values, torch.tensor([1])).flatten().tolist()
        [2.0, 4.0]
        >>> siblings = torch.tensor([[-1, -1]])
        >>> cached_attention(
        ...     query, keys, values, torch.tensor([1]), parents=siblings
        ... ).flatten().tolist()
        [2.0, 4.5]
    """
    device = device_of("query", query)
    check_tensor("query", query, (None,) * 4, ("B", "Q", "GH", "D"), FLOAT, device)
    B, _, heads, D = query.shape
    if not 1 <= D <= WIDEST:
        raise ValueError(f"query: expected a D in [1, {WIDEST}], got {D}")
    check_cache(keys, values, tables is not None, B, D, device)
    H = keys.shape[1 if tables is None else 2]
    if H == 0 or heads % H != 0:
        raise ValueError(
            f"query: expected a multiple of the keys' H={H} heads, got {heads}; keys are "
            + ("[B, H, S, D]" if tables is None else "[blocks, block_size, H, D] with tables")
        )
    given = dict(query=query, keys=keys, values=values, sinks=sinks)
    for name, value in given.items():
        way_out = "use torch.nn.functional.scaled_dot_product_attention, or torch.no_grad()"
        check_constant(name, value, way_out)
    sizes: Sizes = {"keys": keys.shape, "values": values.shape}
    scale = D**-0.5 if scale is None else scale
    inputs = OP.check(
        sizes, device,
        query, keys, values, lengths, tables, first, parents, sinks, scale, window, softcap,
    )  # fmt: skip
    if out is None:
        return OP(inputs, sizes, device, backend).out
    check_apart(out, **given, lengths=lengths, tables=tables, first=first, parents=parents)
    return OP(inputs, sizes, device, backend, Attended(out)).out


def check_cache(
    keys: Tensor, values: Tensor, paged: bool, B: int, D: int, device: torch.device
) -> None:
    """Raise unless they are a cache of B rows, or the pool of a paged one."""
    if paged:
        shape: tuple[int | None, ...] = (None, None, None, D)
        words = ("blocks", "block_size", "H", "D")
    else:
        shape, words = (B, None, None, D), ("B", "H", "S", "D")
    check_tensor("keys", keys, shape, words, tuple(DTYPES), device)
    check_tensor("values", values, tuple(keys.shape), words, (keys.dtype,), device)
    if paged and keys.shape[1] == 0:
        raise ValueError("keys: expected a block_size of at least 1, got 0")
