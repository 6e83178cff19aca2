"""The end of a round: lengths, blocks given back, a tree's path moved.

Pages are held against lists of Python; caches against indexing of a copy.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import dataclass

import pytest
import torch

from specdiff_kernels import Committed, Pages, commit

from .helpers import i64

pytestmark = pytest.mark.usefixtures("implementation")


def committed(*args, **kwargs):
    return [field.tolist() for field in commit(*args, **kwargs)]


def test_padding_ends_a_row():
    emitted = torch.tensor([[3, 4, -1], [5, -1, -1], [-1, -1, -1], [6, 7, 8]])
    assert committed(i64(10, 20, 30, 40), emitted) == [
        [12, 21, 30, 43], [2, 1, 0, 3], [False, False, False, False], [4, 5, -1, 8],
    ]  # fmt: skip


def test_stop_tokens_inside_the_span():
    emitted = torch.tensor([[3, 2, 9, 2], [2, 1, 1, -1], [1, 9, -1, -1], [1, 1, 1, 1]])
    assert committed(i64(0, 0, 0, 0), emitted, stop_tokens=i64(2, 9)) == [
        [2, 1, 2, 4], [2, 1, 2, 4], [True, True, True, False], [2, 2, 9, 1],
    ]  # fmt: skip


def test_limit_cuts_before_a_stop_token_behind_it():
    emitted = torch.tensor([[1, 3, 2], [1, 1, 2], [1, 1, 1]])
    result = committed(i64(5, 5, 9), emitted, stop_tokens=i64(2), limit=i64(7, 8, 9))
    assert result == [[7, 8, 9], [2, 3, 0], [True, True, True], [3, 2, -1]]


def test_finished_rows_keep_nothing():
    emitted = torch.tensor([[1, 1], [1, 1]])
    finished = torch.tensor([True, False])
    assert committed(i64(4, 4), emitted, finished=finished) == [
        [4, 6], [0, 2], [True, False], [-1, 1],
    ]  # fmt: skip


def test_out_may_alias_the_inputs():
    lengths, finished = i64(4, 4), torch.tensor([True, False])
    out = Committed(lengths, i64(0, 0), finished, i64(0, 0))
    emitted = torch.tensor([[1, 1], [7, 1]])
    assert commit(lengths, emitted, stop_tokens=i64(7), finished=finished, out=out) is out
    assert [field.tolist() for field in out] == [[4, 5], [0, 1], [True, True], [-1, 7]]
    emitted = torch.tensor([[6], [-1]])  # and the last token its own place
    out = Committed(i64(4, 4), i64(0, 0), torch.tensor([False, False]), emitted[:, 0])
    assert commit(out.lengths, emitted, out=out).last.tolist() == [6, -1]


def test_no_tokens_have_no_stop_token():
    emitted, finished = torch.zeros(2, 0, dtype=torch.int64), torch.tensor([True, False])
    result = committed(i64(4, 7), emitted, stop_tokens=i64(2), finished=finished)
    assert result == [[4, 7], [0, 0], [True, False], [-1, -1]]


def test_bad_shapes_are_named():
    tokens = torch.zeros(1, 1, dtype=torch.int64)
    out = Committed(i64(0), i64(0), torch.tensor([False]), i64(0))
    with pytest.raises(ValueError, match=r"^out.lengths: expected shape \[B=1\], got \[2\]"):
        commit(i64(1), tokens, out=out._replace(lengths=i64(1, 2)))
    with pytest.raises(TypeError, match=r"^out.finished: expected dtype bool, got int64"):
        commit(i64(1), tokens, out=out._replace(finished=i64(1)))
    with pytest.raises(ValueError, match=r"^lengths: expected shape \[B=1\], got \[2\]"):
        commit(i64(1, 2), torch.zeros(1, 1, dtype=torch.int64))


# --- paged caches ---


@dataclass
class Book:
    """Pages as lists of Python, and what a commit does to them, step by step."""

    tables: list[list[int]]
    references: list[int]
    free: list[int]
    block_size: int

    @classmethod
    def of(cls, pages: Pages) -> Book:
        free = pages.free[: int(pages.available)].tolist()
        held = [[block for block in row if block >= 0] for row in pages.tables.tolist()]
        return cls(held, pages.references.tolist(), free, pages.block_size)

    def keep(self, row: int, positions: int) -> None:
        blocks = -(-positions // self.block_size)
        for block in self.tables[row][blocks:]:
            self.references[block] -= 1
        self.dropped = [*getattr(self, "dropped", []), *self.tables[row][blocks:]]
        self.tables[row] = self.tables[row][:blocks]

    def end(self) -> None:
        """Blocks that nobody holds any more are free, each once, where it was dropped last."""
        latest = {block: i for i, block in enumerate(self.dropped)}
        self.free += [
            block
            for i, block in enumerate(self.dropped)
            if latest[block] == i and not self.references[block]
        ]


def check_consistent(pages: Pages) -> None:
    """No block is lost, none is held and free, none is free twice, and all are counted."""
    book = Book.of(pages)
    held = Counter(block for row in book.tables for block in row)
    assert [held[block] for block in range(len(book.references))] == book.references
    assert sorted([*held, *book.free]) == list(range(len(book.references)))
    for row in pages.tables.tolist():
        assert row == sorted(row, key=lambda block: block < 0)  # no holes


def make_pages(tables: list[list[int]], blocks: int, block_size: int) -> Pages:
    pages = Pages.empty(len(tables), max(map(len, tables)) + 1, blocks, block_size)
    for row, held in enumerate(tables):
        pages.tables[row, : len(held)] = torch.tensor(held, dtype=torch.int32)
        for block in held:
            pages.references[block] += 1
    free = [block for block in range(blocks) if not pages.references[block]]
    pages.free[: len(free)] = torch.tensor(free, dtype=torch.int32)
    pages.available.fill_(len(free))
    return pages


def padded(counts: list[int], N: int) -> torch.Tensor:
    return torch.tensor([[7] * n + [-1] * (N - n) for n in counts]).view(len(counts), N)


def test_rollback_crosses_block_boundaries():
    """A draft of 11 tokens took blocks of 2; rows keep 11, 1 and 0 of them, and 4 of an abort."""
    tables = [[0, 1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12, 13], [14, 15, 16, 17], [20, 21, 22, 23]]
    pages = make_pages(tables, blocks=30, block_size=2)
    before = int(pages.available)
    result = commit(i64(3, 3, 3, 3), padded([11, 1, 0, 4], 11), pages=pages,
                    finished=torch.tensor([False, False, True, True]))  # fmt: skip
    assert result.lengths.tolist() == [14, 4, 3, 3]
    assert [row[:7] for row in pages.tables.tolist()] == [
        tables[0], [7, 8] + [-1] * 5, [14, 15] + [-1] * 5, [20, 21] + [-1] * 5
    ]  # fmt: skip
    freed = pages.free[before : int(pages.available)].tolist()
    assert freed == [9, 10, 11, 12, 13, 16, 17, 22, 23]
    check_consistent(pages)


def test_a_shared_block_is_freed_once_by_the_last_who_holds_it():
    tables = [[0, 1, 2], [0, 1, 3], [0, 1, 4]]
    pages = make_pages(tables, blocks=6, block_size=4)
    commit(i64(9, 3, 9), padded([1, 0, 1], 1), pages=pages)
    assert pages.references.tolist() == [3, 2, 1, 0, 1, 0]
    assert pages.free[: int(pages.available)].tolist() == [5, 3]  # 3 was row 1's alone
    commit(i64(3, 4, 3), padded([0, 0, 0], 1), pages=pages)  # rows 0 and 2 give up block 1
    assert pages.references.tolist() == [3, 0, 0, 0, 0, 0]
    assert pages.free[: int(pages.available)].tolist() == [5, 3, 2, 1, 4]  # 1 with row 2
    check_consistent(pages)


def test_release_gives_back_all_blocks_of_finished_rows():
    """One ends by a stop token, one by its limit, one had ended; one goes on."""
    pages = make_pages([[0, 1], [2, 3], [4], [5, 6]], blocks=8, block_size=2)
    emitted = torch.tensor([[9], [1], [1], [1]])
    limit, finished = i64(9, 3, 9, 9), torch.tensor([False, False, True, False])
    result = commit(i64(2, 2, 2, 2), emitted, stop_tokens=i64(9), limit=limit, finished=finished,
                    pages=pages, release=True)  # fmt: skip
    assert result.finished.tolist() == [True, True, True, False]
    assert result.lengths.tolist() == [3, 3, 2, 3]
    assert pages.tables.tolist()[:3] == [[-1] * 3] * 3 and pages.tables[3].tolist() == [5, 6, -1]
    assert pages.free[: int(pages.available)].tolist() == [7, 0, 1, 2, 3, 4]
    check_consistent(pages)


def test_without_rows_or_tokens():
    pages = Pages.empty(1, 2, 3, 4)
    commit(i64(0), torch.zeros(1, 0, dtype=torch.int64), pages=pages)
    assert pages.available.item() == 3
    none = pages._replace(tables=pages.tables[:0])
    commit(i64(), torch.zeros(0, 3, dtype=torch.int64), pages=none, release=True)
    assert none.available.item() == 3


def random_commits(pages: Pages, seed: int, rounds: int) -> None:
    """Rows of shared prefixes start, draft, keep part of it, finish and start again."""
    draw = random.Random(seed)
    B, M = pages.tables.shape
    lengths, idle = [0] * B, [True] * B
    for _ in range(rounds):
        for row in range(B):
            if idle[row] and draw.random() < 0.5:
                lengths[row], idle[row] = draw.randrange(1, 9), False
                source = draw.randrange(B)
                held = Book.of(pages).tables[source]
                if source != row and len(held) * pages.block_size >= lengths[row]:
                    pages.share(source, row, lengths[row])
        k = draw.randrange(0, 9)
        wanted = i64(*(0 if over else n + k + 1 for n, over in zip(lengths, idle, strict=True)))
        short = int(pages.reserve(wanted))
        assert short == 0, "the pool is large enough for all of them"
        kept = [draw.randrange(0, k + 2) for _ in range(B)]
        limit = i64(*(draw.choice([10**6, n + 2]) for n in lengths))
        release = draw.random() < 0.8
        book = Book.of(pages)
        result = commit(i64(*lengths), padded(kept, k + 1), limit=limit,
                        finished=torch.tensor(idle), pages=pages, release=release)  # fmt: skip
        lengths, idle = result.lengths.tolist(), result.finished.tolist()
        for row in range(B):
            book.keep(row, 0 if release and idle[row] else lengths[row])
        book.end()
        assert Book.of(pages).__dict__ == {k: v for k, v in book.__dict__.items() if k != "dropped"}
        check_consistent(pages)
        if not release:
            nothing = torch.ones(B, dtype=torch.bool)
            idle = [True] * B
            commit(result.lengths, padded([0] * B, 1), finished=nothing, pages=pages, release=True)
            check_consistent(pages)
        lengths = [0 if over else n for n, over in zip(lengths, idle, strict=True)]
        for row in range(B):
            if lengths[row] + 10 > M * pages.block_size:
                idle[row], lengths[row] = True, 0
        commit(i64(*lengths), padded([0] * B, 1), pages=pages)


@pytest.mark.parametrize("seed", range(4))
def test_pages_equal_a_book_kept_by_hand(seed):
    block_size = (1, 2, 3, 16)[seed]
    pages = Pages.empty(5, 40 // block_size + 1, 5 * (40 // block_size + 1), block_size)
    random_commits(pages, seed, rounds=30)


def test_many_rows_and_columns():
    """More than a block of threads or a tile holds, with blocks shared by all rows."""
    B, M = 70, 90
    shared = list(range(M - 3))
    tables = [[*shared, M + 3 * b, M + 3 * b + 1] for b in range(B)]
    pages = make_pages(tables, blocks=M + 3 * B, block_size=1)
    book = Book.of(pages)
    lengths = [(b * 37) % (M - 1) for b in range(B)]
    commit(i64(*lengths), padded([0] * B, 2), pages=pages)
    for row, length in enumerate(lengths):
        book.keep(row, length)
    book.end()
    assert Book.of(pages).free == book.free
    assert Book.of(pages).references == book.references
    check_consistent(pages)


def test_a_table_that_lies_frees_nothing_twice():
    """A block whose count is too low, one of another pool: the table is emptied, no more."""
    pages = make_pages([[0, 1], [0, 2]], blocks=4, block_size=1)
    pages.references[0] = 1
    pages.tables[1, 1] = 99
    pages.references[2] = 0
    commit(i64(0, 0), padded([0, 0], 1), pages=pages)
    assert pages.free[: int(pages.available)].tolist() == [3, 1]
    assert (pages.tables == -1).all()
    full = make_pages([[0, 1]], blocks=2, block_size=1)
    full.available.fill_(2)  # a stack that is full already
    commit(i64(0), padded([0], 1), pages=full)
    assert full.free.tolist() == [1, 0]  # as it was; nothing is written behind it


# --- trees ---

STORED = [torch.float32, torch.bfloat16, torch.float16, torch.float8_e4m3fn, torch.float8_e5m2,
          torch.float64, torch.uint8]  # fmt: skip
B, H, S, D, BLOCK = 3, 2, 14, 12, 4


def stored(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randint(0, 2**7, (*shape[:-1], shape[-1] * dtype.itemsize),
                         dtype=torch.uint8).view(dtype)  # fmt: skip


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.contiguous().view(torch.uint8)


def dense_layouts(dtype: torch.dtype) -> dict[str, list[torch.Tensor]]:
    """Caches of 3 layers as [B, H, S, D], and what lies between them in memory."""
    make = lambda *shape: stored(*shape, dtype=dtype)
    one = make(3, 2, B, H, S, D)
    return {
        "[B, H, S, D]": [make(B, H, S, D) for _ in range(6)],
        "[B, S, H, D]": [make(B, S, H, D).transpose(1, 2) for _ in range(6)],
        "[B, S, H, 2, D]": [
            kv.transpose(1, 2)[..., i, :] for kv in [make(B, S, H, 2, D)] * 1 for i in range(2)
        ],
        "[L, 2, B, H, S, D]": [one[layer, i] for layer in range(3) for i in range(2)],
        "odd": [make(B, H, S, D + 1)[..., 1:] for _ in range(3)],
        "mixed": [make(B, H, S, D), make(B, 1, S, 4), make(B, H, S + 2, D), make(B, H, S, 1)],
    }


def paged_layouts(dtype: torch.dtype, blocks: int) -> dict[str, list[torch.Tensor]]:
    make = lambda *shape: stored(*shape, dtype=dtype)
    kv, vk = make(blocks, 2, BLOCK, H, D), make(2, blocks, BLOCK, H, D)
    return {
        "[N, block, H, D]": [make(blocks, BLOCK, H, D) for _ in range(6)],
        "[N, H, block, D]": [make(blocks, H, BLOCK, D).transpose(1, 2) for _ in range(4)],
        "[N, 2, block, H, D]": [kv[:, 0], kv[:, 1]],
        "[2, N, block, H, D]": [*vk],
    }


LENGTHS = [3, 7, 5]
PATH = torch.tensor([[0, 1, 4, 5, 9], [0, 3, 4, 6, 2], [0, 2, 3, 4, 5]])  # row 1: two tokens stand
TREE_KEPT = [5, 2, 5]


@pytest.mark.parametrize("layout", dense_layouts(torch.float32))
@pytest.mark.parametrize("dtype", STORED)
def test_a_path_is_made_contiguous(layout, dtype):
    torch.manual_seed(0)
    caches = dense_layouts(dtype)[layout]
    before = [cache.clone() for cache in caches]
    result = commit(i64(*LENGTHS), padded(TREE_KEPT, 5), path=PATH, caches=caches)
    assert result.kept.tolist() == TREE_KEPT
    for cache, old in zip(caches, before, strict=True):
        want = old.clone()
        for b in range(B):
            for i in range(TREE_KEPT[b]):
                source, target = LENGTHS[b] + int(PATH[b, i]), LENGTHS[b] + i
                if source < cache.shape[2]:
                    want[b, :, target] = old[b, :, source]
        assert torch.equal(bits(cache), bits(want))
        assert not torch.equal(bits(cache), bits(old))


@pytest.mark.parametrize("layout", paged_layouts(torch.float32, 12))
@pytest.mark.parametrize("dtype", STORED[:5])
def test_a_path_through_blocks(layout, dtype):
    """The path is moved through the tables as they were, and blocks behind it are freed."""
    torch.manual_seed(0)
    tables = [[8, 2, 5, 0], [1, 9, 4, 6], [3, 7, 10, 11]]
    caches = paged_layouts(dtype, 12)[layout]
    pages = make_pages(tables, blocks=12, block_size=BLOCK)
    before = [cache.clone() for cache in caches]
    commit(i64(*LENGTHS), padded(TREE_KEPT, 5), path=PATH, caches=caches, pages=pages)
    for cache, old in zip(caches, before, strict=True):
        want = old.clone()
        for b in range(B):
            for i in range(TREE_KEPT[b]):
                source, target = LENGTHS[b] + int(PATH[b, i]), LENGTHS[b] + i
                want[tables[b][target // BLOCK], target % BLOCK] = old[
                    tables[b][source // BLOCK], source % BLOCK
                ]
        assert torch.equal(bits(cache), bits(want))
    assert pages.free[: int(pages.available)].tolist() == [5, 0, 6, 11]
    check_consistent(pages)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_stride_of_a_single_dimension_does_not_matter(dtype):
    cache = stored(1, 1, 9, 5, dtype=dtype)[..., :1].as_strided((1, 1, 9, 1), (45, 45, 5, 3))
    before = cache.clone()
    commit(i64(2), torch.tensor([[7, 7, 7]]), path=torch.tensor([[0, 2, 5]]), caches=[cache])
    assert torch.equal(bits(cache[0, 0, 2:5]), bits(before[0, 0, [2, 4, 7]]))


@pytest.mark.parametrize("form", [list, iter])
def test_a_cache_listed_twice_is_moved_once(form):
    """The same tensor, another of the same memory; layers may share keys and values."""
    cache, other = stored(1, 2, 9, 4), stored(1, 2, 9, 4)
    before = cache.clone(), other.clone()
    caches = form([cache, other, cache, cache.view_as(cache)])
    commit(i64(1), torch.tensor([[7, 7, 7]]), path=torch.tensor([[0, 2, 4]]), caches=caches)
    for have, old in zip((cache, other), before, strict=True):
        assert torch.equal(bits(have[0, :, 1:4]), bits(old[0, :, [1, 3, 5]]))


def test_only_what_stands_is_moved():
    """A stop token, a limit, a finished row and a failed one cut the path too."""
    cache = stored(4, 1, 9, 4)
    path = torch.tensor([[0, 2, 4, 6]] * 4)
    emitted = torch.tensor([[1, 9, 1, 1], [1, 1, 1, 1], [1, 1, 1, 1], [-1, -1, -1, -1]])
    before = cache.clone()
    commit(i64(1, 1, 1, 1), emitted, stop_tokens=i64(9), limit=i64(9, 4, 9, 9),
           finished=i64(0, 0, 1, 0).bool(), path=path, caches=[cache])  # fmt: skip
    want = before.clone()
    want[0, :, 2], want[1, :, 2], want[1, :, 3] = before[0, :, 3], before[1, :, 3], before[1, :, 5]
    assert torch.equal(cache, want)


def test_long_paths_and_wide_heads():
    """A path longer than what is read at once, with each source the target of an earlier one."""
    torch.manual_seed(1)
    N, S = 40, 100
    caches = [stored(2, 5, S, 80, dtype=torch.bfloat16) for _ in range(3)]
    before = [cache.clone() for cache in caches]
    path = torch.stack([torch.arange(N) + 1, torch.arange(N) * 2])
    path[0, 0] = 0
    commit(i64(0, 9), padded([N, N], N), path=path, caches=caches)
    for cache, old in zip(caches, before, strict=True):
        for b, start in enumerate((0, 9)):
            moved = old[b, :, start + path[b]]
            assert torch.equal(bits(cache[b, :, start : start + N]), bits(moved))
            assert torch.equal(bits(cache[b, :, start + N :]), bits(old[b, :, start + N :]))


# --- bad arguments ---


def bad(message: str, error=ValueError, **options):
    tokens = torch.tensor([[1, 1, -1]])
    with pytest.raises(error, match=message):
        commit(i64(1), tokens, **options)


def test_bad_pages_and_trees_are_named():
    pages = make_pages([[0]], blocks=2, block_size=2)
    cache, path = stored(1, 1, 8, 4), torch.tensor([[0, 2, 0]])
    bad(r"release: expected pages", release=True)
    none = pages._replace(tables=pages.free[:0, None])
    bad(r"pages.tables: expected shape \[B=1, M\]", pages=none)
    bad(r"pages.tables: expected at least one", pages=pages._replace(tables=pages.tables[:, :0]))
    bad(r"pages.available: expected dtype int32", TypeError, pages=pages._replace(available=i64(0)))
    bad(r"pages.free: expected contiguous", pages=pages._replace(free=torch.zeros(4).int()[::2]))
    bad(r"pages.block_size: expected at least 1", pages=pages._replace(block_size=0))
    bad(r"path: expected a tensor with caches", caches=[cache])
    bad(r"path: expected shape \[B=1, N=3\]", path=path[:, :2], caches=[cache])
    bad(r"path: expected nodes from 0 .* got \[0, 0, 1\] in row 0",
        path=torch.tensor([[0, 0, 1]]), caches=[cache])  # fmt: skip
    bad(r"path: expected nodes from 0", path=torch.tensor([[-1, 0, 1]]), caches=[cache])
    bad(
        r"caches\[1\]: expected shape \[B=1, H, S, D\]",
        path=path,
        caches=[cache, stored(2, 1, 8, 4)],
    )
    bad(r"caches\[0\]: expected a contiguous last", path=path, caches=[cache.transpose(2, 3)])
    bad(
        r"caches\[0\]: expected shape \[blocks=2, block_size=2, H, D\]",
        path=path,
        caches=[cache],
        pages=pages,
    )
    bad(r"caches: expected at most 4 combinations", path=path,
        caches=[stored(1, 1, 8, n) for n in range(1, 6)])  # fmt: skip


def test_sizes_of_pages_are_checked():
    with pytest.raises(ValueError, match="block_size: expected an integer >= 1, got 0"):
        Pages.empty(1, 1, 1, 0)


def test_reserve_says_what_is_missing():
    pages = Pages.empty(3, 4, 5, 2)
    # row 2 wants 50 blocks, may hold 4 and gets 2
    assert pages.reserve(i64(3, 1, 99)).item() == 48
    assert pages.tables.tolist() == [[0, 1, -1, -1], [2, -1, -1, -1], [3, 4, -1, -1]]
    assert pages.available.item() == 0
    check_consistent(pages)
    assert pages.reserve(i64(4, 0, 1)).item() == 0
