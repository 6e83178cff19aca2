"""Trees of drafted tokens: the reference's bits, the best tree, exact draws, corrections."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from specdiff_kernels import (
    BackendError,
    Draft,
    PackedWeight,
    Reveal,
    Status,
    Tree,
    build_tree,
    denoise_step,
    pack_weight,
    row_distribution,
    use_backend,
    verify_tree,
)
from specdiff_kernels.corrections import Correction
from specdiff_kernels.ops.draw_in_order import draw_in_order
from specdiff_kernels.reference.numerics import weights
from tests.enumeration import probabilities
from tests.operators import Operators

from .helpers import assert_named, assert_same, each_mistake, i64
from .products import rms
from .test_draw_in_order import values_of
from .trees import Dice, implementation, on_each_isa, threads

__all__ = ["implementation"]
CASES = 24  # of each size
INF, NAN = float("inf"), float("nan")
on_all = pytest.mark.usefixtures("implementation")


def assert_equal(tree: Tree, other: Tree) -> None:
    for name in ("tokens", "parents", "rows", "chances"):
        x, y = getattr(tree, name), getattr(other, name)
        assert torch.equal(x, y), f"{name}: {x.tolist()} != {y.tolist()}"
    assert tree.distribution is not None and other.distribution is not None
    assert_same(tree.distribution, other.distribution)


def probabilities_of(row: Tensor, *sampling: Any) -> Tensor:
    """Of each column, f64, by the weights that the ops draw by."""
    distribution = row_distribution(row[None], *sampling, backend="reference")
    e = weights(row[None], distribution)[0].double()
    return e * (1.0 / distribution.total.double())


# --- the reference's bits ------------------------------------------------------------------------


def a_call(seed: int, V: int) -> tuple[tuple[Tensor, int], dict[str, Any]]:
    """Arguments of `build_tree`."""
    dice = Dice(seed)
    B, K, N = 1 + dice.below(3), dice.pick(0, 1, 2, 4, 6), dice.pick(0, 1, 4, 9, 13)
    logits = dice.normal(B, max(K, 1), V) * dice.pick(0.0, 1.0, 3.0, 9.0)
    logits = dice.logits(logits)[:, :K]
    if K and dice.chance(0.2):
        logits[dice.below(B), dice.below(K), dice.below(V)] = dice.pick(NAN, INF)
    options: dict[str, Any] = dice.sampling(B, V)
    if dice.chance(0.7):
        options["shape"] = i64(*dice.parents(N))
        options["replacement"] = dice.chance(0.4)
        if dice.chance(0.4):
            options["words"] = dice.words(B, N)
        else:
            options |= {"seed": dice.words(B), "round": torch.arange(B)}
    if dice.chance(0.3):
        options["draft_ids"] = torch.randperm(V + 9, generator=dice.generator)[:V].sort().values
    if dice.chance(0.4):
        options["lengths"] = torch.randint(-1, K + 2, (B,), generator=dice.generator)
    return (logits, N), options


def of_row(b: int, options: dict[str, Any]) -> dict[str, Any]:
    shared = ("shape", "draft_ids")
    return {name: x[b : b + 1] if isinstance(x, Tensor) and name not in shared else x
            for name, x in options.items()}  # fmt: skip


@pytest.mark.parametrize("V", [1, 2, 3, 7, 1500])
def test_same_bits(V):
    """On each instruction set; and of a sequence alone as in its batch."""
    nodes = missing = deep = 0
    for seed in range(CASES):
        (logits, N), options = a_call(1000 * V + seed, V)
        with use_backend("reference"):
            expected = build_tree(logits, N, **options)
        for tree in on_each_isa(lambda x=logits, n=N, o=options: build_tree(x, n, **o)):
            assert_equal(tree, expected)
        K = logits.shape[1]
        for b in range(len(logits)):
            alone = build_tree(logits[b : b + 1], N, **of_row(b, options))
            for name in ("tokens", "parents", "chances"):
                assert torch.equal(getattr(alone, name)[0], getattr(expected, name)[b])
            there = expected.rows[b] >= 0
            assert torch.equal(alone.rows[0] + b * K * there, expected.rows[b])
        nodes += int((expected.tokens >= 0).sum())
        missing += int((expected.tokens < 0).sum())
        deep += int(N > 1 and (expected.depths * (expected.tokens >= 0)).max() > 1)
    assert nodes > CASES and missing and deep


def test_threads_do_not_matter():
    dice = Dice(1)
    logits = dice.normal(9, 3, 6000) * 3
    ways: list[dict[str, Any]] = [{"top_p": 0.9}, {"shape": i64(-1, -1, 0, 0, 1, 2), "seed": 1,
                                                   "round": 0}]  # fmt: skip
    correction, anchor = a_correction(dice, 9, 3, 6000)
    ways += [way | {"correction": correction, "anchor": anchor} for way in ways]
    for way, B in product(ways, (1, 9)):
        if "correction" in way:
            few = correction._replace(inner=correction.inner[:B])
            way = way | {"correction": few, "anchor": anchor[:B]}
        trees = []
        for number in (1, 2):
            with threads(number):
                trees.append(build_tree(logits[:B], 6, **way))
        visited = trees[0].distribution.total > 0
        assert torch.equal(trees[0].logits[visited], trees[1].logits[visited])
        assert_equal(*trees)


# --- best first ----------------------------------------------------------------------------------


def all_paths(logits: Tensor, length: int, *sampling: Any) -> dict[tuple[int, ...], float]:
    """The chance of each sequence of tokens that has one, [K, V]."""
    rows = [probabilities_of(row, *sampling).tolist() for row in logits[:length]]
    found = {}
    for depth in range(1, length + 1):
        for path in product(range(logits.shape[1]), repeat=depth):
            chance = 1.0
            for row, token in zip(rows, path, strict=False):
                chance *= row[token]
            if chance > 0:
                found[path] = chance
    return found


def paths_of(tree: Tree, b: int = 0) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for token, parent in zip(tree.tokens[b].tolist(), tree.parents[b].tolist(), strict=True):
        if token < 0:
            break
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    return paths


@on_all
@pytest.mark.parametrize("sampling", [(), (0.5,), (1.0, 2), (1.0, None, 0.8), (0.0,)], ids=str)
def test_no_tree_of_as_many_nodes_has_a_greater_chance(sampling):
    """Every prefix of a path has at least its chance, so the best n paths are a tree of their
    own."""
    dice = Dice(2)
    for V, K in ((2, 4), (3, 3), (5, 2), (1, 3)):
        logits = dice.normal(1, K, V) * 2
        for length in range(K + 1):
            every = all_paths(logits[0], length, *sampling)
            best = sorted(every.values(), reverse=True)
            N = len(every) + 2
            tree = build_tree(logits, N, *sampling, lengths=i64(length))
            paths = paths_of(tree)
            assert len(paths) == len(set(paths)) == len(every)  # and nothing else
            assert (tree.tokens[0, len(paths) :] == -1).all()
            assert (tree.chances[0, len(paths) :] == 0).all()
            assert (tree.rows == -1).all()
            chances = tree.chances[0, : len(paths)].tolist()
            assert chances == pytest.approx(best, rel=1e-12)
            assert chances == pytest.approx([every[path] for path in paths], rel=1e-12)
            assert chances == sorted(chances, reverse=True)


@on_all
def test_smaller_trees_are_what_larger_ones_begin_with():
    logits = Dice(3).normal(2, 4, 30) * 2
    whole = build_tree(logits, 20, lengths=i64(4, 2))
    for N in (0, 1, 5, 19):
        tree = build_tree(logits, N, lengths=i64(4, 2))
        for name in ("tokens", "parents", "chances"):
            assert torch.equal(getattr(tree, name), getattr(whole, name)[:, :N])


@on_all
def test_of_equal_chances_the_lower_parent_and_column_come_first():
    """Four equal tokens at each place: the root's, then their children, by parent and column."""
    tree = build_tree(torch.zeros(1, 2, 4), 12)
    assert tree.tokens[0].tolist() == [0, 1, 2, 3] * 3
    assert tree.parents[0].tolist() == [-1] * 4 + [0] * 4 + [1] * 4
    sure = torch.tensor([[[5.0, 5.0], [0.0, -INF]]])  # a child as likely as its parent, and its
    tree = build_tree(sure, 9)  # sibling: the root goes before node 0
    assert tree.tokens[0].tolist() == [0, 1, 0, 0] + [-1] * 5
    assert tree.parents[0].tolist() == [-1, -1, 0, 1] + [-1] * 5


