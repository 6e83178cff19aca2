"""The distribution of what is emitted with trees of drafted tokens is the target's, for every rule
and every shape, and a verifier or a tree that is not as docs/losslessness.md says is biased.

Distances are those of whole texts. That of the first token is at most as large.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import combinations
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from specdiff_kernels import Status, Tree, row_distribution, use_backend, verify_tree
from tests.tree_worlds import (
    NOWHERE,
    Ends,
    Grove,
    Mistake,
    Nodes,
    TreeWorld,
    all_shapes,
    mistaken,
    ordered_shapes,
    plain,
)
from tests.worlds import Text

EXACT, BIASED = 1e-12, 1e-3
BEGIN = {(): 1.0}  # the text before a single round
SIBLINGS = [(-1, -1), (-1, -1, 0), (-1, -1, 1, 1), (-1, 0, -1, 0), (-1, -1, -1, 0)]
SEEDS = range(2)
DRAFTERS: dict[str, dict] = {
    "any": {},
    "corrected": {"corrected": True},
    "some tokens": {"draft_ids": [0, 2]},
    "cut off": {"sampling": {"top_p": 0.8}, "draft_sampling": {"top_k": 2, "temperature": 0.7}},
    "greedy": {"draft_sampling": {"temperature": 0.0}},
    "a greedy target's": {"sampling": {"temperature": 0.0}},
}
both = pytest.mark.parametrize("replacement", [True, False])

Alter = Callable[[Nodes], None]


def distance(world: TreeWorld, grove: Grove, rule: str = "rejection") -> float:
    """Of one round, whose text the target continues."""
    return world.distance(world.ends(grove, rule), longest(grove))


def longest(grove: Grove) -> int:
    return 1 + max(len(nodes.path(n)) for nodes in grove.nodes() for n in range(len(nodes.tokens)))


def worst(judge: Callable[[TreeWorld, Grove], float], *, replacement: bool, **options) -> float:
    """The largest distance over some shapes and worlds of 3 tokens."""
    return max(
        judge(world, world.drawn(BEGIN, shape, replacement=replacement))
        for world in (TreeWorld(3, seed, **options) for seed in SEEDS)
        for shape in SIBLINGS
    )


def altered(alter: Alter, rule: str = "rejection") -> Callable[[TreeWorld, Grove], float]:
    return lambda world, grove: distance(world, grove.altered(alter), rule)


# --- single rounds: exact -----------------------------------------------------------------------


@both
@pytest.mark.parametrize("V, N", [(2, 1), (2, 2), (2, 3), (2, 4), (3, 2), (3, 3), (3, 4)])
def test_drawn_trees(V, N, replacement):
    """Every tree of N nodes, numbered in every way."""
    world = TreeWorld(V, N)
    for shape in all_shapes(N):
        assert distance(world, world.drawn(BEGIN, shape, replacement=replacement)) < EXACT


@both
@pytest.mark.parametrize("V", [2, 3])
def test_drawn_trees_of_five_nodes(V, replacement):
    """Every tree, or of 3 tokens every second one."""
    world = TreeWorld(V, 5)
    for shape in list(ordered_shapes(5))[:: V - 1]:
        assert distance(world, world.drawn(BEGIN, shape, replacement=replacement)) < EXACT


@both
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_drawn_trees_of_other_drafters(drafter, replacement):
    assert worst(distance, replacement=replacement, **DRAFTERS[drafter]) < EXACT


@pytest.mark.parametrize("rule", ["walk", "rejection"])
@pytest.mark.parametrize("equal", [True, False])
@pytest.mark.parametrize("V, N", [(2, 1), (2, 2), (2, 3), (2, 4), (3, 2), (3, 3), (3, 4)])
def test_guesses(V, N, equal, rule):
    """All tokens in every tree of N nodes."""
    world = TreeWorld(V, N)
    for shape in all_shapes(N):
        grove = world.guesses(shape, equal=equal)
        if grove.chances:
            assert distance(world, grove, rule) < EXACT


@pytest.mark.parametrize("rule", ["walk", "rejection"])
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_the_likeliest_trees(drafter, rule):
    world = TreeWorld(3, 1, **DRAFTERS[drafter])
    for N in range(1, 12):
        assert distance(world, world.likeliest(BEGIN, N), rule) < EXACT


@both
@pytest.mark.parametrize("V, N", [(2, 3), (3, 2), (3, 3), (3, 4)])
def test_guesses_among_drawn_tokens(V, N, replacement):
    """Guesses may follow the tokens before them. Without replacement they come behind the drawn
    siblings, which might be equal to them otherwise."""
    world = TreeWorld(V, N)
    for shape in ordered_shapes(N):
        grove = world.drawn(BEGIN, shape, replacement=replacement)
        may = [n for n in range(N) if replacement or n not in younger(shape)]
        for size in range(1, len(may) + 1):
            for places in combinations(may, size) if N < 4 else [tuple(may[:size])]:
                mixed = grove.altered(guessing(V, places, distinct=not replacement))
                assert distance(world, mixed) < EXACT


def younger(shape: tuple[int, ...]) -> set[int]:
    """Places that a later sibling follows."""
    return {n for n, parent in enumerate(shape) if parent in shape[n + 1 :]}


def guessing(V: int, places: tuple[int, ...], *, distinct: bool) -> Alter:
    """Guesses at these places, which follow the path and the earlier siblings."""

    def alter(nodes: Nodes) -> None:
        for n in places:
            taken = [nodes.tokens[s] for s in nodes.earlier(n)] if distinct else []
            free = [v for v in range(V) if v not in taken]
            if nodes.tokens[n] != NOWHERE and free:
                nodes.guess(n, free[(sum(nodes.seen(n)) + n) % len(free)])
            else:
                nodes.drop(n)

    return alter


@both
def test_what_was_met_may_decide_which_nodes_are_there(replacement):
    """The tokens of the path and of earlier siblings; without replacement the later siblings of
    one that is dropped go as well, as they are drawn from what it left."""

    def alter(nodes: Nodes) -> None:
        for n in range(len(nodes.tokens)):
            gone = not replacement and any(
                parent == nodes.parents[n] and token == NOWHERE
                for parent, token in zip(nodes.parents[:n], nodes.tokens, strict=False)
            )
            if gone or sum(nodes.seen(n)) % 3 == 1:
                nodes.drop(n)

    assert worst(altered(alter), replacement=replacement) < EXACT


@both
def test_the_reference_too(replacement):
    with use_backend("reference"):
        world = TreeWorld(2, 0, corrected=True)
        for shape in [(-1, 0, 0), (-1, -1, 1), (-1, 0, -1)]:
            grove = world.drawn(BEGIN, shape, replacement=replacement)
            assert distance(world, grove) < EXACT
            mixed = grove.altered(guessing(2, (2,), distinct=not replacement))
            assert distance(world, mixed) < EXACT
        for rule in ("walk", "rejection"):
            assert distance(world, world.likeliest(BEGIN, 4), rule) < EXACT


@both
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_verdicts_are_those_of_the_arithmetic_in_the_documents(drafter, replacement):
    """Word for word: the first that refuses a node, and those with which each token begins."""

    def judge(world: TreeWorld, grove: Grove) -> float:
        for verdict, expected in zip(world.rejected(grove), plain(world, grove), strict=True):
            assert verdict.accept.items() <= expected.accept.items()
            assert verdict.begins.items() <= expected.begins.items()
        return 0.0

    worst(judge, replacement=replacement, **DRAFTERS[drafter])


# --- whole runs: exact --------------------------------------------------------------------------

SHAPES = [(-1, -1, 0, 1, 1), (-1, 0, -1, -1, 0)]


@both
@pytest.mark.parametrize(
    "V, drafter", [(V, drafter) for V in (2, 3) for drafter in DRAFTERS
                   if (V, drafter) != (2, "some tokens")]
)  # fmt: skip
def test_runs_with_drawn_trees(V, drafter, replacement):
    """The shape of a tree may follow the text before it."""
    world = TreeWorld(V, 2, K=2, **DRAFTERS[drafter])

    def draft(prefixes: dict[Text, float]) -> list[Grove]:
        groves = []
        for parity, shape in enumerate(SHAPES):
            own = {text: p for text, p in prefixes.items() if sum(text) % 2 == parity}
            if own:
                groves.append(world.drawn(own, shape, replacement=replacement))
        return groves

    assert world.run(draft, "rejection", 3) < EXACT


@pytest.mark.parametrize("rule", ["walk", "rejection"])
@pytest.mark.parametrize("drafter", DRAFTERS)
@pytest.mark.parametrize("N", [1, 3, 6])
def test_runs_with_the_likeliest_trees(N, drafter, rule):
    world = TreeWorld(3, 4, K=2, **DRAFTERS[drafter])
    assert world.run(lambda prefixes: [world.likeliest(prefixes, N)], rule, 3) < EXACT


@pytest.mark.parametrize("rule", ["coupled", "greedy"])
def test_the_text_is_that_of_decoding_without_drafts(rule):
    """Token for token: 2000 sequences with a random tree in each round."""
    B, N, V, length = 2000, 6, 3, 9
    generator = torch.Generator().manual_seed(0)
    table = torch.randn(997, V, generator=generator) * 1.5
    seed = torch.randint(-(2**63), 2**63 - 1, (B,), generator=generator)
    start = torch.randint(1000, (B,), generator=generator)

    def behind(state: Tensor, token: Tensor) -> Tensor:
        return (state * 31 + token * 7 + 1) % len(table)

    def text_with(nodes: int) -> tuple[Tensor, float]:
        text, count = torch.full((B, length + nodes + 1), -1), torch.zeros(B, dtype=torch.int64)
        state, accepted, rounds = start % len(table), 0, 0
        while (count < length).any():
            tree = random_trees(B, nodes, V, generator)
            states = [state]
            for n in range(nodes):
                above = torch.stack(states, 1).gather(1, tree.parents[:, n, None] + 1)[:, 0]
                states.append(behind(above, tree.tokens[:, n]))
            key = {"position": start + count} if rule == "coupled" else {"round": 0}
            verified = verify_tree(
                table[torch.stack(states, 1)], tree, rule=rule, seed=seed, **key
            )  # fmt: skip
            assert (verified.status == 0).all()
            for emitted in verified.emitted.unbind(1):
                there = (emitted >= 0) & (count < length)
                text[there, count[there]] = emitted[there]
                state = torch.where(there, behind(state, emitted), state)
                count = count + there
            accepted, rounds = accepted + int(verified.accepted.sum()), rounds + B
        return text[:, :length], accepted / rounds

    alone, drafted = text_with(0)[0], text_with(N)
    assert torch.equal(alone, drafted[0])
    assert drafted[1] > 0.5 and len(alone.unique(dim=0)) > 400


def random_trees(B: int, N: int, V: int, generator: torch.Generator) -> Tree:
    """Any tokens, equal siblings among them, and places without a node."""
    tokens = torch.randint(V, (B, N), generator=generator)
    parents = torch.stack(
        [torch.randint(-1, max(n, 0), (B,), generator=generator) for n in range(N)], 1
    ) if N else torch.zeros(B, 0, dtype=torch.int64)  # fmt: skip
    tokens[torch.rand(B, N, generator=generator) < 0.1] = NOWHERE
    for n in range(N):
        orphan = (parents[:, n] >= 0) & (
            tokens.gather(1, parents[:, n, None].clamp(min=0))[:, 0] == NOWHERE
        )
        tokens[orphan, n] = NOWHERE
    return Tree.guesses(tokens, parents)._replace(replacement=True)


# --- mistakes -----------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("mistake", [Mistake(stale=True), Mistake(by_target=True)], ids=str)
def test_a_verifier_s_mistake_is_seen(mistake, replacement):
    assert worst(judged(Mistake()), replacement=replacement) < EXACT
    assert worst(judged(mistake), replacement=replacement) > BIASED


def test_q_of_the_whole_row_is_not_that_of_a_later_sibling():
    assert worst(judged(Mistake(whole=True)), replacement=False) > BIASED


def judged(mistake: Mistake) -> Callable[[TreeWorld, Grove], float]:
    def judge(world: TreeWorld, grove: Grove) -> float:
        ends: Ends = mistaken(world, grove, mistake)
        return world.distance(ends, longest(grove))

    return judge


def test_with_replacement_is_not_without():
    """A tree that was drawn in one way and is declared as the other: q is wrong, or equal siblings
    are refused."""
    assert worst(Declared(True), replacement=False) > BIASED

    world = TreeWorld(3, 0)
    grove = world.drawn(BEGIN, (-1, -1), replacement=True)
    tree = grove.tree._replace(replacement=False)
    verified = verify_tree(world.target_rows(grove), tree, seed=0, round=0)
    equal = tree.tokens[:, 0] == tree.tokens[:, 1]
    assert torch.equal(verified.status == int(Status.TOKEN), equal) and equal.any()


def test_what_was_drawn_with_replacement_and_differs_was_drawn_without():
    """A sibling that is equal to an earlier one may be dropped, if it is declared so: whether it is
    depends on the earlier ones alone, and those that stay follow what these left."""

    def drop_equal(nodes: Nodes) -> None:
        for n in range(len(nodes.tokens)):
            if nodes.tokens[n] in [nodes.tokens[s] for s in nodes.earlier(n)]:
                nodes.drop(n)

    assert worst(Declared(False, drop_equal), replacement=True) < EXACT
    assert worst(Declared(True, drop_equal), replacement=True) > BIASED


class Declared(NamedTuple):
    """Judges trees that are said to be drawn with or without replacement."""

    replacement: bool
    alter: Alter = lambda _: None

    def __call__(self, world: TreeWorld, grove: Grove) -> float:
        grove = grove.altered(self.alter)
        tree = grove.tree._replace(replacement=self.replacement)
        return distance(world, grove._replace(tree=tree))


def own_token(nodes: Nodes) -> None:
    for n, token in enumerate(nodes.tokens):
        if token == 1:
            nodes.drop(n)


def later_sibling(nodes: Nodes) -> None:
    for n in range(len(nodes.tokens)):
        siblings = nodes.children(nodes.parents[n])
        if any(nodes.tokens[s] == 1 for s in siblings if s > n):
            nodes.drop(n)


def child(nodes: Nodes) -> None:
    for n in reversed(range(len(nodes.tokens))):
        if any(nodes.tokens[c] == 1 for c in nodes.children(n)):
            nodes.drop(n)


def guess_of_later_sibling(nodes: Nodes) -> None:
    for n in range(len(nodes.tokens)):
        later = [s for s in nodes.children(nodes.parents[n]) if s > n]
        if later:
            nodes.guess(n, nodes.tokens[later[0]])


@both
@pytest.mark.parametrize("alter", [own_token, later_sibling, child])
def test_what_comes_later_must_not_decide_which_nodes_are_there(alter, replacement):
    assert worst(altered(alter), replacement=replacement) > BIASED
    assert worst(altered(alter, "walk"), replacement=replacement) < EXACT


def test_a_guess_must_not_follow_a_later_sibling():
    assert worst(altered(guess_of_later_sibling), replacement=True) > BIASED
    assert worst(altered(guess_of_later_sibling, "walk"), replacement=True) < EXACT


def test_a_token_that_was_taken_out_and_then_dropped_is_missed():
    """Without replacement, even if neither its token nor a later one decides on it."""

    def alter(nodes: Nodes) -> None:
        nodes.drop(0)

    assert worst(altered(alter), replacement=True) < EXACT
    assert worst(altered(alter), replacement=False) > BIASED


def test_the_likeliest_token_was_not_drawn():
    """The best tree, declared to be drawn from the rows of its depths."""

    def found(world: TreeWorld, N: int) -> float:
        grove = world.likeliest(BEGIN, N)
        tree = grove.tree._replace(rows=grove.tree.depths - 1)
        return distance(world, grove._replace(tree=tree))

    for N in (1, 2, 4):
        assert max(found(TreeWorld(3, seed), N) for seed in SEEDS) > BIASED


@both
def test_the_record_is_the_corrected_distribution(replacement):
    """Nodes were not drawn from the logits before the correction."""

    def judge(world: TreeWorld, grove: Grove) -> float:
        depths = [[len(nodes.path(n)) for n in range(-1, len(nodes.tokens))]
                  for nodes in grove.nodes()]  # fmt: skip
        base = world.by_depth(world.Vd, "draft", ())[torch.tensor(depths)].flatten(0, 1)
        tree = grove.tree._replace(logits=base, distribution=row_distribution(base))
        return distance(world, grove._replace(tree=tree))

    assert worst(judge, replacement=replacement, corrected=True, K=6) > BIASED
