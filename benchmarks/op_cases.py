"""Cases of bench_ops.py for the public ops: inputs, expected results and least bytes.

Logits, weights and caches are fp32. Calls cycle through copies that fill COLD bytes, so that the
data come from memory, as the floor assumes. Small inputs stay in the caches. The draws of calls
differ, since the amount of data read may depend on them.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import cache, cached_property, partial
from typing import Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from inputs import Shape, make_logits
from torch import Tensor

import specdiff_kernels as sk

COLD = 1 << 29
BACKENDS = tuple(sk.available_backends())
PACKED = ("cpp",)  # backends that read packed weights directly
SEQUENCES = 8  # in all draws of a case
ROUNDS = (Shape(1, 8, 49152), Shape(8, 8, 128256))
BLOCK, POSITIONS = 16, 512  # paged cache: positions per block, and maximum per sequence
HEADS, WIDTH = 3, 64  # of SmolLM2-135M's keys and values
GROUP = 3  # heads of its queries for each


# --- the least bytes -----------------------------------------------------------------------------
# Only the logits of a row are counted; its other data are less than a thousandth of them.


def row_distribution_bytes(logits: Tensor) -> int:
    """A distribution's total needs every logit. [N, V]"""
    return logits.nbytes


def sample_bytes(logits: Tensor, tokens: Tensor) -> int:
    """The distribution is given: weights are summed from the row's first up to the token's.

    [N, V], [N]
    """
    return int((tokens + 1).sum()) * logits.element_size()


def denoise_step_bytes(logits: Tensor, revealed: int) -> int:
    """Each revealed position needs its row's distribution, hence every logit. [R, V]"""
    return revealed * logits.shape[1] * logits.element_size()


def verify_bytes(target_logits: Tensor, accepted: Tensor) -> int:
    """A token's probability needs its whole row. Read are the target's rows of the accepted tokens,
    the row after them, and at a rejection the draft's row for the residual. [B, K + 1, V], [B]"""
    _, positions, V = target_logits.shape
    rows = accepted + 1 + (accepted < positions - 1)
    return int(rows.sum()) * V * target_logits.element_size()


def build_tree_bytes(logits: Tensor, read: int) -> int:
    """A row's likeliest tokens, and its distribution, need every logit. [R, Vd]"""
    return read * logits.shape[1] * logits.element_size()


def verify_tree_bytes(target_logits: Tensor, pool: Tensor, parents: Tensor, path: Tensor) -> int:
    """Target's rows are read along the path. Where one of a node's children was rejected there, the
    draft's row that they come from is read too. [B, N + 1, V], [R, Vd], [B, N], [B, N + 1]"""
    total = 0
    for behind, way in zip(parents.tolist(), path.tolist(), strict=True):
        nodes = [n - 1 for n in way if n >= 0]  # -1: the root
        total += len(nodes) * target_logits[0, 0].nbytes
        for node, accepted in zip(nodes, [*nodes[1:], None], strict=True):
            children = [n for n, parent in enumerate(behind) if parent == node]
            rejected = children if accepted is None else children[: children.index(accepted)]
            total += pool[0].nbytes if rejected else 0
    return total


def commit_bytes(
    kept: Tensor, stops: int, dropped: int | None = None, moved: int = 0, entry: int = 0
) -> int:
    """Per row: length, limit and finished are read; length, kept, finished and the last token are
    written; the kept tokens are compared with the stop tokens. kept: i64 [B].

    dropped: blocks returned to the pages (None: no pages). For each, the table's entry and the
    reference count are read and written, and a free block is written. The number of free blocks is
    read and written.
    moved: entries of a tree's path that must move, with `entry` bytes in all caches: they are read
    and written; the path is read.
    """
    small = (8 + 8 + 1) + (8 + 8 + 1 + 8)
    total = len(kept) * small + 8 * int(kept.sum()) + 8 * stops
    if dropped is not None:
        total += dropped * (2 * 4 + 2 * 4 + 4) + 2 * 4
    if entry:
        total += 8 * int(kept.sum()) + 2 * moved * entry
    return total


