"""Tree: drafted tokens of which several may follow the same one; and the result of judging it."""

from __future__ import annotations

from typing import Annotated, NamedTuple

import torch
from torch import Tensor

from .checks import INT64, check_tensor
from .fields import F64, FLAG, I32, I64, Group, Logits, describe
from .types import OTHER_VOCABULARY, RowDistribution, check_tokens

ROOT = -1  # as a parent: the token behind which the tree grows


class Tree(NamedTuple):
    """N nodes per sequence: drafted tokens, each behind another one or behind the root, which is
    the last token of the text.

    Parents come before their children, so `parents[b, n] < n`. The children of a node are tried in
    the order of their numbers. A row with fewer nodes has token -1 where there is none; no node
    grows behind such a place.

    A node is *recorded* when `rows` points at the logits that its token was drawn from. -1 makes it
    a bare guess, whose token was chosen in some other way. Recorded siblings were drawn from one
    distribution, one after another: with replacement each from the whole of it, and otherwise from
    what the earlier ones have left of it.
    """

    tokens: Annotated[Tensor, I64("B N", sized=True)]
    parents: Annotated[Tensor, I64("B N")]
    rows: Annotated[Tensor, I64("B N")]
    # rows of any stride
    logits: Annotated[Tensor | None, Logits("R Vd", way_out=OTHER_VOCABULARY)] = None
    distribution: Annotated[RowDistribution | None, Group("R")] = None  # of the R rows
    draft_ids: Annotated[Tensor | None, I64("Vd")] = None  # increasing: target id of each column
    replacement: Annotated[bool, FLAG] = False
    chances: Tensor | None = None  # f64 [B, N], of each path by the drafter

    @classmethod
    def guesses(cls, tokens: Tensor, parents: Tensor) -> Tree:
        """A tree of bare guesses.

        Args:
            tokens: i64 [B, N]; -1: no node.
            parents: i64 [B, N], numbers of nodes; -1: the root.

        Raises:
            ValueError, TypeError: an argument of another shape or dtype.

        Example:
            >>> tree = Tree.guesses(torch.tensor([[7, 8, 3]]), torch.tensor([[-1, -1, 0]]))
            >>> tree.depths.tolist()
            [[1, 1, 2]]
        """
        check_tokens(tokens)
        check_tensor("parents", parents, tuple(tokens.shape), ("B", "N"), INT64, tokens.device)
        return cls(tokens, parents, torch.full_like(tokens, -1))

    @property
    def depths(self) -> Tensor:
        """How many tokens each node is behind the root, i64 [B, N]; the root's children have 1."""
        depths = torch.ones_like(self.parents)
        for n in range(1, self.parents.shape[1]):
            parent = self.parents[:, n : n + 1].clamp(0, n - 1)
            behind = depths.gather(1, parent)[:, 0] + 1
            depths[:, n] = torch.where(self.parents[:, n] < 0, 1, behind)
        return depths


class Grown(NamedTuple):
    """What `build_tree` makes of logits."""

    tokens: Annotated[Tensor, I64("B N")]
    parents: Annotated[Tensor, I64("B N")]
    rows: Annotated[Tensor, I64("B N")]
    chances: Annotated[Tensor, F64("B N")]
    distribution: Annotated[RowDistribution, Group("R")]


class VerifiedTree(NamedTuple):
    """Result of the verification of a tree: the accepted path of each sequence, and one token
    more."""

    accepted: Annotated[Tensor, I64("B")]
    emitted: Annotated[Tensor, I64("B N1")]
    path: Annotated[Tensor, I64("B N1")]
    # Status; where it is not OK, accepted is 0, emitted and path all -1
    status: Annotated[Tensor, I32("B")]


describe(
    Tree,
    tokens="i64 [B, N], drafted tokens; -1: no node",
    parents="i64 [B, N], the node that each is behind; -1: the root",
    rows="i64 [B, N], the row of `logits` that the token was drawn from; -1: a bare guess",
    logits="f32, bf16 or f16 [R, Vd], the drafter's logits; None: all tokens are bare guesses",
    distribution="RowDistribution of the R rows of `logits`",
    draft_ids="i64 [Vd], strictly increasing: the target's token id of each column; None: Vd = V",
    replacement="bool, whether recorded siblings were drawn with replacement, so that they may be "
    "equal",
    chances="f64 [B, N], the drafter's probability of the path to each node, as `build_tree` found "
    "it; 0: no node",
)
describe(
    VerifiedTree,
    accepted="i64 [B], accepted nodes of each sequence",
    emitted="i64 [B, N + 1], the accepted nodes' tokens, then one more token, then -1",
    path="i64 [B, N + 1], as `commit` takes it: 0 for the root, 1 + the number of each accepted "
    "node, then -1",
    status="i32 [B], a Status; unless it is OK, accepted is 0, emitted and path are -1",
)
