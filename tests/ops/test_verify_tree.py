"""Verification of trees: the reference's bits, `verify`'s on chains, exact laws, faults."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from itertools import permutations, product
from typing import Any

import pytest
import torch
from torch import Tensor

from specdiff_kernels import (
    BackendError,
    DistributionError,
    Draft,
    Status,
    Tree,
    VerifiedTree,
    check_status,
    row_distribution,
    sample,
    use_backend,
    verify,
    verify_tree,
)
from specdiff_kernels.inputs import TREE_RULES
from specdiff_kernels.reference.numerics import weights
from tests.enumeration import WORDS, first_word, patterns, probabilities
from tests.operators import Operators

from .helpers import LAST_WORD, assert_named, assert_same, each_mistake, i64
from .trees import Dice, a_case, a_key, implementation, on_each_isa, threads

__all__ = ["implementation"]
CASES = 20  # of each size and rule
NAN, INF = float("nan"), float("inf")
on_all = pytest.mark.usefixtures("implementation")


def tree_of(tokens: list[int], parents: list[int], pool: Tensor | None = None, **fields) -> Tree:
    """A single sequence's tree; with a pool, each node is recorded with row parent + 1."""
    tree = Tree.guesses(i64(*tokens)[None], i64(*parents)[None])
    if pool is not None:
        fields = {"logits": pool, "distribution": row_distribution(pool),
                  "rows": tree.parents + 1} | fields  # fmt: skip
    return tree._replace(**fields)


def repeated(tree: Tree, n: int) -> Tree:
    names = ("tokens", "parents", "rows")
    return tree._replace(**{name: getattr(tree, name).expand(n, -1) for name in names})


def lists(verified: VerifiedTree) -> list:
    return [field.tolist() for field in verified]


# --- the reference's bits ------------------------------------------------------------------------


@pytest.mark.parametrize("rule", TREE_RULES)
@pytest.mark.parametrize("V", [1, 2, 3, 7, 1500])
def test_same_bits(V, rule):
    """On each instruction set; and of a sequence alone as in its batch."""
    seen: Counter[str] = Counter()
    for seed in range(CASES):
        case = a_case(1000 * V + seed, V, rule, damaged=seed % 4 == 3)
        with use_backend("reference"):
            expected = case.verified()
        for result in on_each_isa(case.verified):
            assert_same(result, expected)
        alone = [case.row(b).verified() for b in range(len(case.target))]
        joined = VerifiedTree(*(torch.cat(field) for field in zip(*alone, strict=True)))
        assert_same(joined, expected)
        seen.update(Status(int(x)).name for x in expected.status)
        seen["deep"] += int((expected.accepted > 1).sum())
    assert seen["OK"] > CASES / 2 and seen["deep"]  # it is worth the while