def row_divergence_bytes(target: Tensor, draft: Tensor, ids: Tensor | None) -> int:
    """The totals of both distributions need every logit. [N, V], [N, D], [D]"""
    return target.nbytes + draft.nbytes + (0 if ids is None else ids.nbytes)


def skinny_linear_bytes(x: Tensor, weight: Tensor) -> int:
    """Inputs and weights are read once, and outputs written once. [M, K], [N, K]"""
    return x.nbytes + weight.nbytes + 4 * len(x) * len(weight)


def cached_attention_bytes(query: Tensor, keys: Tensor, values: Tensor) -> int:
    """All entries are seen and read once, as the queries; a result is written for each of these.
    [B, Q, heads, D], [B, H, S, D] twice"""
    return 2 * query.nbytes + keys.nbytes + values.nbytes


# --- cases ---------------------------------------------------------------------------------------


class Case(ABC):
    """An op on one shape. Call number n has draw n % draws."""

    op: ClassVar[str]
    shapes: ClassVar[tuple[Any, ...]]
    draws: int = 1

    @abstractmethod
    def __init__(self, shape: Any, device: torch.device) -> None: ...

    @abstractmethod
    def load(self, number: int, backend: str) -> Callable[[], Any]:
        """Prepare a call and return it. Only the returned call is timed."""

    @abstractmethod
    def least_bytes(self) -> float:
        """Least bytes that a call must move, as a mean over the draws."""

    def result(self, number: int, backend: str) -> tuple[Tensor, ...]:
        """All tensors that a call returns or changes."""
        returned = self.load(number, backend)()
        return (returned,) if isinstance(returned, Tensor) else tuple(returned)

    @cached_property
    def expected(self) -> list[tuple[Tensor, ...]]:
        """The reference's result of each draw."""
        return [self.result(number, "reference") for number in range(self.draws)]

    def fault(self, backend: str) -> str | None:
        """The first result that differs from the reference in any bit; None: none does.

        Raises:
            BackendError: the backend cannot run this op.
        """
        for number, wanted in enumerate(self.expected):
            have = self.result(number, backend)
            if not all(torch.equal(x, y) for x, y in zip(have, wanted, strict=True)):
                return f"{self.op}: draw {number} of {backend} differs from the reference"
        return None


