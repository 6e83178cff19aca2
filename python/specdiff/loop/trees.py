"""Trees: how they are grown, and which new token of a forward is behind which."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import NamedTuple

import torch
from torch import Tensor

from specdiff_kernels import Tree
from specdiff_kernels.trees import ROOT

TREE_RULES = {"token": ("walk", "rejection"), "greedy": ("greedy",), "coupled": ("coupled",)}


class Growth(NamedTuple):
    """How a drafter grows trees.

    Attributes:
        nodes: of each tree, at most.
        shape: parents of the places for which tokens are drawn, as `build_tree` takes them; None:
            the likeliest tokens, best first.
        rule: of `verify_tree`.
    """

    nodes: int
    shape: Tensor | None
    rule: str


def growth_of(tree: int | Sequence[int], rule: str) -> Growth:
    """How trees are grown, by a `Decoder`'s argument.

    Raises:
        ValueError, TypeError: no such tree, or a rule that judges chains alone.
    """
    if rule not in TREE_RULES:
        raise ValueError(
            f"tree: rule {rule!r} judges chains alone; use one of {', '.join(TREE_RULES)}, or "
            "leave tree out"
        )
    rules = TREE_RULES[rule]
    if isinstance(tree, Integral) and not isinstance(tree, bool):
        if tree < 1:
            raise ValueError(f"tree must have at least 1 node, got {tree}")
        return Growth(int(tree), None, rules[0])
    if isinstance(tree, (str, bytes)) or not isinstance(tree, Sequence):
        raise TypeError(
            f"tree must be a number of nodes, or the parent of each place, got {tree!r}"
        )
    parents = list(tree)
    for n, parent in enumerate(parents):
        if not isinstance(parent, Integral) or isinstance(parent, bool) or not -1 <= parent < n:
            raise ValueError(
                f"tree: the parent of place {n} must be -1 (the last token of the text) or an "
                f"earlier place, got {parent!r}"
            )
    if not parents:
        raise ValueError("tree must have at least 1 place, got none")
    if len(rules) == 1:
        raise ValueError(
            f"tree: tokens are drawn for rule 'token' alone, got rule {rule!r}; pass a number of "
            "nodes, whose tokens are the likeliest"
        )
    return Growth(len(parents), torch.tensor(parents), rules[1])


def check_grown(tree: Tree, rows: int, nodes: int, *, looks: bool) -> None:
    """Raise unless a drafter's tree is one of at most so many nodes a row, with parents before
    their children where they can be looked at."""
    if not isinstance(tree, Tree):
        raise TypeError(
            f"the drafter's tree must be a Tree, got a {type(tree).__name__}: Tree.guesses makes "
            "one of tokens and parents"
        )
    shape, known = tree.tokens.shape, tree.parents.shape
    if len(shape) != 2 or shape[0] != rows or shape[1] > nodes or known != shape:
        raise ValueError(
            f"the drafter proposed a tree of tokens {list(shape)} and parents {list(known)} where "
            f"{rows} rows of at most {nodes} nodes were wanted"
        )
    if not (looks or tree.parents.is_cpu):
        return
    own = torch.arange(shape[1], device=tree.parents.device)
    wrong = ((tree.parents < ROOT) | (tree.parents >= own)) & (tree.tokens >= 0)
    if wrong.any():
        b, n = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"the drafter's tree: the parent of node {n} in row {b} must be -1 (the last token of "
            f"the text) or an earlier node, got {int(tree.parents[b, n])}"
        )


def behind_root(tree: Tree) -> Tensor:
    """Parents [B, N + 1] of the root and the nodes behind it, as `Target.forward` takes them.

    Where there is no node, something stands behind the root.
    """
    parents = torch.where(tree.tokens < 0, 0, tree.parents + 1)
    return torch.cat((parents.new_full((len(parents), 1), -1), parents), 1)


def depths_of(parents: Tensor) -> Tensor:
    """How many of the new tokens are before each, on its path.

    Args:
        parents: i64 [B, Q], number of the token that each is behind, below its own; -1: it is
            behind the row's last entry.

    Returns:
        i64 [B, Q].
    """
    if parents.is_cpu:  # a loop over numbers takes less time than as many ops
        rows = []
        for row in parents.tolist():
            depths: list[int] = []
            for parent in row:
                depths.append(0 if parent < 0 else depths[parent] + 1)
            rows.append(depths)
        return torch.tensor(rows, dtype=torch.int64).view_as(parents)
    return seen_by(parents).sum(-1) - 1


def seen_by(parents: Tensor) -> Tensor:
    """Whether new token q sees new token k: it is on q's path, or q itself. bool [B, Q, Q]"""
    B, Q = parents.shape
    seen = torch.eye(Q, dtype=torch.bool, device=parents.device).repeat(B, 1, 1)
    for q in range(1, Q):
        parent = parents[:, q]
        path = seen.gather(1, parent.clamp(min=0)[:, None, None].expand(B, 1, Q))[:, 0]
        seen[:, q] |= path & (parent >= 0)[:, None]
    return seen