@on_all
def test_greedy_rows_are_one_path():
    dice = Dice(4)
    logits = dice.normal(2, 4, 40)
    tree = build_tree(logits, 7, torch.tensor([0.0, 1.0]))
    assert tree.tokens[0].tolist() == logits[0].argmax(-1).tolist() + [-1] * 3
    assert tree.parents[0].tolist() == [-1, 0, 1, 2] + [-1] * 3
    assert tree.chances[0].tolist() == [1.0] * 4 + [0.0] * 3
    assert (tree.tokens[1] >= 0).all()


@on_all
def test_a_token_that_is_cut_is_in_no_tree():
    dice = Dice(5)
    logits = dice.normal(2, 3, 20)
    for options in ({"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.4}):
        rows = row_distribution(logits.flatten(0, 1), **options)
        kept = (weights(logits.flatten(0, 1), rows) > 0).view(2, 3, 20)
        count = int(kept[0, 0].sum())
        for shape in (None, i64(*[-1] * (count + 2), 0, 0)):
            tree = build_tree(logits, count + 4, shape=shape, seed=0, round=0, **options)
            for b in range(2):
                there = tree.tokens[b] >= 0
                depth, tokens = tree.depths[b][there] - 1, tree.tokens[b][there]
                assert kept[b, depth, tokens].all()
            if shape is not None:  # the root has no more children than tokens are kept
                assert (tree.tokens[0, :count] >= 0).all()
                assert tree.tokens[0, count : count + 2].tolist() == [-1, -1]


@on_all
def test_where_a_row_has_no_distribution_nothing_grows():
    logits = torch.zeros(2, 3, 4)
    logits[0, 1, 2] = NAN
    shape = i64(-1, 0, 1, 0, -1)
    for options in ({}, {"shape": shape, "seed": 0, "round": 0}):
        tree = build_tree(logits, 5, **options)
        assert tree.distribution.status.tolist()[:2] == [0, Status.NAN]
        assert (tree.depths[0][tree.tokens[0] >= 0] == 1).all()
        assert (tree.tokens[1] >= 0).all()
    assert tree.tokens[0, 1:4].tolist() == [-1] * 3 and (tree.tokens[0, [0, 4]] >= 0).all()
    unread = build_tree(logits, 3)  # four tokens more likely than what comes behind
    assert (unread.tokens >= 0).all() and unread.distribution.status[2] == 0
    bad = build_tree(logits, 3, torch.tensor([1.0, -1.0]))
    assert (bad.tokens[1] == -1).all() and bad.distribution.status[3] == Status.PARAMETER


def test_a_chance_below_all_numbers_is_one_yet():
    """A likely token behind which nothing may come, and an unlikely one, 26 times."""
    K = 26
    logits = torch.tensor([[0.0, -30.0]]).expand(1, K, 2)
    codes = torch.tensor([[NAN], [0.0]])
    trees = []
    for backend in ("reference", "cpp"):
        correction = Correction(codes, None, torch.zeros(2, 1))
        trees.append(build_tree(logits, 2 * K, correction=correction, anchor=i64(1),
                                backend=backend))  # fmt: skip
    assert_equal(*trees)
    assert (trees[0].tokens >= 0).all() and trees[0].chances[0, -1] == 0


# --- draws ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("replacement", [False, True])
def test_each_place_draws_from_what_is_left(replacement):
    """The first place by the row's own probabilities, its sibling by those of the rest."""
    dice, V = Dice(6), 5
    logits = dice.normal(1, 2, V)
    p = probabilities_of(logits[0, 0])
    shape = i64(-1, -1, 1)

    def drawn(place: int, *others: int):
        def tokens(words: Tensor) -> Tensor:
            columns = torch.tensor(others).expand(len(words), -1).clone()
            columns = torch.cat((columns[:, :place], words[:, None], columns[:, place:]), 1)
            grown = build_tree(logits.expand(len(words), -1, -1), 3, shape=shape,
                               replacement=replacement, words=columns)  # fmt: skip
            return grown.tokens[:, place]

        return [float(x) for x in probabilities(tokens, 1, V)[0]]

    assert drawn(0, 0, 0) == pytest.approx(p.tolist(), abs=1e-14)
    left = p.clone()
    if not replacement:
        left[0] = 0  # which word 0 takes
    assert drawn(1, 0, 0) == pytest.approx((left / left.sum()).tolist(), abs=1e-14)
    assert drawn(2, 0, 0) == pytest.approx(probabilities_of(logits[0, 1]).tolist(), abs=1e-14)
    tree = build_tree(logits, 3, shape=shape, replacement=replacement, words=i64(0, 0, 0)[None])
    second = 0 if replacement else 1
    assert tree.tokens[0].tolist() == [0, second, 0] and tree.rows[0].tolist() == [0, 0, 1]
    chance = float(left[second] / left.sum())
    chances = [float(p[0]), chance, chance * float(probabilities_of(logits[0, 1])[0])]
    assert tree.chances[0].tolist() == pytest.approx(chances, abs=1e-14)
    assert tree.replacement is replacement


@on_all
def test_siblings_are_distinct_until_nothing_is_left():
    """Nothing grows behind a place without a token."""
    dice = Dice(7)
    logits = dice.normal(20, 2, 4)
    shape = i64(-1, -1, -1, -1, -1, 3, 4, 5)
    tree = build_tree(logits, 8, shape=shape, seed=3, round=0)
    assert tree.tokens[:, :4].sort(1).values.tolist() == [[0, 1, 2, 3]] * 20
    assert (tree.tokens[:, 4] == -1).all() and (tree.tokens[:, 6] == -1).all()
    assert (tree.tokens[:, 5] >= 0).all() and (tree.tokens[:, 7] == -1).all()  # too deep
    absent = tree.tokens < 0
    assert (tree.rows[absent] == -1).all() and (tree.parents[absent] == -1).all()
    assert (tree.chances[absent] == 0).all()
    again = build_tree(logits, 8, shape=shape, replacement=True, seed=3, round=0)
    assert (again.tokens[:, 4] >= 0).all()
    assert any(len(set(row[:5])) < 4 for row in again.tokens.tolist())
    greedy = build_tree(logits, 8, 0.0, shape=shape)
    assert torch.equal(greedy.tokens[:, 0], logits[:, 0].argmax(-1))
    assert (greedy.tokens[:, 1:] == -1).all() and (greedy.rows[:, 0] >= 0).all()


@on_all
def test_a_chain_is_the_draft_of_one_step():
    dice, B, K, V = Dice(8), 3, 5, 40
    logits, keys = dice.normal(B, K, V), {"seed": i64(4, 5, 6), "round": i64(0, 1, 9)}
    for sampling in ((), (0.6, 9, 0.9, 0.01), (torch.tensor([0.5, 1.0, 2.0]),)):
        lengths = i64(5, 3, 0)
        draft = Draft.masked(B, K, logits.flatten(0, 1), lengths=lengths)
        want = denoise_step(draft, Reveal.all(), 0, *sampling, **keys)
        tree = build_tree(logits, K, *sampling, shape=torch.arange(-1, K - 1), lengths=lengths,
                          **keys)  # fmt: skip
        assert torch.equal(tree.tokens, want.tokens)
        assert torch.equal(tree.rows, want.rows)
        read = tree.rows[tree.rows >= 0]
        for field, other in zip(tree.distribution, want.distribution, strict=True):
            assert torch.equal(field[read], other[read])


@on_all
def test_what_is_drawn_can_be_judged():
    """A drafter that is the target has its tree accepted down to a leaf, by whatever words."""
    dice, B, V = Dice(9), 20, 30
    rows = dice.normal(B, 3, V)
    tree = build_tree(rows, 5, shape=i64(-1, 0, -1, 2, 1), seed=1, round=2)
    at = torch.stack((torch.zeros(B).long(), *(tree.depths.clamp(max=2).T)), 1)
    target = rows.gather(1, at[..., None].expand(-1, -1, V))
    result = verify_tree(target, tree, words=dice.words(B, 6))
    assert (result.status == 0).all() and result.accepted.tolist() == [3] * B
    assert result.path[:, 1:4].tolist() == [[1, 2, 5]] * B


@on_all
def test_reduced_vocabularies_have_the_targets_ids():
    dice = Dice(10)
    logits, ids = dice.normal(2, 3, 8), i64(1, 4, 5, 9, 20, 21, 30, 31)
    for options in ({}, {"shape": i64(-1, -1, 0, 2), "seed": 1, "round": 1}):
        plain, named = (build_tree(logits, 4, draft_ids=x, **options) for x in (None, ids))
        assert torch.equal(named.tokens, ids[plain.tokens]) and named.draft_ids is ids
        assert torch.equal(named.parents, plain.parents)


# --- corrections ---------------------------------------------------------------------------------

RANK = 20


def a_correction(
    dice: Dice, B: int, K: int, Vd: int, vocabulary: int | None = None, form: str = "plain"
) -> tuple[Correction, Tensor]:
    """One that matters, and the tokens at the roots."""
    V = Vd if vocabulary is None else vocabulary
    weight: Any = 2 * dice.normal(Vd, RANK)
    if form in ("f32", "bf16"):
        weight = pack_weight(weight, {"f32": torch.float32, "bf16": torch.bfloat16}[form])
    elif form == "strided":
        weight = (2 * dice.normal(Vd, RANK + 3))[:, :RANK]
    elif form == "turned":
        weight = (2 * dice.normal(RANK, Vd)).T
    inner = None if form == "no inner" else dice.normal(B, K, RANK)
    anchor = torch.randint(V, (B,), generator=dice.generator)
    return Correction(dice.normal(V, RANK), inner, weight), anchor


def corrected(logits: Tensor, correction: Correction, b: int, depth: int, token: int, dtype):
    """Logits behind a token, as they should be."""
    code = correction.codes[token].to(dtype)
    if correction.inner is not None:
        code = code + correction.inner[b, depth].to(dtype)
    return logits[b, depth].to(dtype) + values_of(correction.weight).to(dtype) @ F.silu(code)


def visited(tree: Tree, N: int, b: int, length: int) -> Iterator[tuple[int, int, int | None]]:
    """Nodes behind which something may come: (number, depth, number of its parent or None)."""
    yield -1, 0, None
    for n in range(N):
        depth = int(tree.depths[b, n])
        if tree.tokens[b, n] >= 0 and depth < length:
            yield n, depth, int(tree.parents[b, n])


@on_all
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("form", ["plain", "f32", "bf16", "no inner", "strided", "turned", "ids"])
def test_corrected_rows_and_the_tree_that_is_made_of_them(form, sampled):
    """Rows of the pool within rounding; and given these the tree of the specification."""
    dice, B, K, N, Vd = Dice(11), 2, 3, 7, 37
    ids = torch.arange(0, 3 * Vd, 3) if form == "ids" else None
    logits = dice.normal(B, K, Vd)
    correction, anchor = a_correction(dice, B, K, Vd, 3 * Vd if form == "ids" else None, form)
    lengths, sampling = i64(3, 2), (torch.tensor([0.8, 1.0]), i64(0, 9))
    words, shape = dice.words(B, N), i64(-1, -1, 0, 0, 1, 2, 2)
    before = logits.clone()
    tree = build_tree(logits, N, *sampling, shape=shape if sampled else None, words=words,
                      correction=correction, anchor=anchor, draft_ids=ids,
                      lengths=lengths)  # fmt: skip
    assert torch.equal(logits, before)
    assert tree.logits.shape == (B * (N + 1), Vd)
    errors, bounds = [], []
    for b in range(B):
        rows: dict[int, Tensor] = {}
        for n, depth, _ in visited(tree, N, b, int(lengths[b])):
            children = sampled and n in shape.tolist()
            if tree.distribution.total[b * (N + 1) + n + 1] == 0:  # a leaf, which was not read
                assert not children
                continue
            token = int(anchor[b] if n < 0 else tree.tokens[b, n])
            exact = corrected(logits, correction, b, depth, token, torch.float64)
            single = corrected(logits, correction, b, depth, token, torch.float32)
            rows[n] = tree.logits[b * (N + 1) + n + 1]
            errors.append(rms(rows[n] - exact))
            bounds.append(2 * rms(single - exact) + 2.0**-23 * rms(exact))
        heat, top_k = float(sampling[0][b]), int(sampling[1][b])
        chances = {n: probabilities_of(row, heat, top_k) for n, row in rows.items()}
        for n, row in rows.items():
            at = b * (N + 1) + n + 1
            own = row_distribution(row[None], heat, top_k)
            assert all(x[at] == y[0] for x, y in zip(tree.distribution, own, strict=True))
        if sampled:
            expect_draws(tree, b, shape.tolist(), rows, (heat, top_k), words, ids)
        else:
            expect_best_first(tree, b, chances, int(lengths[b]), ids)
    assert len(errors) >= 6
    assert all(error <= bound for error, bound in zip(errors, bounds, strict=True))


def expect_best_first(
    tree: Tree, b: int, chances: dict[int, Tensor], length: int, ids: Tensor | None
) -> None:
    """Each node is the likeliest of all that might be added, given those before it."""
    N = tree.tokens.shape[1]
    reach, depth = {-1: 1.0}, {-1: 0}
    taken: set[tuple[int, int]] = set()
    for n in range(N):
        options = {
            (parent, column): reach[parent] * chance
            for parent in reach if depth[parent] < length
            for column, chance in enumerate(chances[parent].tolist())
            if chance > 0 and (parent, column) not in taken
        }  # fmt: skip
        parent, token = int(tree.parents[b, n]), int(tree.tokens[b, n])
        column = token if ids is None else int((ids == token).nonzero())
        assert options[parent, column] == max(options.values())
        assert tree.chances[b, n] == options[parent, column] and tree.rows[b, n] == -1
        taken.add((parent, column))
        reach[n], depth[n] = options[parent, column], depth[parent] + 1


def expect_draws(
    tree: Tree,
    b: int,
    shape: list[int],
    rows: dict[int, Tensor],
    sampling: tuple,
    words: Tensor,
    ids: Tensor | None,
) -> None:
    """Each token is what `sample` draws from its row without the siblings' tokens.

    They keep no weight by -inf, which does not change the others' as long as the row's largest
    logit stays.
    """
    N = len(shape)
    for n, parent in enumerate(shape):
        if parent not in rows:
            assert tree.tokens[b, n] == -1
            continue
        at = b * (N + 1) + parent + 1
        assert tree.rows[b, n] == at and tree.parents[b, n] == parent
        row = rows[parent][None]
        distribution = row_distribution(row, *sampling)
        e = weights(row, distribution)
        for s in range(n):
            if shape[s] == parent:
                e[0, int((names(ids, row) == tree.tokens[b, s]).nonzero())] = 0
        word = int(words[b, n]) % 2**64
        column = int((e.cumsum(1) <= word * int(e.sum()) // 2**64).sum())
        assert names(ids, row)[column] == tree.tokens[b, n]


def names(ids: Tensor | None, row: Tensor) -> Tensor:
    return torch.arange(row.shape[1]) if ids is None else ids


@on_all
def test_a_corrected_chain_is_drawn_as_draw_in_order_does():
    """By explicit words, as a draft's keys have the step in them."""
    dice, B, K, V = Dice(12), 3, 4, 30
    logits = dice.normal(B, K, V)
    correction, anchor = a_correction(dice, B, K, V)
    words = dice.words(B, K)
    pairs = torch.stack((torch.zeros_like(words), words), 2)
    for sampling in ((), (0.5, 9), (torch.tensor([0.0, 1.0, 0.7]),)):
        draft = Draft.masked(B, K, logits.flatten(0, 1).clone())
        want = draw_in_order(draft, correction, anchor, 0, K, *sampling, words=pairs)
        have = build_tree(logits, K, *sampling, shape=torch.arange(-1, K - 1), words=words,
                          correction=correction, anchor=anchor)  # fmt: skip
        assert torch.equal(have.tokens, want.tokens)
        rows = have.logits.view(B, K + 1, V)[:, :K]
        torch.testing.assert_close(rows, want.logits.view(B, K, V), rtol=1e-5, atol=1e-4)
        plain = build_tree(logits, K, *sampling, shape=torch.arange(-1, K - 1), words=words)
        assert not torch.equal(plain.tokens, have.tokens)


@on_all
def test_corrections_that_do_not_lie_side_by_side():
    """Slices and transposes are what their copies are."""
    dice, B, K, V = Dice(13), 2, 3, 30
    logits, anchor = dice.normal(B, K, V), i64(3, 7)
    strided = Correction(dice.normal(RANK, V).T, dice.normal(B, K + 2, RANK)[:, 1:-1],
                         dice.normal(V, 2 * RANK)[:, ::2])  # fmt: skip
    dense = Correction(*(x.contiguous() for x in strided))
    wide = torch.full((B, K, V + 5), NAN)
    wide[..., 2:-3] = logits
    trees = [build_tree(*call, 6, correction=correction, anchor=i64(3, 9, 7)[::2])
             for correction, call in ((dense, [logits]), (strided, [wide[..., 2:-3]]))]  # fmt: skip
    assert_equal(*trees)
    assert torch.equal(trees[0].tokens, build_tree(
        logits, 6, correction=dense, anchor=anchor).tokens)  # fmt: skip


# --- forms of a call -----------------------------------------------------------------------------


@on_all
@pytest.mark.parametrize("with_correction", [False, True])
def test_who_looks_on_gets_the_same(with_correction):
    """Under a mode, and where gradients are on; logits that learn give a tree without one."""
    dice, B, K, V = Dice(14), 2, 3, 12
    logits = dice.normal(B, K, V)
    options: dict[str, Any] = {"shape": i64(-1, -1, 0, 2), "seed": 1, "round": 1}
    if with_correction:
        correction, anchor = a_correction(dice, B, K, V)
        options |= {"correction": correction, "anchor": anchor}
    expected = build_tree(logits, 4, **options)
    with Operators() as called:
        watched = build_tree(logits, 4, **options)
    assert ("specdiff.build_tree.default" in called.names) is not with_correction
    assert_equal(watched, expected)
    if with_correction:
        options["correction"] = Correction(*(x.clone().requires_grad_() for x in correction))
    learning = build_tree(logits.clone().requires_grad_(), 4, **options)
    assert_equal(learning, expected)
    assert not any(x.requires_grad for x in (*learning[:3], learning.chances,
                                             *learning.distribution))  # fmt: skip
    assert not (with_correction and learning.logits.requires_grad)


# --- mistakes ------------------------------------------------------------------------------------

B, K, V = 2, 3, 9
KEY = {"seed": 7, "round": 0}
POOL = torch.zeros(B * K, V)
CORRECTION = Correction(torch.zeros(V, 4), torch.zeros(B, K, 4), torch.zeros(V, 4))


def growing(**change: Any) -> Callable[[], Any]:
    return lambda: build_tree(**{"logits": POOL.view(B, K, V), "N": 4} | change)


def correcting(**change: Any) -> Callable[[], Any]:
    return growing(correction=CORRECTION._replace(**change), anchor=i64(0, 0))


MISTAKES: dict[type[Exception], dict[str, Callable[[], Any]]] = {
    ValueError: {
        "logits: expected shape [B, K, Vd], got [6, 9]": growing(logits=POOL),
        "shape: expected shape [N=4], got [3]": growing(shape=i64(-1, 0, 0), **KEY),
        "lengths: expected shape [B=2], got [3]": growing(lengths=i64(1, 1, 1)),
        "words: expected shape [2, 4], got [2, 5]": growing(
            shape=i64(-1, -1, -1, -1), words=torch.zeros(B, 5).long()
        ),
        "anchor: expected shape [B=2], got [1]": growing(correction=CORRECTION, anchor=i64(0)),
        "correction.codes: expected shape [V, r], got [9]": correcting(codes=torch.zeros(V)),
        "correction.inner: expected shape [B=2, positions=3, r=4], got [2, 2, 4]": correcting(
            inner=torch.zeros(B, 2, 4)
        ),
        "correction.weight.packs: expected shape [packs=1, r=4, 16], got [1, 4, 8]": correcting(
            weight=PackedWeight(torch.zeros(1, 4, 8), V)
        ),
        "N: expected an integer >= 0, got -1": growing(N=-1),
        "N: expected an integer >= 0, got 2.0": growing(N=2.0),
        "shape: expected the parent of place 2 to be -1 or a place before it, got 2": growing(
            shape=i64(-1, 0, 2, 0), **KEY
        ),
        "shape: expected the parent of place 1 to be -1 or a place before it, got -2": growing(
            shape=i64(-1, -2, 0, 0), **KEY
        ),
        "seed: expected an integer, or a tensor [2] int64, got None; pass seed and round, or "
        "words": growing(shape=i64(-1, 0, 1, 2)),
        "draft_ids: expected strictly increasing ids in [0, 2147483648), got others": growing(
            draft_ids=torch.zeros(V).long()
        ),
        "anchor: expected the token at each root with a correction, got None": growing(
            correction=CORRECTION
        ),
        "anchor: expected tokens in [0, 9), got 0 to 9": growing(
            correction=CORRECTION, anchor=i64(0, 9)
        ),
        "anchor: expected tokens in [0, 9), got -1 to 0": growing(
            correction=CORRECTION, anchor=i64(-1, 0)
        ),
        "correction.codes: expected a row for each of 9 tokens, got 8": correcting(
            codes=torch.zeros(8, 4)
        ),
        "correction.weight: expected [Vd, r] = [9, 4], got [8, 4]": correcting(
            weight=torch.zeros(8, 4)
        ),
        "draft_ids: expected strictly increasing ids in [0, 9), got others": growing(
            correction=CORRECTION, anchor=i64(0, 0), draft_ids=torch.arange(V) + 1
        ),
    },
    TypeError: {
        "logits: expected a tensor, got list": growing(logits=POOL.tolist()),
        "logits: expected dtype float32, bfloat16, float16, got float64": growing(
            logits=POOL.view(B, K, V).double()
        ),
        "logits: expected dtype float32, got bfloat16; convert with": growing(
            logits=POOL.view(B, K, V).bfloat16(), correction=CORRECTION, anchor=i64(0, 0)
        ),
        "shape: expected a tensor, got list; convert": growing(shape=[-1, 0, 0, 0], **KEY),
        "lengths: expected a tensor, got int": growing(lengths=3),
        "anchor: expected dtype int64, got float32": growing(
            correction=CORRECTION, anchor=torch.zeros(B)
        ),
        "correction: expected a Correction, got int": growing(correction=1, anchor=i64(0, 0)),
        "correction.codes: expected dtype float32, got bfloat16; convert": correcting(
            codes=torch.zeros(V, 4).bfloat16()
        ),
        "correction.inner: expected dtype float32, got float64": correcting(
            inner=torch.zeros(B, K, 4).double()
        ),
        "correction.weight: expected dtype float32, bfloat16, got float16": correcting(
            weight=torch.zeros(V, 4).half()
        ),
    },
    BackendError: {
        "backend is 'gpu'; expected one of cpp,": growing(backend="gpu"),
    },
}


@pytest.mark.parametrize(("error", "message", "call"), each_mistake(MISTAKES))
def test_the_message_names_the_argument_and_what_was_expected(error, message, call):
    assert_named(error, message, call)