class Rows(Case):
    """B K rows of a drafter's logits; the draws cover SEQUENCES sequences, B at a time."""

    shapes = ROUNDS

    def __init__(self, shape: Shape, device: torch.device) -> None:
        B, K, _ = shape
        self.draws = max(1, SEQUENCES // B)
        self.shape = shape
        self.target, self.pool = round_logits(shape, device)
        self.distribution = sk.row_distribution(self.pool)
        self.seed = torch.arange(B, device=device)
        self.rounds = torch.arange(self.draws, device=device)[:, None]
        self.slot = torch.arange(K, device=device).repeat(B)
        self.ones = torch.ones(B, device=device)

    @cached_property
    def pools(self) -> list[tuple[Tensor]]:
        return copies(self.pool)

    def round(self, number: int, count: int) -> Tensor:
        """Round number of a draw. -> i64 [count]"""
        return self.rounds[number % self.draws].expand(count).contiguous()


class RowDistribution(Rows):
    op = "row_distribution"

    def __init__(self, shape: Shape, device: torch.device) -> None:
        super().__init__(shape, device)
        self.draws = 1  # nothing is drawn
        self.temperature = torch.ones(len(self.pool), device=device)

    def load(self, number: int, backend: str) -> Callable[[], Any]:
        (pool,) = self.pools[number % len(self.pools)]
        return partial(sk.row_distribution, pool, self.temperature, backend=backend)

    def least_bytes(self) -> float:
        return row_distribution_bytes(self.pool)


class Sample(Rows):
    op = "sample"

    def load(self, number: int, backend: str) -> Callable[[], Any]:
        (pool,) = self.pools[number % len(self.pools)]
        seed = self.seed.repeat_interleave(self.shape.k)
        key = {"seed": seed, "round": self.round(number, len(pool)), "slot": self.slot}
        return partial(sk.sample, pool, self.distribution, **key, backend=backend)

    def least_bytes(self) -> float:
        return sum(sample_bytes(self.pool, *drawn) for drawn in self.expected) / self.draws


class DenoiseStep(Rows):
    """A draft of a single step: all positions are masked, and all are revealed."""

    op = "denoise_step"

    def load(self, number: int, backend: str) -> Callable[[], Any]:
        B, K, _ = self.shape
        (pool,) = self.pools[number % len(self.pools)]
        draft, reveal = sk.Draft.masked(B, K, pool), sk.Reveal.all()
        key = {"seed": self.seed, "round": self.round(number, B)}
        return partial(sk.denoise_step, draft, reveal, 0, self.ones, **key, backend=backend)

    def result(self, number: int, backend: str) -> tuple[Tensor, ...]:
        draft = self.load(number, backend)()
        return (draft.tokens, draft.tau, draft.rows, *draft.distribution)

    def least_bytes(self) -> float:
        return denoise_step_bytes(self.pool, self.shape.batch * self.shape.k)


class Verify(Rows):
    """The token rule on a draft of a single step with all distributions recorded."""

    op = "verify"

    def __init__(self, shape: Shape, device: torch.device) -> None:
        super().__init__(shape, device)
        B, K, _ = shape
        random = torch.Generator(device).manual_seed(1)
        tokens = torch.multinomial(self.pool.softmax(-1), self.draws, True, generator=random)
        self.tokens = tokens.T.reshape(self.draws, B, K).contiguous()
        self.rows = torch.arange(B * K, device=device).view(B, K)
        self.tau = torch.zeros_like(self.rows, dtype=torch.int32)

    @cached_property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return copies(self.target, self.pool)

    def load(self, number: int, backend: str) -> Callable[[], Any]:
        target, pool = self.pairs[number % len(self.pairs)]
        draft = sk.Draft(
            self.tokens[number % self.draws], self.tau, self.rows, pool, self.distribution
        )
        key = {"seed": self.seed, "round": self.round(number, len(target))}
        return partial(sk.verify, target, draft, self.ones, **key, backend=backend)

    def least_bytes(self) -> float:
        return sum(verify_bytes(self.target, one[0]) for one in self.expected) / self.draws


class Branching(NamedTuple):
    nodes: int
    vocab: int
    drafted: int
    best_first: bool = False

    def __str__(self) -> str:
        how = ", best first" if self.best_first else ""
        return f"N={self.nodes} V={self.vocab} D={self.drafted}{how}"


class Trees(Case):
    """One sequence, two nodes behind each other one. All nodes of a depth have the same rows."""

    draws = SEQUENCES

    def __init__(self, shape: Branching, device: torch.device) -> None:
        self.N = shape.nodes
        self.places = torch.arange(self.N, device=device) // 2 - 1
        depths = sk.Tree.guesses(self.places[None] * 0, self.places[None]).depths[0]
        K = int(depths.max())
        target, drafted = make_logits(
            Shape(1, K, shape.vocab), torch.Generator(device).manual_seed(0)
        )
        self.target = torch.cat((target[:, :1], target[:, depths]), 1)  # [1, N + 1, V]
        self.ids = target.amax((0, 1)).topk(shape.drafted).indices.sort().values
        self.logits = drafted[..., self.ids].contiguous()  # [1, K, D]
        self.seed = torch.zeros(1, dtype=torch.int64, device=device)
        self.ones = torch.ones(1, device=device)

    def key(self, number: int) -> dict[str, Tensor]:
        return {"seed": self.seed, "round": self.seed + number % self.draws}


class BuildTree(Trees):
    """A token drawn for each place of the shape, or the best tree of all."""

    op = "build_tree"
    shapes = tuple(
        Branching(N, 49152, 8192, best_first) for best_first in (False, True) for N in (8, 16, 32)
    )

    def __init__(self, shape: Branching, device: torch.device) -> None:
        super().__init__(shape, device)
        self.shape = None if shape.best_first else self.places
        if shape.best_first:
            self.draws = 1

    @cached_property
    def drafts(self) -> list[tuple[Tensor]]:
        return copies(self.logits)

    def load(self, number: int, backend: str) -> Callable[[], Any]:
        (logits,) = self.drafts[number % len(self.drafts)]
        return partial(
            sk.build_tree, logits, self.N, self.ones, shape=self.shape, draft_ids=self.ids,
            **self.key(number), backend=backend,
        )  # fmt: skip

    def result(self, number: int, backend: str) -> tuple[Tensor, ...]:
        tree = self.load(number, backend)()
        return (tree.tokens, tree.parents, tree.rows, tree.chances, *tree.distribution)

    def least_bytes(self) -> float:
        read = sum(int((one[-2] > 0).sum()) for one in self.expected)
        return build_tree_bytes(self.logits[0], read) / self.draws


class VerifyTree(Trees):
    """The rejection rule on nodes that were drawn one after another."""

    op = "verify_tree"
    shapes = tuple(Branching(N, 49152, 8192) for N in (8, 16, 32))

    def __init__(self, shape: Branching, device: torch.device) -> None:
        super().__init__(shape, device)
        self.trees = [
            sk.build_tree(
                self.logits, self.N, shape=self.places, draft_ids=self.ids, **self.key(number)
            )
            for number in range(self.draws)
        ]

    @cached_property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return copies(self.target, self.logits[0])

    def load(self, number: int, backend: str) -> Callable[[], Any]:
        target, pool = self.pairs[number % len(self.pairs)]
        tree = self.trees[number % self.draws]._replace(logits=pool)
        return partial(sk.verify_tree, target, tree, self.ones, **self.key(number), backend=backend)

    def least_bytes(self) -> float:
        total = 0
        for tree, (_, _, path, _) in zip(self.trees, self.expected, strict=True):
            total += verify_tree_bytes(self.target, self.logits[0], tree.parents, path)
        return total / self.draws


class Rollback(NamedTuple):
    batch: int
    tokens: int  # N, maximum number of tokens emitted
    pages: bool = False
    caches: int = 0  # caches in which a tree's path is moved; only with pages

    def __str__(self) -> str:
        parts = [f"B={self.batch} N={self.tokens}"]
        parts += ["pages"] if self.pages else []
        parts += [f"a tree in {self.caches} caches"] if self.caches else []
        return ", ".join(parts)


class Commit(Case):
    """Rows keep 1 to N tokens of a round. In a tree the path is every other node of 2 N nodes."""

    op = "commit"
    shapes = (Rollback(8, 9), Rollback(8, 9, pages=True), Rollback(8, 9, pages=True, caches=60))

    def __init__(self, shape: Rollback, device: torch.device) -> None:
        B, N, paged, count = shape
        random = torch.Generator().manual_seed(0)
        pick = lambda low, high, *size: torch.randint(low, high, size, generator=random).to(device)
        column = torch.arange(N, device=device)
        self.lengths = pick(1, POSITIONS - 2 * N + 1, B)
        self.counts = pick(1, N + 1, B)
        self.emitted = torch.where(column < self.counts[:, None], pick(10, 1000, B, N), -1)
        self.stop_tokens = torch.tensor([2], device=device)  # never emitted here
        self.limit = torch.full_like(self.lengths, 2 * POSITIONS)
        self.finished = torch.zeros_like(self.lengths, dtype=torch.bool)
        self.path = (2 * column).expand(B, N).contiguous() if count else None
        blocks = B * POSITIONS // BLOCK
        self.before: list[Tensor] = []  # copies of what a call changes: pages, caches
        if paged:
            pages = sk.Pages.empty(B, POSITIONS // BLOCK, blocks, BLOCK, device)
            pages.reserve(self.lengths + (2 * N if count else N))
            self.before += pages[:4]
        size = blocks, BLOCK, HEADS, WIDTH
        self.before += [torch.randn(size, generator=random).to(device) for _ in range(count)]
        self.after = [tensor.clone() for tensor in self.before]

    def load(self, number: int, backend: str) -> Callable[[], Any]:
        for tensor, before in zip(self.after, self.before, strict=True):
            tensor.copy_(before)
        return partial(
            sk.commit, self.lengths, self.emitted, stop_tokens=self.stop_tokens, limit=self.limit,
            finished=self.finished, pages=sk.Pages(*self.after[:4], BLOCK) if self.after else None,
            path=self.path, caches=self.after[4:], backend=backend,
        )  # fmt: skip

    def result(self, number: int, backend: str) -> tuple[Tensor, ...]:
        return (*super().result(number, backend), *(tensor.clone() for tensor in self.after))

    def least_bytes(self) -> float:
        _, kept, _, _, *after = self.expected[0]
        dropped = int((after[0] != self.before[0]).sum()) if after else None
        if self.path is None:
            return commit_bytes(kept, len(self.stop_tokens), dropped)
        column = torch.arange(self.path.shape[1], device=kept.device)
        moved = int(((column < kept[:, None]) & (self.path != column)).sum())
        entry = sum(tensor[0, 0].nbytes for tensor in self.before[4:])
        return commit_bytes(kept, len(self.stop_tokens), dropped, moved, entry)


class Rounded(Case):
    """An op whose backends agree within rounding.

    Compared with fp64, its error may be twice that of the same formula in torch's fp32, plus an ulp
    of the result.
    """

    @abstractmethod
    def formula(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        """The result in plain torch."""

    @cached_property
    def bounds(self) -> list[tuple[Tensor, Tensor]]:
        """The exact result, and the allowed root mean square error."""
        pairs = zip(self.formula(torch.float64), self.formula(torch.float32), strict=True)
        return [(exact, 2 * rms(own - exact) + 2.0**-23 * rms(exact)) for exact, own in pairs]

    def fault(self, backend: str) -> str | None:
        have = self.result(0, backend)
        for number, (one, (exact, allowed)) in enumerate(zip(have, self.bounds, strict=True)):
            if not (error := rms(one - exact)) <= allowed:  # also catches NaN
                return (
                    f"{self.op}: result {number} of {backend} has a root mean square error of "
                    f"{error:.3g}; expected at most {allowed:.3g}"
                )
        return None


class Pair(NamedTuple):
    rows: int
    vocab: int
    drafted: int

    def __str__(self) -> str:
        return f"N={self.rows} V={self.vocab} D={self.drafted}"


class RowDivergence(Rounded):
    """Without a gradient."""

    op = "row_divergence"
    shapes = (Pair(64, 49152, 8192), Pair(16, 128256, 128256))

    def __init__(self, shape: Pair, device: torch.device) -> None:
        N, V, D = shape
        random = torch.Generator(device).manual_seed(0)
        draw = partial(torch.randn, generator=random, device=device)
        self.target = 3 * draw(N, V)
        self.ids = None
        if D < V:
            self.ids = torch.randperm(V, generator=random, device=device)[:D].sort().values
        self.draft = (self.target if self.ids is None else self.target[:, self.ids]) + draw(N, D)
        self.temperature = torch.ones(N, device=device)

    @cached_property
    def pairs(self) -> list[tuple[Tensor, Tensor]]:
        return copies(self.target, self.draft)

    def load(self, number: int, backend: str) -> Callable[[], Any]:
        pair = self.pairs[number % len(self.pairs)]
        return partial(sk.row_divergence, *pair, self.ids, self.temperature, backend=backend)

    def formula(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        all_p, log_q = (x.to(dtype).log_softmax(-1) for x in (self.target, self.draft))
        log_p = all_p if self.ids is None else all_p[:, self.ids]
        p, q = log_p.exp(), log_q.exp()
        return sk.RowDivergence(
            (q - p).clamp(min=0).sum(-1),
            (p * (log_p - log_q)).sum(-1),
            (q * (log_q - log_p)).sum(-1),
            -(all_p.exp() * all_p).sum(-1),
            -(q * log_q).sum(-1),
        )

    def least_bytes(self) -> float:
        return row_divergence_bytes(self.target, self.draft, self.ids)


class Product(NamedTuple):
    rows: int
    inputs: int
    outputs: int

    def __str__(self) -> str:
        return f"{self.inputs} to {self.outputs}, {self.rows} row{'s' * (self.rows > 1)}"


class SkinnyLinear(Rounded):
    """The weight is packed for backends that read packed weights, and plain for the others."""

    op = "skinny_linear"
    shapes = tuple(
        Product(rows, *size) for size in ((576, 1536), (1536, 49152)) for rows in (1, 5, 9)
    )

    def __init__(self, shape: Product, device: torch.device) -> None:
        M, K, N = shape
        random = torch.Generator(device).manual_seed(0)
        self.x = torch.randn(M, K, generator=random, device=device)
        self.weight = torch.randn(N, K, generator=random, device=device)

    @cached_property
    def weights(self) -> list[tuple[Tensor]]:
        return copies(self.weight)

    @cached_property
    def packed(self) -> list[tuple[Tensor]]:
        return copies(sk.pack_weight(self.weight).packs)

    def load(self, number: int, backend: str) -> Callable[[], Any]:
        weights = self.packed if backend in PACKED else self.weights
        (weight,) = weights[number % len(weights)]
        given = sk.PackedWeight(weight, len(self.weight)) if backend in PACKED else weight
        return partial(sk.skinny_linear, self.x, given, backend=backend)

    def formula(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        return (F.linear(self.x.to(dtype), self.weight.to(dtype)),)

    def least_bytes(self) -> float:
        return skinny_linear_bytes(self.x, self.weight)


class Cached(NamedTuple):
    rows: int
    queries: int
    entries: int  # of each row before its queries

    def __str__(self) -> str:
        return f"B={self.rows} Q={self.queries}, {self.entries} entries"


class CachedAttention(Rounded):
    """A layer of SmolLM2-135M with a dense cache."""

    op = "cached_attention"
    shapes = (Cached(1, 1, 512), Cached(1, 9, 512), Cached(8, 9, 2048))

    def __init__(self, shape: Cached, device: torch.device) -> None:
        B, Q, entries = shape
        random = torch.Generator(device).manual_seed(0)
        draw = partial(torch.randn, generator=random, device=device)
        self.query = draw(B, Q, GROUP * HEADS, WIDTH)
        self.keys, self.values = draw(2, B, HEADS, entries + Q, WIDTH)
        self.lengths = torch.full((B,), entries, device=device)

    @cached_property
    def caches(self) -> list[tuple[Tensor, Tensor]]:
        return copies(self.keys, self.values)

    def load(self, number: int, backend: str) -> Callable[[], Any]:
        cache = self.caches[number % len(self.caches)]
        return partial(sk.cached_attention, self.query, *cache, self.lengths, backend=backend)

    def formula(self, dtype: torch.dtype) -> tuple[Tensor, ...]:
        Q, S = self.query.shape[1], self.keys.shape[2]
        seen = torch.ones(Q, S, dtype=torch.bool, device=self.query.device).tril(S - Q)
        query, keys, values = (x.to(dtype) for x in (self.query, self.keys, self.values))
        result = F.scaled_dot_product_attention(
            query.transpose(1, 2), keys, values, seen, enable_gqa=True
        )
        return (result.transpose(1, 2),)

    def least_bytes(self) -> float:
        return cached_attention_bytes(self.query, self.keys, self.values)


KINDS: tuple[type[Case], ...] = (
    RowDistribution, Sample, DenoiseStep, Verify, BuildTree, VerifyTree, Commit, RowDivergence,
    SkinnyLinear, CachedAttention,
)  # fmt: skip
CASES = [(kind, shape) for kind in KINDS for shape in kind.shapes]


@cache
def round_logits(shape: Shape, device: torch.device) -> tuple[Tensor, Tensor]:
    """The target's f32 [B, K + 1, V] and the draft's [B K, V], as described in inputs.py."""
    target, drafted = make_logits(shape, torch.Generator(device).manual_seed(0))
    return target, drafted.flatten(0, 1)


def copies(*tensors: Tensor, room: int | None = None) -> list[Any]:
    """Copies of a tuple of tensors, as many as fit into `room` bytes, but at least one.

    room: None is COLD.
    """
    count = max(1, (COLD if room is None else room) // sum(tensor.nbytes for tensor in tensors))
    return [tuple(tensor.clone() for tensor in tensors) for _ in range(count)]


def rms(x: Tensor) -> Tensor:
    return x.double().square().mean().sqrt()
