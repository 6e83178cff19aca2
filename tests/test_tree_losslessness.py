"""The distribution of what is emitted with trees of drafted tokens is the target's, for every rule
and every shape, and a verifier or a tree that is not as docs/losslessness.md says is biased.

Distances are those of whole texts. That of the first token is at most as large.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from specdiff_kernels import Status, Tree, use_backend, verify_tree
from tests.tree_worlds import (
    Grove,
    Mistake,
    Nodes,
    TreeWorld,
    all_shapes,
    mistaken,
    ordered_shapes,
    path_to,
)
from tests.worlds import Text

EXACT, BIASED = 1e-12, 1e-3
EMPTY = {(): 1.0}  # the text before a single round
SIBLINGS = [(-1, -1), (-1, -1, 0), (-1, -1, 1, 0, 1), (-1, 0, 0, -1, 1), (-1, -1, -1, 0)]
SEEDS = range(3)

Alter = Callable[[Nodes], None]


def distance(world: TreeWorld, grove: Grove, rule: str = "rejection") -> float:
    """Of one round, whose text the target continues."""
    longest = max(len(nodes.path(n)) for nodes in grove.nodes() for n in range(len(nodes.tokens)))
    return world.distance(world.ends(grove, rule), longest + 1)


def worst(
    alter: Alter | None = None,
    *,
    replacement: bool,
    mistake: Mistake | None = None,
    shapes: list[tuple[int, ...]] = SIBLINGS,
    **options,
) -> float:
    """The largest distance over some shapes and worlds of 3 tokens, with altered trees or with a
    verifier that makes a mistake."""
    found = []
    for seed in SEEDS:
        world = TreeWorld(3, seed, **options)
        for shape in shapes:
            grove = world.drawn(EMPTY, shape, replacement=replacement)
            grove = grove if alter is None else grove.altered(alter)
            ends = world.ends(grove, "rejection") if mistake is None else (
                mistaken(world, grove, mistake)
            )  # fmt: skip
            found.append(world.distance(ends, len(shape) + 1))
    return max(found)


# --- single rounds ------------------------------------------------------------------------------


@pytest.mark.parametrize("replacement", [True, False])
@pytest.mark.parametrize("V, N", [(2, 1), (2, 2), (2, 3), (2, 4), (2, 5), (3, 2), (3, 3), (3, 4)])
def test_drawn_trees(V, N, replacement):
    """Every tree of N nodes, in every order of its nodes that a tree may have."""
    world = TreeWorld(V, N)
    for shape in all_shapes(N):
        assert distance(world, world.drawn(EMPTY, shape, replacement=replacement)) < EXACT


@pytest.mark.parametrize("replacement", [True, False])
def test_drawn_trees_of_five_nodes(replacement):
    world = TreeWorld(3, 5)
    for shape in ordered_shapes(5):
        assert distance(world, world.drawn(EMPTY, shape, replacement=replacement)) < EXACT
