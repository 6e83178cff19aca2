"""Verification of a tree, sequence by sequence: walk, rejection and coupled rules."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ..inputs import RowDistributionInputs, VerifyTreeInputs
from ..trees import ROOT, Tree, VerifiedTree
from ..types import Purpose, Status
from .numerics import draw, probability, race, race_words, random_word, unit, weights
from .row_distribution import row_distribution
from .verify import empty_distribution, excess, one_row


def verify_tree(inputs: VerifyTreeInputs, *, out: VerifiedTree) -> None:
    """[B, N+1, V] target logits and a Tree -> VerifiedTree."""
    for b in range(len(inputs.target_logits)):
        one = Sequence(inputs, b)
        status, path, token = one.verdict()
        out.status[b] = int(status)
        out.accepted[b] = len(path)
        out.emitted[b], out.path[b] = -1, -1
        if status is Status.OK:
            tokens = [*(one.tree.tokens[b, n] for n in path), token]
            out.emitted[b, : len(tokens)] = torch.stack(tokens)
            out.path[b, : len(tokens)] = torch.tensor([0, *(n + 1 for n in path)])
        else:
            out.accepted[b] = 0


class Target(NamedTuple):
    """What is left of the target's distribution at a node: integer weights, and their sum."""

    weights: Tensor  # i64 [1, V]
    total: Tensor  # i64 [1]

    def without(self, taken: Tensor) -> Target:
        """These weights, or still the same where nothing would be left."""
        left = taken.sum(-1)
        return self if int(left) == 0 else Target(taken, left)

    def draw(self, word: Tensor) -> Tensor:
        return draw(self.weights, word)[0]


class Sequence:
    """One sequence of the batch; its tensors keep a first dimension of 1."""

    def __init__(self, inputs: VerifyTreeInputs, b: int) -> None:
        self.inputs, self.tree, self.b = inputs, inputs.tree, b
        self.N, self.V = inputs.tree.tokens.shape[1], inputs.target_logits.shape[-1]
        self.parents = inputs.tree.parents[b].tolist()
        self.tokens = inputs.tree.tokens[b].tolist()
        self.rows = inputs.tree.rows[b].tolist()

    def verdict(self) -> tuple[Status, list[int], Tensor]:
        """Status, accepted nodes, and the token behind them."""
        path: list[int] = []
        node, token = ROOT, torch.tensor(-1)
        if not well_formed(self.tree, self.b, self.V):
            return Status.TOKEN, path, token
        while True:
            child: int | None = None
            status, target = self.target(node)
            if status is Status.OK:
                judge = self.tried if self.inputs.rule == "rejection" else self.met
                status, child, token = judge(node, target, len(path))
            if status is not Status.OK or child is None:
                return status, path, token
            node = child
            path.append(node)

    def children(self, node: int) -> list[int]:
        return [n for n in range(self.N) if self.parents[n] == node and self.tokens[n] >= 0]

    def target(self, node: int) -> tuple[Status, Target]:
        """The target's distribution behind a node."""
        row = self.inputs.target_logits[self.b, node + 1][None]
        distribution = empty_distribution(1, row.device)
        sampling = one_row(self.inputs.sampling, self.b)
        row_distribution(RowDistributionInputs(row, sampling), out=distribution)
        left = Target(weights(row, distribution), distribution.total)
        return Status(int(distribution.status)), left

    def met(self, node: int, target: Target, depth: int) -> tuple[Status, int | None, Tensor]:
        """The target's own token, and the child that has it, if there is one.

        It is drawn by inverse CDF, or under the coupled rule by the race of its absolute position.
        """
        random, b = self.inputs.random, self.b
        if self.inputs.rule == "coupled":
            ids = torch.arange(self.V, device=target.weights.device)
            if random.words is not None:
                words = random.words[b, depth][None]
            else:
                seed, first = (None if x is None else x[b : b + 1]
                               for x in (random.seed, random.position))  # fmt: skip
                words = race_words(seed, None if first is None else first + depth, ids)
            token = race(target.weights, words)[0]
        else:
            token = target.draw(self.word(node + 1, node + 1, Purpose.BONUS))
        same = [n for n in self.children(node) if self.tokens[n] == int(token)]
        return Status.OK, same[0] if same else None, token

    def tried(self, node: int, target: Target, depth: int) -> tuple[Status, int | None, Tensor]:
        """Children one after another: accepted iff u q(x) < p(x), else p becomes (p - q)+, scaled
        to 1, for the next; and one token from what is left of p behind the last."""
        taken: dict[int, list[int]] = {}  # columns that earlier siblings took, by row
        children = self.children(node)
        for n in children:
            x = self.tokens[n]
            p = probability(target.weights, target.total[:, None])
            status, q = self.drafted(n, taken)
            if status is not Status.OK:
                return status, None, torch.tensor(-1)
            if bool(unit(self.word(n, n, Purpose.ACCEPT)) * q[0, x] < p[0, x]):
                return Status.OK, n, torch.tensor(-1)
            if self.rows[n] < 0:
                left = target.weights.index_fill(1, torch.tensor([x], device=p.device), 0)
            else:
                left = excess(p, q)
            target = target.without(left)
        purpose = Purpose.RESIDUAL if children else Purpose.BONUS
        return Status.OK, None, target.draw(self.word(self.N, node + 1, purpose))

    def drafted(self, n: int, taken: dict[int, list[int]]) -> tuple[Status, Tensor]:
        """q [1, V] of a node: its record, without what earlier siblings took of it if they were
        drawn without replacement; or all at its token."""
        tree, x, row = self.tree, self.tokens[n], self.rows[n]
        q = torch.zeros(1, self.V, dtype=torch.float64, device=tree.tokens.device)
        if row < 0 or tree.logits is None or tree.distribution is None:
            q[0, x] = 1.0
            return Status.OK, q
        distribution = one_row(tree.distribution, row)
        e, total = weights(tree.logits[row][None], distribution), distribution.total
        ids = tree.draft_ids
        if ids is None:
            ids = torch.arange(self.V, device=e.device)
        if not tree.replacement:
            for column in taken.setdefault(row, []):
                total = total - e[:, column]
                e[:, column] = 0
        columns = (ids == x).nonzero().flatten().tolist()
        if not columns or int(e[0, columns[0]]) == 0:
            return Status.DRAFT, q
        taken.setdefault(row, []).append(columns[0])
        q[:, ids] = probability(e, total[:, None])
        return Status.OK, q

    def word(self, column: int, slot: int, purpose: Purpose) -> Tensor:
        """[1]"""
        random, b = self.inputs.random, self.b
        if random.words is not None:
            return random.words[b, column][None]
        if random.seed is None or random.round is None:
            raise ValueError("seed, round: expected tensors, got None; or pass words")
        return random_word(random.seed[b : b + 1], slot, random.round[b : b + 1], purpose)


def well_formed(tree: Tree, b: int, V: int) -> bool:
    """Whether row b is a tree of tokens, and its records are there."""
    tokens, parents, rows = (x[b].tolist() for x in (tree.tokens, tree.parents, tree.rows))
    R = 0 if tree.logits is None else len(tree.logits)
    siblings = set()
    for n, (token, parent, row) in enumerate(zip(tokens, parents, rows, strict=True)):
        if token == -1:
            continue
        if not 0 <= token < V or not ROOT <= parent < n or not -1 <= row < R:
            return False
        if parent != ROOT and tokens[parent] == -1:
            return False
        if (parent, token) in siblings and not tree.replacement:
            return False
        siblings.add((parent, token))
    return True
