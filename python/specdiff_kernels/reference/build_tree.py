"""A tree of drafted tokens, sequence by sequence."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from ..corrections import Corrected
from ..inputs import BuildTreeInputs, RowDistributionInputs, SkinnyLinearInputs
from ..trees import ROOT, Grown
from ..types import Purpose, RowDistribution
from .numerics import draw, random_word, weights
from .row_distribution import row_distribution
from .skinny_linear import skinny_linear
from .verify import empty_distribution, one_row


def build_tree(inputs: BuildTreeInputs, *, out: Grown, corrected: Corrected | None = None) -> None:
    """Rows of draft logits -> N nodes for each of B sequences."""
    for field in out.distribution:
        field.zero_()
    for b in range(len(out.tokens)):
        one = Sequence(inputs, corrected, out.distribution, b)
        grown = one.likeliest() if inputs.shape is None else one.sampled(inputs.shape.tolist())
        out.tokens[b], out.parents[b], out.rows[b], out.chances[b] = -1, ROOT, -1, 0.0
        for n, node in enumerate(grown):
            if node is None:
                continue
            token = node.column if inputs.draft_ids is None else inputs.draft_ids[node.column]
            out.tokens[b, n], out.parents[b, n] = token, node.parent
            out.rows[b, n] = -1 if inputs.shape is None else node.row
            out.chances[b, n] = node.chance


class Row(NamedTuple):
    """The tokens that may follow a node."""

    weights: Tensor  # i64 [Vd]
    total: int
    number: int  # in the pool


class Node(NamedTuple):
    parent: int
    depth: int
    column: int
    row: int  # of the pool
    chance: float  # product of the path's probabilities, from the root on


class Sequence:
    """One sequence of the batch."""

    def __init__(
        self,
        inputs: BuildTreeInputs,
        corrected: Corrected | None,
        distribution: RowDistribution,
        b: int,
    ) -> None:
        self.inputs, self.distribution, self.b = inputs, distribution, b
        self.corrected = corrected
        K = inputs.K
        self.depth = K if inputs.lengths is None else min(K, max(0, int(inputs.lengths[b])))
        self.nodes: list[Node | None] = []
        self.rows: dict[int, Row | None] = {}  # by their number

    def likeliest(self) -> list[Node | None]:
        """Best first: the node added next is the likeliest path that is not there yet.

        A parent's children come in the order of their weights, of equal ones the lower column
        first. Of the next children of all parents the one with the greatest chance is added, of
        equal ones that of the lower parent. Where no token has any weight left, nothing is added.
        """
        children = {ROOT: 0}
        while len(self.nodes) < self.inputs.N:
            best: Node | None = None
            for parent in sorted(children):
                child = self.next_child(parent, children[parent])
                if child is not None and (best is None or child.chance > best.chance):
                    best = child
            if best is None:
                break
            children[len(self.nodes)] = 0
            children[best.parent] += 1
            self.nodes.append(best)
        return self.nodes

    def next_child(self, parent: int, number: int) -> Node | None:
        """The likeliest child behind so many."""
        row = self.row_behind(parent)
        if row is None or number == len(row.weights):
            return None
        column = int(row.weights.sort(descending=True, stable=True).indices[number])
        return self.child(parent, row, column) if row.weights[column] > 0 else None

    def sampled(self, shape: list[int]) -> list[Node | None]:
        """A token drawn for each place of the shape, unless its parent has none, or siblings have
        left nothing of the distribution."""
        taken: dict[int, list[int]] = {}
        for n, parent in enumerate(shape):
            node, row = None, self.row_behind(parent)
            if row is not None:
                left, earlier = row.weights.clone(), taken.setdefault(parent, [])
                if not self.inputs.replacement:
                    left[earlier] = 0
                row = Row(left, int(left.sum()), row.number)
                if row.total > 0:
                    column = int(draw(left[None], self.word(n)))
                    earlier.append(column)
                    node = self.child(parent, row, column)
            self.nodes.append(node)
        return self.nodes

    def child(self, parent: int, row: Row, column: int) -> Node:
        depth, chance = self.at(parent)
        e, total = (torch.tensor(float(int(x)), dtype=torch.float64)
                    for x in (row.weights[column], row.total))  # fmt: skip
        return Node(parent, depth + 1, column, row.number, float(chance * (e * (1.0 / total))))

    def at(self, node: int) -> tuple[int, float]:
        """Depth and chance of a node."""
        if node == ROOT:
            return 0, 1.0
        found = self.nodes[node]
        return (self.depth, 0.0) if found is None else (found.depth, found.chance)

    def row_behind(self, parent: int) -> Row | None:
        """What may follow a node; None: nothing, as it lies too deep or is not there."""
        depth, _ = self.at(parent)
        if depth == self.depth:
            return None
        inputs, b = self.inputs, self.b
        number = b * inputs.K + depth
        if self.corrected is not None:
            base, number = number, b * (inputs.N + 1) + parent + 1
        if number in self.rows:
            return self.rows[number]
        if self.corrected is not None:
            inputs.logits[number] = self.after(self.corrected, parent, depth, base)
        logits = inputs.logits[number][None]
        sampling = one_row(inputs.sampling, b)
        distribution = empty_distribution(1, logits.device)
        row_distribution(RowDistributionInputs(logits, sampling), out=distribution)
        for all_rows, own in zip(self.distribution, distribution, strict=True):
            all_rows[number] = own[0]
        row = Row(weights(logits, distribution)[0], int(distribution.total[0]), number)
        self.rows[number] = row if int(distribution.status[0]) == 0 else None
        return self.rows[number]

    def after(self, corrected: Corrected, parent: int, depth: int, base: int) -> Tensor:
        """Logits of the tokens behind a node, [Vd]."""
        logits, (codes, inner, weight), anchor = corrected
        above = None if parent == ROOT else self.nodes[parent]
        ids, token = self.inputs.draft_ids, anchor[self.b]
        if above is not None:
            token = torch.tensor(above.column) if ids is None else ids[above.column]
        code = codes[token] if inner is None else codes[token] + inner[self.b, depth]
        W, Vd = (weight, len(weight)) if isinstance(weight, Tensor) else weight
        change = torch.empty_like(logits[base][None])
        skinny_linear(SkinnyLinearInputs(F.silu(code)[None], W, Vd, None), out=change)
        return logits[base] + change[0]

    def word(self, n: int) -> Tensor:
        """Of node n's draw. [1]"""
        random, b = self.inputs.random, self.b
        if random.words is not None:
            return random.words[b, n][None]
        if random.seed is None or random.round is None:
            raise ValueError("seed, round: expected tensors, got None; or pass words")
        return random_word(random.seed[b : b + 1], n, random.round[b : b + 1], Purpose.DRAFT)