@pytest.mark.parametrize("V", [4, 1200])
def test_same_odds_to_the_unit(V):
    """Words at which a sibling is no longer accepted, or another token ends the round: there the
    reference changes its mind too, and not one word before."""
    nodes, seen = 6, 0
    for seed in range(12):
        dice = Dice(seed)
        target = dice.normal(1, nodes + 1, V)
        pool = target[0, :1] + dice.normal(2, V)
        pool[:, 1024:] += 2  # as many tokens of the second tile as of the first
        replacement = seed % 3 == 0
        tokens = torch.multinomial(pool[0].softmax(-1), nodes if nodes < V else 3, replacement,
                                   generator=dice.generator).tolist()  # fmt: skip
        N = len(tokens)
        rows = i64(*(dice.pick(0, 0, 1, -1) for _ in tokens))[None]
        tree = tree_of(tokens, [-1] * N, pool, rows=rows, replacement=replacement)
        sampling = {"top_k": 900} if V > 900 and seed % 2 else {}
        ends = [V * share // 4 for share in (1, 2, 3)]

        def changed(
            words: Tensor, N=N, tree=tree, ends=ends, target=target, sampling=sampling
        ) -> Tensor:
            """Of a question each, first about nodes, then about the token that ends the round."""
            count = N + len(ends)
            columns = torch.full((count, N + 1), LAST_WORD)
            asked = torch.arange(count)
            columns[asked, asked.clamp(max=N)] = words
            result = verify_tree(target[:, : N + 1].expand(count, -1, -1), repeated(tree, count),
                                 words=columns, **sampling)  # fmt: skip
            refused = result.path[:N, 1] != torch.arange(N) + 1
            return torch.cat((refused, result.emitted[N:, 0] >= torch.tensor(ends)))

        found = list(on_each_isa(lambda: first_word(changed, N + 3)))  # noqa: B023
        assert all(edges == found[0] for edges in found)
        with use_backend("reference"):
            before = changed(patterns([max(edge - 1, 0) for edge in found[0]])).tolist()
            there = changed(patterns([min(edge, WORDS - 1) for edge in found[0]])).tolist()
        assert before == [edge == 0 for edge in found[0]]
        assert there == [edge < WORDS for edge in found[0]]
        seen += sum(0 < edge < WORDS for edge in found[0])
    assert seen > 15, seen


@pytest.mark.parametrize("rule", TREE_RULES)
def test_threads_do_not_matter(rule):
    dice, B, N, V = Dice(1), 12, 7, 5000
    target = dice.normal(B, N + 1, V) * 3
    pool = (target + dice.normal(B, N + 1, V)).flatten(0, 1)
    parents = torch.tensor([[-1, -1, 0, 0, 1, 2, 2]]).expand(B, N)
    rows = torch.arange(B)[:, None] * (N + 1) + parents + 1
    tokens = pool[rows].topk(2).indices.gather(2, torch.tensor([0, 1, 0, 1, 0, 0, 1]).expand(
        B, N)[..., None])[..., 0]  # fmt: skip
    tree = Tree(tokens, parents, rows, pool, row_distribution(pool))
    options = {"rule": rule, "top_p": 0.95, **a_key(dice, B, N, V, rule)}
    results = []
    for number in (1, 2):
        with threads(number):
            results.append(verify_tree(target, tree, **options))
    assert_same(*results)
    assert results[0].accepted.max() > 1 and (results[0].accepted < 3).any()


# --- chains --------------------------------------------------------------------------------------


@on_all
@pytest.mark.parametrize("rule", ["token", "coupled", "greedy"])
def test_a_chain_is_verified_as_a_draft(rule):
    """The same words, whatever is recorded, of any length."""
    dice, rejected = Dice(2), 0
    for V in (2, 5, 40, 1100):
        B, K = 6, 4
        target = dice.normal(B, K + 1, V) * 2
        ids = torch.randperm(V, generator=dice.generator)[: max(1, V - 1)].sort().values
        pool = target[:, :K, ids].flatten(0, 1) + dice.normal(B * K, len(ids))
        distribution = row_distribution(pool, 0.8)
        tokens = sample(pool, distribution, words=dice.words(B * K), draft_ids=ids).view(B, K)
        rows = torch.arange(B * K).view(B, K).masked_fill(dice.uniform(B, K) < 0.3, -1)
        lengths = torch.arange(B) % (K + 1)
        draft = Draft(tokens, rows.int() * 0, rows, pool, distribution, ids, lengths)
        missing = torch.arange(K) >= lengths[:, None]
        chain = torch.arange(-1, K - 1).expand(B, K)
        tree = Tree(tokens.masked_fill(missing, -1), chain, rows, pool, distribution, ids)
        for options in ({}, {"temperature": torch.linspace(0, 1, B), "top_k": max(1, V // 2)}):
            if rule == "greedy":
                options.pop("temperature", None)
            key = a_key(dice, B, K, V, rule)
            want = verify(target, draft, rule=rule, **options, **key)
            have = verify_tree(
                target, tree, rule="rejection" if rule == "token" else rule, **options, **key
            )
            assert all(torch.equal(*pair) for pair in zip(have[:2], want[:2], strict=True))
            assert torch.equal(have.status, want.status)
            places = torch.arange(K + 1)
            assert torch.equal(have.path, torch.where(places <= have.accepted[:, None], places, -1))
            rejected += int((have.accepted < lengths).sum())
    assert rejected


@on_all
@pytest.mark.parametrize("rule", TREE_RULES)
def test_no_nodes_is_plain_sampling(rule):
    logits = Dice(3).normal(4, 1, 50)
    seed, at = torch.arange(4), {"position" if rule == "coupled" else "round": i64(1, 2, 3, 4)}
    tree = Tree.guesses(torch.zeros(4, 0).long(), torch.zeros(4, 0).long())
    have = verify_tree(logits, tree, 0.9, top_k=20, rule=rule, seed=seed, **at)
    draft = Draft.guesses(tree.tokens)
    like = {"rejection": "token", "walk": "token"}.get(rule, rule)
    want = verify(logits, draft, 0.9, top_k=20, rule=like, seed=seed, **at)
    assert torch.equal(have.emitted, want.emitted) and have.accepted.tolist() == [0] * 4
    assert have.path.tolist() == [[0]] * 4


# --- laws ----------------------------------------------------------------------------------------
# of the default backend, as the others have its bits and take their time


def law(logits: Tensor) -> list[float]:
    distribution = row_distribution(logits[None])
    e = weights(logits[None], distribution)[0].double()
    return (e / distribution.total.double()).tolist()


def of_siblings(target: Tensor, tree: Tree, V: int) -> list[float]:
    """Exact distribution of the first token emitted, given a root with two children."""

    def asked(*columns: Tensor | int) -> VerifiedTree:
        n = next(len(x) for x in columns if isinstance(x, Tensor))
        words = torch.stack([torch.as_tensor(x).expand(n) for x in columns], 1)
        return verify_tree(target.expand(n, -1, -1), repeated(tree, n), words=words)

    first, second = (
        first_word(lambda word, node=node: asked(*(word if n == node else LAST_WORD
                                                   for n in range(2)), 0).path[:, 1] != node + 1, 1)
        for node in range(2)
    )  # fmt: skip
    a, b = first[0] / WORDS, second[0] / WORDS
    if b and a == 1:
        b = 0.0
    rest = probabilities(lambda word: asked(LAST_WORD, LAST_WORD, word).emitted[:, 0], 1, V)[0]
    emitted = [(1 - a) * (1 - b) * float(share) for share in rest]
    x, y = tree.tokens[0].tolist()
    emitted[x] += a
    emitted[y] += (1 - a) * b
    return emitted


@pytest.mark.parametrize("drawn", ["without replacement", "with replacement", "guess first"])
def test_two_siblings_emit_the_target(drawn):
    """Summed over all that may be drafted, by the chance of each, exactly."""
    V = 4  # behind token 0 the second may be rejected too: p - q and q are no multiples there
    target = torch.tensor([0.1, 0.3, 0.3, 0.3]).log().expand(1, 3, V)
    pool = torch.tensor([[0.6, 0.1, 0.2, 0.1]]).log()
    p, q = law(target[0, 0]), law(pool[0])
    emitted, total = [0.0] * V, 0.0
    if drawn == "without replacement":
        pairs = {(x, y): q[x] * q[y] / (1 - q[x]) for x, y in permutations(range(V), 2)}
    elif drawn == "with replacement":
        pairs = {(x, y): q[x] * q[y] for x, y in product(range(V), repeat=2)}
    else:
        pairs = {(1, y): q[y] for y in range(V)}
    for (x, y), chance in pairs.items():
        tree = tree_of([x, y], [-1, -1], pool, replacement=drawn != "without replacement")
        if drawn == "guess first":
            tree = tree._replace(rows=i64(-1, 0)[None])
        outcome = of_siblings(target, tree, V)
        emitted = [a + chance * b for a, b in zip(emitted, outcome, strict=True)]
        total += chance
    assert total == pytest.approx(1)
    assert emitted == pytest.approx(p, abs=1e-13)


def test_guesses_are_struck_out_one_after_another():
    """Each is accepted as by a draw from the target without those before it."""
    dice, V = Dice(5), 4
    target = dice.normal(1, 3, V)
    p = law(target[0, 0])
    tree = tree_of([2, 0], [-1, -1])
    second = first_word(
        lambda word: verify_tree(
            target, tree, words=torch.stack((i64(LAST_WORD), word, i64(0)), 1)
        ).path[:, 1] != 2, 1,
    )[0] / WORDS  # fmt: skip
    assert second == pytest.approx(p[0] / (1 - p[2]), abs=1e-14)
    rest = probabilities(
        lambda word: verify_tree(
            target, tree, words=torch.stack((i64(LAST_WORD), i64(LAST_WORD), word), 1)
        ).emitted[:, 0], 1, V,
    )[0]  # fmt: skip
    left = p[1] + p[3]
    assert [float(x) for x in rest] == pytest.approx([0, p[1] / left, 0, p[3] / left], abs=1e-14)


def test_a_walk_draws_from_the_target():
    """Whatever the tree; and it goes on where the draw is drafted."""
    dice, V = Dice(6), 5
    target = dice.normal(1, 4, V)
    tree = tree_of([3, 1, 2], [-1, -1, 1])

    def asked(*columns: Tensor | int) -> VerifiedTree:
        n = next(len(x) for x in columns if isinstance(x, Tensor))
        words = torch.stack([torch.as_tensor(x).expand(n) for x in columns], 1)
        return verify_tree(target.expand(n, -1, -1), repeated(tree, n), rule="walk", words=words)

    drawn = probabilities(lambda word: asked(word, 0, 0, 0).emitted[:, 0], 1, V)[0]
    assert [float(x) for x in drawn] == pytest.approx(law(target[0, 0]), abs=1e-14)
    edges = torch.tensor([float(sum(drawn[:v]) + drawn[v] / 2) for v in range(V)])
    middle = (edges.double() * 2.0**64 - 2.0**63).long() ^ (-(2**63))  # a word for each token
    walked = asked(middle, 0, 0, 0)
    assert walked.emitted[:, 0].tolist() == list(range(V))
    assert walked.path[:, 1].tolist() == [-1, 2, -1, 1, -1]
    behind = probabilities(lambda word: asked(middle[1:2].expand(len(word)), 0, word, 0)
                           .emitted[:, 1], 1, V)[0]  # fmt: skip
    assert [float(x) for x in behind] == pytest.approx(law(target[0, 2]), abs=1e-14)


@on_all
@pytest.mark.parametrize("rule", ["coupled", "greedy"])
def test_the_text_is_that_of_plain_decoding(rule):
    """Token by token as without a tree, by the rows behind the path."""
    dice, met = Dice(7), 0
    for seed in range(12):
        case = a_case(seed, 3, rule)
        B = len(case.target)
        case.options.pop("words", None)
        key = {"seed": torch.arange(B) + 99} | ({"position": i64(5)} if rule == "coupled" else {})
        sampling = {name: x for name, x in case.options.items()
                    if name in ("temperature", "top_k", "top_p", "min_p")}  # fmt: skip
        for b in range(B):
            one = case.row(b)
            options = {name: x[b : b + 1] if isinstance(x, Tensor) else x
                       for name, x in (sampling | {"seed": key["seed"]}).items()}  # fmt: skip
            at = {"position": i64(5)} if rule == "coupled" else {"round": i64(0)}
            have = verify_tree(one.target, one.tree, **options, **at, rule=rule)
            if have.status.item() != 0:
                continue
            empty = Tree.guesses(torch.zeros(1, 0).long(), torch.zeros(1, 0).long())
            for depth in range(int(have.accepted) + 1):
                row = one.target[:, have.path[0, depth]][:, None]
                at = {"position": i64(5 + depth)} if rule == "coupled" else {"round": i64(0)}
                plain = verify_tree(row, empty, **options, **at, rule=rule)
                assert plain.emitted[0, 0] == have.emitted[0, depth]
            met += int(have.accepted)
    assert met > 3 and dice


@on_all
def test_the_first_of_equal_siblings_is_met():
    tree = tree_of([1, 1, 0], [-1, -1, 1], replacement=True)
    target = torch.tensor([[0.0, 50.0]]).expand(1, 4, 2)
    result = verify_tree(target, tree, rule="walk", words=torch.zeros(1, 4).long())
    assert lists(result) == [[1], [[1, 1, -1, -1]], [[0, 1, -1, -1]], [0]]


@on_all
def test_where_nothing_would_be_left_the_target_stays():
    """A sure token that is rejected, by a word that no p reaches."""
    # e * (1 / e) is below 1 for some weights e, and u may be the number before 1
    scores = torch.linspace(0, 1, 50)[:, None, None].expand(50, 2, 1)
    guess, words = repeated(tree_of([0], [-1]), 50), torch.full((50, 2), LAST_WORD)
    result = verify_tree(scores, guess, words=words)
    assert (result.status == 0).all() and (result.emitted[:, 0] == 0).all()
    assert set(result.accepted.tolist()) == {0, 1}
    # p and q are equal up to rounding: x has q > p by a unit, and elsewhere p - q rounds to 0
    V = 2**18 + 1
    target, pool = torch.zeros(1, 2, V), torch.zeros(1, V)
    target[..., 5], pool[0, 5] = -INF, -30.0
    tree = tree_of([5], [-1], pool)
    assert lists(verify_tree(target, tree, words=i64(0, LAST_WORD)[None])) == [
        [0], [[V - 1, -1]], [[0, -1]], [0]
    ]  # fmt: skip


# --- faults --------------------------------------------------------------------------------------

FOUR = ([0, 1, 1, 0], [-1, 0, -1, 1])  # nodes; the target likes token 0, then 1, then 0
LIKED = torch.tensor([[9.0, 0, -9], [0, 9.0, -9], [9.0, 0, -9], [0, 9, -9], [0, 9, -9]])[None]


def judged(tree: Tree, rule: str, target: Tensor = LIKED, **options) -> VerifiedTree:
    """With words that accept; and the other row of the batch is what it is alone."""
    sound = tree_of(*FOUR)
    both = tree._replace(
        **{name: torch.cat((getattr(sound, name), getattr(tree, name)))
           for name in ("tokens", "parents", "rows")}
    )  # fmt: skip
    key = {"seed": i64(1, 2), "position" if rule == "coupled" else "round": i64(0, 0)}
    options = {name: torch.cat((torch.ones(1) * (0.1 if name == "temperature" else 0), x))
               for name, x in options.items()} or {"temperature": 0.1}  # fmt: skip
    result = verify_tree(torch.cat((LIKED, target)), both, rule=rule, **options, **key)
    assert lists(VerifiedTree(*(x[:1] for x in result))) == [
        [3], [[0, 1, 0, 1, -1]], [[0, 1, 2, 4, -1]], [0]
    ]  # fmt: skip
    return VerifiedTree(*(x[1:] for x in result))


def assert_fault(result: VerifiedTree, status: Status) -> None:
    N1 = result.emitted.shape[1]
    assert lists(result) == [[0], [[-1] * N1], [[-1] * N1], [status]]
    with pytest.raises(DistributionError):
        check_status(result.status)


@on_all
@pytest.mark.parametrize("rule", ["rejection", "walk", "coupled"])
@pytest.mark.parametrize(
    ("value", "status"), [(NAN, Status.NAN), (INF, Status.POS_INF), (-INF, Status.EMPTY)]
)
def test_rows_without_a_distribution_matter_where_a_path_leads(rule, value, status):
    """The path is 0, 1, 3; behind node 2 nothing is read."""
    for node, reached in ((-1, True), (0, True), (1, True), (2, False), (3, True)):
        target = LIKED.clone()
        target[0, node + 1] = value
        result = judged(tree_of(*FOUR), rule, target)
        if reached:
            assert_fault(result, status)
        else:
            assert result.status.item() == 0 and result.accepted.item() == 3


MALFORMED = {
    "token -2": {"tokens": [0, 1, -2, 0]},
    "token V": {"tokens": [0, 1, 3, 0]},
    "parent itself": {"parents": [-1, 0, 2, 1]},
    "parent behind": {"parents": [-1, 0, 3, 1]},
    "parent N": {"parents": [-1, 0, 4, 1]},
    "cycle": {"parents": [1, 0, -1, 1]},
    "parent -2": {"parents": [-1, 0, -2, 1]},
    "behind a missing node": {"tokens": [0, -1, 1, 0]},
    "equal siblings": {"tokens": [0, 1, 0, 0]},
    "row -2": {"rows": [0, 0, -2, 0]},
    "row R": {"rows": [0, 0, 4, 0]},
}


@on_all
@pytest.mark.parametrize("rule", TREE_RULES)
@pytest.mark.parametrize("fault", MALFORMED)
def test_what_is_no_tree(rule, fault):
    """Each fault lies where no path leads; it silences its row alone."""
    pool = torch.zeros(4, 3)
    change = {name: i64(*values)[None] for name, values in MALFORMED[fault].items()}
    tree = tree_of(*FOUR, pool, rows=i64(-1, -1, -1, -1)[None])
    if rule == "greedy":
        target = torch.cat((LIKED, LIKED))
        both = repeated(tree, 2)
        both = both._replace(**{name: torch.cat((getattr(tree, name), values))
                                for name, values in change.items()})  # fmt: skip
        result = verify_tree(target, both, rule=rule)
        assert result.accepted.tolist() == [3, 0]
        assert_fault(VerifiedTree(*(x[1:] for x in result)), Status.TOKEN)
        return
    assert judged(tree, rule).status.item() == 0
    assert_fault(judged(tree._replace(**change), rule), Status.TOKEN)


@on_all
def test_faults_of_missing_nodes_and_with_replacement():
    """Parents and rows of places without a node do not matter; equal siblings may be drawn."""
    absent = tree_of([0, 1, -1, 0], [-1, 0, 77, 1])._replace(rows=i64(-1, -1, 99, -1)[None])
    assert judged(absent, "rejection").accepted.item() == 3
    equal = tree_of([0, 1, 0, 0], [-1, 0, -1, 1])
    result = verify_tree(LIKED, equal._replace(replacement=True), 0.1, seed=0, round=0)
    assert result.accepted.item() == 3


@on_all
def test_records_without_logits():
    tree = tree_of(*FOUR, rows=i64(0, -1, -1, -1)[None])
    for pool in (None, torch.zeros(0, 3)):
        if pool is not None:
            tree = tree._replace(logits=pool, distribution=row_distribution(pool))
        assert_fault(judged(tree, "rejection"), Status.TOKEN)
        assert_fault(judged(tree, "walk"), Status.TOKEN)


@on_all
def test_a_recorded_token_that_cannot_have_been_drawn():
    """Found where it is tried, and by the rule that looks at records alone."""
    pool = torch.zeros(4, 3)
    pool[0, 1] = -INF  # of the root's second child, which is tried if the first is rejected
    pool[2, 0] = -INF  # of node 3, on the path
    tree = tree_of(*FOUR, pool, rows=i64(-1, -1, 0, -1)[None])
    assert judged(tree, "rejection").accepted.item() == 3
    away = LIKED.clone()
    away[0, 0] = torch.tensor([-INF, 0, 0])
    assert_fault(judged(tree, "rejection", away), Status.DRAFT)
    on_path = tree._replace(rows=i64(-1, -1, -1, 2)[None])
    assert_fault(judged(on_path, "rejection"), Status.DRAFT)
    assert judged(on_path, "walk").accepted.item() == 3
    ids = tree._replace(
        logits=torch.zeros(4, 2), distribution=row_distribution(torch.zeros(4, 2)),
        draft_ids=i64(1, 2),
    )  # fmt: skip
    hidden = ids._replace(rows=i64(0, -1, -1, -1)[None])  # token 0 is none of the drafter's
    assert_fault(judged(hidden, "rejection"), Status.DRAFT)
    for value in (NAN, -INF):  # a record whose row has no distribution
        rows = torch.full((4, 3), value)
        faulty = tree._replace(logits=rows, distribution=row_distribution(rows),
                               rows=i64(0, -1, -1, -1)[None])  # fmt: skip
        assert_fault(judged(faulty, "rejection"), Status.DRAFT)


@on_all
@pytest.mark.parametrize("rule", ["rejection", "walk", "coupled"])
def test_parameters_out_of_range(rule):
    tree = tree_of(*FOUR)
    assert_fault(judged(tree, rule, temperature=torch.tensor([-1.0])), Status.PARAMETER)
    assert_fault(
        judged(tree, rule, temperature=torch.tensor([0.1]), min_p=torch.tensor([NAN])),
        Status.PARAMETER,
    )


@pytest.mark.parametrize("rule", TREE_RULES)
def test_garbage_does_no_harm(rule):
    """Random 64-bit numbers among sound ones: the reference's answer, and the other row's own."""
    dice, N, V, refused = Dice(8), 5, 6, 0
    target, pool = dice.normal(2, N + 1, V), dice.normal(4, V)
    whole = row_distribution(pool)
    for _ in range(60):
        fields = []
        for low, high in ((-1, V), (-1, N), (-1, 4)):
            sound = torch.randint(low, high, (2, N), generator=dice.generator)
            wild = dice.words(2, N) >> dice.below(64)
            if high == N:
                sound = torch.minimum(sound, torch.arange(N) - 1)
            fields.append(torch.where(dice.uniform(2, N) < dice.pick(0.0, 0.1, 1.0), wild, sound))
            fields[-1][0] = i64(0, 1, 1, 2, 3) if high == V else i64(-1, 0, -1, 1, 1)
        tree = Tree(*fields, pool, whole, replacement=dice.chance(0.5))
        tree.rows[0] = -1
        options = {"rule": rule, **a_key(dice, 2, N, V, rule)}
        with use_backend("reference"):
            expected = verify_tree(target, tree, **options)
        for result in on_each_isa(lambda t=tree, o=options: verify_tree(target, t, **o)):
            assert_same(result, expected)
        assert expected.status[0] == 0
        refused += int(expected.status[1] == Status.TOKEN)
    assert 20 < refused < 60


# --- forms of a call -----------------------------------------------------------------------------


@on_all
def test_out_workspace_and_untouched_inputs():
    dice = Dice(9)
    frame = torch.full((2, 7, 50), NAN)
    target = frame[:, 1:6, 5:37]
    target.copy_(dice.normal(2, 5, 32))
    pool = dice.normal(4, 32)
    tree = repeated(tree_of([3, 4, 3, 9], [-1, -1, 0, 1], pool), 2)
    words = dice.words(2, 5)
    before = [x.clone() for x in (frame, *tree[:4])]
    expected = verify_tree(target.contiguous(), tree, words=words)
    for scratch in ({}, {"workspace": torch.zeros(1).long()}):
        out = VerifiedTree(*(torch.full_like(field, 77) for field in expected))
        assert verify_tree(target, tree, words=words, out=out, **scratch) is out
        assert_same(out, expected)
    for x, y in zip((frame, *tree[:4]), before, strict=True):
        assert torch.equal(x.nan_to_num(), y.nan_to_num())


@on_all
@pytest.mark.parametrize("rule", TREE_RULES)
def test_who_looks_on_sees_the_op(rule):
    """Under a mode, and where a gradient might be asked for: the same, without one."""
    case = a_case(12, 7, rule)
    expected = case.verified()
    out = VerifiedTree(*(torch.full_like(field, 77) for field in expected))
    with Operators() as called:
        watched = case.verified()
        case.verified(out=out)
    ours = [name for name in called.names if name.startswith("specdiff.")]
    assert ours == ["specdiff.verify_tree.default", "specdiff.verify_tree.out"]
    assert_same(watched, expected)
    assert_same(out, expected)
    case.target = case.target.clone().requires_grad_()
    learning = case.verified()
    assert_same(learning, expected)
    assert not any(field.requires_grad for field in learning)


def test_depths_are_counted_from_the_root():
    tree = tree_of([5, 6, 7, 8, -1], [-1, 0, -1, 1, 99])
    assert tree.depths[0, :4].tolist() == [1, 2, 1, 3]


# --- mistakes ------------------------------------------------------------------------------------

B, K, V = 2, 3, 9
KEY = {"seed": 7, "round": 0}
POOL = torch.zeros(B * K, V)
TARGET, LENGTHS = torch.zeros(B, K + 1, V), i64(5, 5)
ROWS = row_distribution(POOL)
TOKENS = torch.ones(B, K, dtype=torch.int64)
BARE = Tree.guesses(torch.zeros(B, K).long(), torch.full((B, K), -1))
DRAWN = BARE._replace(logits=POOL, distribution=ROWS)


def judging(**change: Any) -> Callable[[], Any]:
    return lambda: verify_tree(**{"target_logits": TARGET, "tree": BARE} | KEY | change)


MISTAKES: dict[type[Exception], dict[str, Callable[[], Any]]] = {
    ValueError: {
        "target_logits: expected shape [B, N+1=4, V], got [2, 3, 9]; it needs "
        "a row for the root and one for each of the tree's N=3 nodes": judging(
            target_logits=TARGET[:, :K]
        ),
        "target_logits: expected shape [B, N+1=4, V], got [8, 9]": judging(
            target_logits=TARGET.flatten(0, 1)
        ),
        "tree.tokens: expected shape [B, N], got [6]": judging(
            tree=BARE._replace(tokens=i64(*[0] * 6))
        ),
        "tree.tokens: expected shape [B=2, N=3], got [1, 3]": judging(
            tree=BARE._replace(tokens=BARE.tokens[:1])
        ),
        "tree.parents: expected shape [B=2, N=3], got [2, 2]": judging(
            tree=BARE._replace(parents=BARE.parents[:, :2])
        ),
        "tree.rows: expected shape [B=2, N=3], got [3]": judging(
            tree=BARE._replace(rows=BARE.rows[0])
        ),
        "tree.logits: expected shape [R, Vd=9], got [9]": judging(
            tree=DRAWN._replace(logits=POOL[0])
        ),
        "tree.logits: expected shape [R, Vd=9], got [6, 5]; a draft over some of "
        "the target's tokens names them in draft_ids": judging(
            tree=DRAWN._replace(logits=POOL[:, :5])
        ),
        "tree.draft_ids: expected shape [Vd], got [1, 9]": judging(
            tree=DRAWN._replace(draft_ids=torch.arange(V)[None])
        ),
        "tree.distribution.total: expected shape [R=6], got [5]": judging(
            tree=DRAWN._replace(distribution=ROWS._replace(total=LENGTHS.repeat(3)[:5]))
        ),
        "out.path: expected shape [B=2, N+1=4], got [2, 3]": judging(
            out=VerifiedTree(LENGTHS, torch.zeros(B, K + 1).long(), TOKENS, LENGTHS.int())
        ),
        "words: expected shape [2, 4, 9], got [2, 4]": judging(
            rule="coupled", words=torch.zeros(B, K + 1).long()
        ),
        "tokens: expected shape [B, K], got [3]": lambda: Tree.guesses(TOKENS[0], TOKENS),
        "parents: expected shape [B=2, N=3], got [1, 3]": lambda: Tree.guesses(TOKENS, TOKENS[:1]),
        "rule: expected one of rejection, walk, coupled, greedy, got 'token'": judging(
            rule="token"
        ),
        "position: only the coupled rule takes one, got one under 'walk'": judging(
            rule="walk", position=1
        ),
        "seed: expected an integer, or a tensor [2] int64, got None; pass seed and round, or "
        "words": judging(seed=None),
        "position: expected an integer, or a tensor [2] int64, got None; pass seed and "
        "position, or words": judging(rule="coupled"),
        "tree: expected logits and distribution together, or neither; got one of them": judging(
            tree=BARE._replace(logits=POOL)
        ),
        "tree.draft_ids: expected strictly increasing ids in [0, 9), got others; sort": judging(
            tree=DRAWN._replace(draft_ids=torch.arange(V) + 1)
        ),
        "temperature: expected 0 or a number in [2^-95, 2^95], or a tensor [2] float32, "
        "got -1.0": judging(temperature=-1.0),
        "target_logits: expected a vocabulary of 1 to 524287, got 0": judging(
            target_logits=TARGET[..., :0]
        ),
    },
    TypeError: {
        "target_logits: expected a tensor, got list; convert": judging(target_logits=[[0.0]]),
        "target_logits: expected dtype float32, bfloat16, float16, got float64; convert": judging(
            target_logits=TARGET.double()
        ),
        "tree: expected a Tree, got Draft; Tree.guesses(tokens, parents) makes one of "
        "tokens alone": judging(tree=Draft.guesses(TOKENS)),
        "tree: expected a Tree, got None": judging(tree=None),
        "tree.tokens: expected a tensor, got list": judging(tree=BARE._replace(tokens=[[1]])),
        "tree.parents: expected dtype int64, got int32; convert": judging(
            tree=BARE._replace(parents=BARE.parents.int())
        ),
        "tree.rows: expected a tensor, got None": judging(tree=BARE._replace(rows=None)),
        "tree.distribution: expected a RowDistribution, got int": judging(
            tree=DRAWN._replace(distribution=1)
        ),
        "out: expected a VerifiedTree, got int": judging(out=1),
        "workspace: expected a tensor, got int": judging(
            out=VerifiedTree(LENGTHS, *[torch.zeros(B, K + 1).long()] * 2, LENGTHS.int()),
            workspace=1,
        ),
        "tokens: expected dtype int64, got int32": lambda: Tree.guesses(TOKENS.int(), TOKENS),
        "parents: expected a tensor, got None": lambda: Tree.guesses(TOKENS, None),
    },
    BackendError: {
        "backend is 'gpu'; expected one of cpp": judging(backend="gpu"),
    },
}


@pytest.mark.parametrize(("error", "message", "call"), each_mistake(MISTAKES))
def test_the_message_names_the_argument_and_what_was_expected(error, message, call):
    assert_named(error, message, call)
