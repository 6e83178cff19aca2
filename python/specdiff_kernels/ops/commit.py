"""`commit`: what stands of a round: stop tokens, limits, and the cache's per-row rollback."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from ..checks import check_tensor, concrete, device_of, kind_of, readable
from ..fields import Sizes
from ..inputs import CommitInputs
from ..pages import Pages
from ..types import Committed
from .registry import Op

MAX_GEOMETRIES = 4
OP = Op("commit", CommitInputs, Committed)


def commit(
    lengths: Tensor,
    emitted: Tensor,
    *,
    stop_tokens: Tensor | None = None,
    limit: Tensor | None = None,
    finished: Tensor | None = None,
    pages: Pages | None = None,
    release: bool = False,
    path: Tensor | None = None,
    caches: Iterable[Tensor] = (),
    backend: str | None = None,
    out: Committed | None = None,
) -> Committed:
    """Advance each sequence by the emitted tokens that stand, say which are finished, and roll
    the cache back to what stands.

    - Dense cache: entries behind a row's length are stale, never attended to and overwritten
      next, so that rollback moves no bytes.
    - Paged cache: blocks that lie behind the new length altogether leave the row's table. One
      that no table holds any more is pushed on the stack of free blocks, in the order of rows and
      of positions; of several rows that give up a shared block, the last one counts. So
      `pages.free[before:after]`, with `pages.available` before and after, lists what was freed.
    - Tree: the round cached node n of a row's tree at position lengths[b] + n. Keys and values
      of the accepted path move to lengths[b], lengths[b] + 1, ..., in all caches at once.

    A row whose verification failed or was aborted (all -1) keeps nothing, and gives back the blocks
    that were reserved for its draft.

    Args:
        lengths: i64 [B], cached positions of each sequence before the round.
        emitted: i64 [B, N], as returned by `verify`: tokens, then -1.
        stop_tokens: i64 [S]; nothing behind the first stop token stands.
        limit: i64 [B], largest length that a sequence may reach.
        finished: bool [B], sequences that ended earlier; they keep nothing and stay finished.
        pages: of a paged cache with B sequences; updated in place.
        release: a sequence that is finished after the round gives back all its blocks.
        path: i64 [B, N], the node that belongs to each emitted token: the root, at 0, then the
            accepted nodes. Strictly increasing along a row as far as the row has tokens: a child
            comes after its parent. (On a GPU this is not checked; what breaks it may move wrong
            entries of the caches, but touches no other memory.)
        caches: what `path` moves: keys and values of all layers, in place, of any dtype with
            a contiguous last dimension and up to 4 combinations of shape, dtype and strides.
            [B, H, S, D], or with pages [N, block_size, H, D], without a spare block that a pool
            may have for padding (`pool[:N]`). Other layouts are views of these:
            `keys.transpose(1, 2)` of [B, S, H, D], `kv[:, 0]` and `kv[:, 1]` of interleaved
            [N, 2, block_size, H, D]. Layers may share one: listed twice, it is moved once.
        backend, out: as in `row_distribution`; `out` may alias the inputs.

    Returns:
        Committed(lengths i64 [B], kept i64 [B], finished bool [B], last i64 [B]): last is the last
        token that stands, which the next forward begins with; -1 where a row keeps nothing.

    Raises:
        ValueError, TypeError: an argument of the wrong shape, dtype or memory; a path that does not
            increase, or lengths below 0, where they can be looked at.

    Example:
        >>> result = commit(
        ...     torch.tensor([5]), torch.tensor([[7, 2, 9, -1]]), stop_tokens=torch.tensor([2])
        ... )
        >>> [field.item() for field in result]
        [7, 2, True, 2]
        >>> pages = Pages.empty(batch=1, columns=4, blocks=4, block_size=2)
        >>> _ = pages.reserve(torch.tensor([8]))
        >>> result = commit(torch.tensor([3]), torch.tensor([[7, -1, -1, -1, -1]]), pages=pages)
        >>> result.lengths.tolist(), pages.tables.tolist()
        ([4], [[0, 1, -1, -1]])
        >>> pages.free[: int(pages.available)].tolist()
        [2, 3]
    """
    device, caches = device_of("emitted", emitted), cache_list(caches)
    sizes: Sizes = {}
    inputs = OP.check(
        sizes, device, emitted, lengths, stop_tokens, limit, finished, pages, release, path, caches
    )
    check_lengths(lengths)
    pages = inputs.pages
    if pages is not None:
        check_pages(pages)
    elif release:
        raise ValueError("release: expected pages with it, got None; a dense cache has no blocks")
    if path is not None:
        check_path(path, emitted)
        check_caches(caches, pages, sizes["B"], device)
    elif caches:
        raise ValueError("path: expected a tensor with caches, got None; without a tree nothing "
                         "moves")  # fmt: skip
    return OP(inputs._replace(caches=each_once(caches)), sizes, device, backend, out)


def cache_list(caches: Iterable[Tensor]) -> list[Tensor]:
    if isinstance(caches, Tensor) or not isinstance(caches, Iterable):
        raise TypeError(f"caches: expected a list of tensors, got {kind_of(caches)}")
    caches = list(caches)
    for i, cache in enumerate(caches):
        device_of(f"caches[{i}]", cache)
    return caches


def check_lengths(lengths: Tensor) -> None:
    if readable(lengths) and lengths.numel() and (least := int(lengths.min())) < 0:
        raise ValueError(f"lengths: expected numbers of cached positions, at least 0, got {least}")


def check_pages(pages: Pages) -> None:
    if pages.tables.shape[1] == 0:
        raise ValueError("pages.tables: expected at least one column, got 0")
    if pages.block_size < 1:
        raise ValueError(f"pages.block_size: expected at least 1, got {pages.block_size}")


def check_path(path: Tensor, emitted: Tensor) -> None:
    if not readable(path) or not path.numel():
        return
    real = (emitted >= 0).cumprod(-1).bool()
    before = torch.nn.functional.pad(path[:, :-1], (1, 0), value=-1)
    wrong = (real & (path <= before)).any(-1).nonzero()
    if wrong.numel():
        b = int(wrong[0])
        raise ValueError(
            f"path: expected nodes from 0 that strictly increase along each row, got "
            f"{path[b].tolist()} in row {b}; number a tree's nodes so that children follow parents"
        )


def check_caches(caches: list[Tensor], pages: Pages | None, B: int, device: torch.device) -> None:
    shape: tuple[int | None, ...] = (B, None, None, None)
    words = ("B", "H", "S", "D")
    if pages is not None:
        shape = (len(pages.references), pages.block_size, None, None)
        words = ("blocks", "block_size", "H", "D")
    kinds: list[Any] = []  # sizes may be symbols, which have no hash
    for i, cache in enumerate(caches):
        kind = (cache.shape, cache.stride(), cache.dtype, cache.device)
        if kind in kinds:
            continue
        kinds.append(kind)
        check_tensor(f"caches[{i}]", cache, shape, words, (cache.dtype,), device)
        if cache.stride(-1) != 1 and cache.shape[-1] > 1:
            raise ValueError(
                f"caches[{i}]: expected a contiguous last dimension, got strides "
                f"{cache.stride()}; a permuted cache cannot be moved in place"
            )
    if len(kinds) > MAX_GEOMETRIES:
        raise ValueError(
            f"caches: expected at most {MAX_GEOMETRIES} combinations of shape, strides and dtype, "
            f"got {len(kinds)}; allocate layers alike"
        )


def each_once(caches: list[Tensor]) -> list[Tensor]:
    """Without repeats: of memory, or of the object where memory cannot be looked at."""
    if not all(map(concrete, caches)):
        return list(dict.fromkeys(caches))
    return list({(x.data_ptr(), x.shape, x.stride()): x for x in caches}.values())
