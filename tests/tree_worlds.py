"""Trees in small random worlds, enumerated through `build_tree` and `verify_tree`.

A target over V tokens and a drafter are random tables. Every drafted token, every acceptance and
every token that ends a round is followed with its exact probability, which is found from the
outside of the ops: see tests/enumeration.py.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from specdiff_kernels import Tree, build_tree, row_distribution, verify_tree
from specdiff_kernels.corrections import Correction
from specdiff_kernels.reference.numerics import weights

from .enumeration import WORDS, first_word, patterns, probabilities
from .worlds import Text, share_out

Ends = dict[Text, float]  # texts, cut off where a round ended, with their probabilities
Sampling = dict[str, float]
ROOT, NOWHERE = -1, -1  # as a parent; as a token
LEAST, MOST = 0, -1  # words: the smallest u accepts if any does; the largest refuses if any does


def all_shapes(n: int) -> Iterator[tuple[int, ...]]:
    """The parents of n nodes in every way in which they come before their children."""
    return product(*(range(-1, node) for node in range(n)))


def ordered_shapes(n: int) -> Iterator[tuple[int, ...]]:
    """The same without those that differ only in how the nodes are numbered: each node hangs on
    the path that ends with the node before it, so that these are the trees depth first."""
    for shape in all_shapes(n):
        above = [path_to(shape, node) for node in range(n)]
        if all(shape[node] in (ROOT, *above[node - 1]) for node in range(1, n)):
            yield shape


class Grove(NamedTuple):
    """Trees that may come about, as the rows of one Tree."""

    prefixes: list[Text]  # the text before each
    chances: list[float]
    tree: Tree

    def select(self, rows: list[int]) -> Tree:
        """Trees with these numbers, in which one may come several times."""
        tree = self.tree
        return tree._replace(
            tokens=tree.tokens[rows], parents=tree.parents[rows], rows=tree.rows[rows]
        )

    def nodes(self) -> list[Nodes]:
        tree = self.tree
        fields = (tree.tokens.tolist(), map(tuple, tree.parents.tolist()), tree.rows.tolist())
        return [Nodes(*node) for node in zip(*fields, strict=True)]

    def altered(self, alter: Callable[[Nodes], None]) -> Grove:
        """These trees with other nodes. What hangs on a place without a node goes as well."""
        changed = self.nodes()
        for nodes in changed:
            alter(nodes)
            nodes.prune()
        tokens, parents, rows = (torch.tensor(field) for field in zip(*changed, strict=True))
        return self._replace(tree=self.tree._replace(tokens=tokens, parents=parents, rows=rows))


class Nodes(NamedTuple):
    """One tree."""

    tokens: list[int]
    parents: tuple[int, ...]
    rows: list[int]

    def path(self, n: int) -> tuple[int, ...]:
        return path_to(self.parents, n)

    def text(self, n: int) -> Text:
        return tuple(self.tokens[node] for node in self.path(n))

    def children(self, node: int) -> list[int]:
        return [n for n, parent in enumerate(self.parents)
                if parent == node and self.tokens[n] >= 0]  # fmt: skip

    def earlier(self, n: int) -> list[int]:
        """Siblings that are tried before n."""
        return [s for s in self.children(self.parents[n]) if s < n]

    def seen(self, n: int) -> list[int]:
        """The tokens that a verification has met when it comes to n: the path's and the earlier
        siblings'."""
        return [*self.text(self.parents[n]), *(self.tokens[s] for s in self.earlier(n))]

    def drop(self, n: int) -> None:
        self.tokens[n], self.rows[n] = NOWHERE, -1

    def guess(self, n: int, token: int) -> None:
        self.tokens[n], self.rows[n] = token, -1

    def prune(self) -> None:
        for n, parent in enumerate(self.parents):
            if parent != ROOT and self.tokens[parent] == NOWHERE:
                self.drop(n)

    def words_to(self, n: int) -> list[int]:
        """Words under which the rule "rejection" comes to n and tries it: those on the path are
        accepted, all siblings before them are not."""
        words = [LEAST] * (len(self.tokens) + 1)
        for node in self.path(n):
            for sibling in self.earlier(node):
                words[sibling] = MOST
        return words


@cache
def path_to(parents: tuple[int, ...], n: int) -> tuple[int, ...]:
    """The nodes from the root to n, which is the last."""
    return () if n == ROOT else (*path_to(parents, parents[n]), n)


class TreeWorld:
    """A random target and a random drafter over V tokens.

    K: how deep trees are at most.
    corrected: whether the drafter's logits are corrected by the token before.
    draft_ids: the tokens that the drafter knows.
    sampling, draft_sampling: of the target's and the drafter's distributions.
    """

    def __init__(
        self,
        V: int,
        seed: int,
        *,
        K: int = 5,
        corrected: bool = False,
        draft_ids: list[int] | None = None,
        sampling: Sampling | None = None,
        draft_sampling: Sampling | None = None,
    ) -> None:
        self.V, self.seed, self.K, self.corrected = V, seed, K, corrected
        self.draft_ids = None if draft_ids is None else torch.tensor(draft_ids)
        self.Vd = V if draft_ids is None else len(draft_ids)
        self.sampling, self.draft_sampling = sampling or {}, draft_sampling or {}

    @cache  # noqa: B019 the world lives as long as its test
    def noise(self, size: int, *key) -> Tensor:
        noise = random.Random(f"{self.seed} {key}")
        return torch.tensor([noise.gauss(0, 1.5) for _ in range(size)])

    def target(self, text: Text) -> Tensor:
        return self.noise(self.V, "target", text)

    @cache  # noqa: B019
    def weights(self, text: Text) -> list[int]:
        """Of the target's tokens behind a text."""
        row = self.target(text)[None]
        return weights(row, row_distribution(row, **self.sampling))[0].tolist()

    def p(self, text: Text) -> list[float]:
        e = self.weights(text)
        return [x / sum(e) for x in e]

    # --- drafting -------------------------------------------------------------------------------

    def drawn(
        self, prefixes: dict[Text, float], shape: tuple[int, ...], *, replacement: bool
    ) -> Grove:
        """All the trees of a shape that may be drawn behind each prefix."""
        found: list[tuple[Text, float, list[int]]] = [(*item, []) for item in prefixes.items()]
        for n in range(len(shape)):
            before = [text for text, *_ in found]
            earlier = torch.stack([patterns(words) for *_, words in found])
            rest = torch.zeros(len(found), len(shape) - n - 1, dtype=torch.int64)

            def tree(words: Tensor, n=n, before=before, earlier=earlier, rest=rest) -> Tree:
                words = torch.cat((earlier, words[:, None], rest), 1)
                return self.grown(before, len(shape), shape, replacement, words)

            expected = [begins(e) for e in left_of(tree(torch.zeros(len(found)).long()), n, self.V)]
            distributions = probabilities(
                lambda words, n=n, tree=tree: tree(words).tokens[:, n],
                len(found), self.V, expected,
            )  # fmt: skip
            found = [
                (text, chance * float(share), [*words, word])
                for (text, chance, words), distribution in zip(found, distributions, strict=True)
                for share, word in share_out(distribution)
            ]
        before, chances = [text for text, *_ in found], [chance for _, chance, _ in found]
        words = torch.stack([patterns(words) for *_, words in found])
        return Grove(before, chances, self.grown(before, len(shape), shape, replacement, words))

    def likeliest(self, prefixes: dict[Text, float], N: int) -> Grove:
        """The best tree of N nodes behind each prefix."""
        return Grove(list(prefixes), list(prefixes.values()), self.grown(list(prefixes), N))

    def grown(
        self,
        prefixes: list[Text],
        N: int,
        shape: tuple[int, ...] | None = None,
        replacement: bool = False,
        words: Tensor | None = None,
    ) -> Tree:
        correction, anchor = None, None
        if self.corrected:
            correction = Correction(
                torch.stack([self.noise(2, "code", v) for v in range(self.V)]),
                torch.stack([self.by_depth(2, "inner", text) for text in prefixes]),
                torch.stack([self.noise(2, "head", v) for v in range(self.Vd)]),
            )
            anchor = torch.tensor([text[-1] if text else 0 for text in prefixes])
        return build_tree(
            torch.stack([self.by_depth(self.Vd, "draft", text) for text in prefixes]),
            N,
            shape=None if shape is None else torch.tensor(shape, dtype=torch.int64),
            replacement=replacement,
            correction=correction,
            anchor=anchor,
            draft_ids=self.draft_ids,
            words=words,
            **self.draft_sampling,
        )

    @cache  # noqa: B019
    def by_depth(self, size: int, what: str, text: Text) -> Tensor:
        return torch.stack([self.noise(size, what, text, depth) for depth in range(self.K)])

    def guesses(self, shape: tuple[int, ...], *, equal: bool) -> Grove:
        """All trees of guesses of a shape, as if they were equally likely. Siblings may be equal,
        or may not."""
        texts = [
            tokens
            for tokens in product(range(self.V), repeat=len(shape))
            if equal or len(set(zip(shape, tokens, strict=True))) == len(shape)
        ]
        tokens = torch.tensor(texts, dtype=torch.int64).view(-1, len(shape))
        parents = torch.tensor(shape, dtype=torch.int64).expand_as(tokens).contiguous()
        tree = Tree.guesses(tokens, parents)._replace(replacement=equal)
        return Grove([()] * len(texts), [1 / len(texts) for _ in texts], tree)

    # --- verification ---------------------------------------------------------------------------

    def ends(self, grove: Grove, rule: str) -> Ends:
        """The texts with which a round ends."""
        ends: Ends = defaultdict(float)
        if rule == "walk":
            for b, text, chance in self.walked(grove):
                ends[grove.prefixes[b] + text] += grove.chances[b] * chance
        else:
            gather(ends, grove, self.rejected(grove))
        return ends

    def target_rows(self, grove: Grove) -> Tensor:
        """[B, N + 1, V]; where there is no node, what must not be read."""
        nothing = torch.full((self.V,), float("nan"))
        return torch.stack([
            torch.stack([
                self.target(prefix + nodes.text(n))
                if n == ROOT or nodes.tokens[n] >= 0
                else nothing
                for n in range(-1, len(nodes.tokens))
            ])
            for prefix, nodes in zip(grove.prefixes, grove.nodes(), strict=True)
        ])  # fmt: skip

    def rejected(self, grove: Grove) -> list[Verdict]:
        """What the rule "rejection" does with each tree."""
        rows, trees = self.target_rows(grove), grove.nodes()
        N = len(trees[0].tokens)
        expected = plain(self, grove)
        found = [Verdict({}, {}, verdict.order) for verdict in expected]
        reached = [{ROOT} for _ in trees]
        for n in range(N):
            at = [b for b, nodes in enumerate(trees)
                  if nodes.tokens[n] >= 0 and nodes.parents[n] in reached[b]
                  and all(found[b].accept[s] < WORDS for s in nodes.earlier(n))]  # fmt: skip
            if not at:
                continue
            words = torch.tensor([trees[b].words_to(n) for b in at])
            target, tree = rows[at], grove.select(at)

            def stops(word: Tensor, n=n, words=words, target=target, tree=tree) -> Tensor:
                words = words.clone()
                words[:, n] = word
                verified = verify_tree(target, tree, words=words, **self.sampling)
                assert (verified.status == 0).all()
                return (verified.path != n + 1).all(1)

            edges = first_word(stops, len(at), [expected[b].accept[n] for b in at])
            for b, edge in zip(at, edges, strict=True):
                found[b].accept[n] = edge
                if edge > 0:
                    reached[b].add(n)

        ends = [(b, n) for b, nodes in enumerate(trees) for n in sorted(reached[b])
                if all(found[b].accept[child] < WORDS for child in nodes.children(n))]  # fmt: skip
        at = [b for b, _ in ends]
        target, tree = rows[at], grove.select(at)
        depth = torch.tensor([[len(trees[b].path(n))] for b, n in ends])
        refused = [trees[b].words_to(n) for b, n in ends]
        for (b, n), words in zip(ends, refused, strict=True):
            for child in trees[b].children(n):
                words[child] = MOST
        before = torch.tensor(refused)[:, :N]

        def token(word: Tensor) -> Tensor:
            words = torch.cat((before, word[:, None]), 1)
            verified = verify_tree(target, tree, words=words, **self.sampling)
            assert torch.equal(verified.accepted[:, None], depth)
            return verified.emitted.gather(1, depth)[:, 0]

        for v in range(1, self.V):
            expect = [expected[b].begins[n][v - 1] for b, n in ends]
            edges = first_word(lambda word, v=v: token(word) >= v, len(ends), expect)
            for (b, n), edge in zip(ends, edges, strict=True):
                found[b].begins.setdefault(n, []).append(edge)
        return found

    def walked(self, grove: Grove) -> Iterator[tuple[int, Text, float]]:
        """For each tree and each way in which the rule "walk" may end: the number of the tree, the
        tokens emitted, their probability. At each node the target's own token is drawn."""
        rows, trees = self.target_rows(grove), grove.nodes()
        N = len(trees[0].tokens)
        at = [(b, ROOT, [0] * (N + 1), 1.0) for b in range(len(trees))]  # with words that lead here
        depth = 0
        while at:
            which = [b for b, *_ in at]
            target, tree = rows[which], grove.select(which)
            before = torch.stack([patterns(words) for *_, words, _ in at])
            column = torch.tensor([node + 1 for _, node, *_ in at])
            row = torch.arange(len(at))

            def token(
                word: Tensor, target=target, tree=tree, before=before, column=column, row=row,
                depth=depth,
            ) -> Tensor:  # fmt: skip
                words = before.clone()
                words[row, column] = word
                verified = verify_tree(target, tree, rule="walk", words=words, **self.sampling)
                assert (verified.status == 0).all()
                return verified.emitted[:, depth]

            expected = [
                begins(self.weights(grove.prefixes[b] + trees[b].text(node))) for b, node, *_ in at
            ]
            distributions = probabilities(token, len(at), self.V, expected)
            further = []
            for (b, node, words, chance), shares in zip(at, distributions, strict=True):
                nodes, text = trees[b], trees[b].text(node)
                child_with = {nodes.tokens[n]: n for n in reversed(nodes.children(node))}
                for v, share in enumerate(shares):
                    if v not in child_with:
                        yield b, (*text, v), chance * float(share)
                        continue
                    middle = (sum(shares[:v]) + share / 2) * WORDS
                    there = [*words]
                    there[node + 1] = int(middle)
                    if share:
                        further.append((b, child_with[v], there, chance * float(share)))
            at, depth = further, depth + 1

    # --- what comes of it -----------------------------------------------------------------------

    def distance(self, ends: Ends, length: int) -> float:
        """Total variation of the text of so many tokens from the target's, if the target goes on
        behind the end of a round; texts that are longer are cut."""
        texts: Ends = defaultdict(float)
        for text, chance in ends.items():
            texts[text[:length]] += chance
        given, total = {(): (1.0, texts[()])}, 0.0
        for _ in range(length):
            given = {
                (*text, v): (p * share, mass * share + texts[(*text, v)])
                for text, (p, mass) in given.items()
                for v, share in enumerate(self.p(text))
            }
        total = sum(abs(mass - p) for p, mass in given.values())
        return total / 2

    def run(
        self, draft: Callable[[dict[Text, float]], list[Grove]], rule: str, length: int
    ) -> float:
        """The same of whole decoding runs.

        draft: texts of one length with the chance that a round begins behind them -> trees.
        """
        waiting: Ends = defaultdict(float, {(): 1.0})
        for n in range(length):
            begun = {text: waiting.pop(text) for text in list(waiting) if len(text) == n}
            if not begun:
                continue
            for grove in draft(begun):
                for text, chance in self.ends(grove, rule).items():
                    waiting[text[:length]] += chance
        return self.distance(waiting, length)


# --- the rule "rejection" in plain Python ---------------------------------------------------------


class Verdict(NamedTuple):
    """What is done with one tree."""

    accept: dict[int, int]  # of each node that may be tried: the first word that refuses it
    begins: dict[int, list[int]]  # of each where a round may end: where the tokens 1, 2, .. begin
    order: dict[int, list[int]]  # in which the children of each are tried


class Mistake(NamedTuple):
    """What `plain` may do wrong."""

    stale: bool = False  # every sibling is judged by the target's own p
    by_target: bool = False  # children are tried in the order of the target's probability
    whole: bool = False  # q is that of the whole row, though siblings were taken out of it


def plain(world: TreeWorld, grove: Grove, mistake: Mistake = Mistake()) -> list[Verdict]:  # noqa: B008
    """Verdicts by docs/numerics.md, in Python's integers and floats."""
    tree = grove.tree
    ids = list(range(world.V)) if tree.draft_ids is None else tree.draft_ids.tolist()
    pool = []
    if tree.logits is not None:
        pool = [[dict(zip(ids, e, strict=True)).get(v, 0) for v in range(world.V)]
                for e in weights(tree.logits, tree.distribution).tolist()]  # fmt: skip

    def judge(text: Text, nodes: Nodes) -> Verdict:
        verdict = Verdict({}, {}, {})
        for node in [ROOT, *(n for n, token in enumerate(nodes.tokens) if token >= 0)]:
            own = W = world.weights(text + nodes.text(node))
            children, taken = nodes.children(node), defaultdict(list)
            if mistake.by_target:
                children.sort(key=lambda n: -own[nodes.tokens[n]])
            verdict.order[node] = children
            for n in children:
                x, row = nodes.tokens[n], nodes.rows[n]
                W = own if mistake.stale else W
                P = scaled(W)
                if row < 0:
                    verdict.accept[n] = first_refusal(1.0, P[x])
                    left = [0 if v == x else e for v, e in enumerate(W)]
                else:
                    q = scaled([0 if v in taken[row] else e for v, e in enumerate(pool[row])])
                    if not tree.replacement and not mistake.whole:
                        taken[row].append(x)
                    verdict.accept[n] = first_refusal(q[x], P[x])
                    left = [int(max(a - b, 0.0) * 2.0**60) for a, b in zip(P, q, strict=True)]
                W = left if sum(left) else W
            verdict.begins[node] = begins(W)
        return verdict

    return [judge(*item) for item in zip(grove.prefixes, grove.nodes(), strict=True)]


def mistaken(world: TreeWorld, grove: Grove, mistake: Mistake) -> Ends:
    """The texts with which a round ends, by a verifier in plain Python."""
    ends: Ends = defaultdict(float)
    gather(ends, grove, plain(world, grove, mistake))
    return ends


def gather(ends: Ends, grove: Grove, verdicts: list[Verdict]) -> None:
    """Adds the texts with which a round ends."""

    def visit(nodes: Nodes, verdict: Verdict, node: int, text: Text, chance: float) -> None:
        for n in verdict.order[node]:
            if not chance:
                return
            accept = verdict.accept[n] / WORDS
            if accept:
                visit(nodes, verdict, n, (*text, nodes.tokens[n]), chance * accept)
            chance *= (WORDS - verdict.accept[n]) / WORDS
        if chance:
            edges = [0, *verdict.begins[node], WORDS]
            for v in range(len(edges) - 1):
                ends[(*text, v)] += chance * ((edges[v + 1] - edges[v]) / WORDS)

    trees = zip(grove.prefixes, grove.chances, grove.nodes(), verdicts, strict=True)
    for prefix, chance, nodes, verdict in trees:
        visit(nodes, verdict, ROOT, prefix, chance)


def scaled(e: list[int]) -> list[float]:
    """fl(e fl(1 / Z))"""
    return [float(x) * (1.0 / float(sum(e))) for x in e]


def first_refusal(q: float, P: float) -> int:
    """The first word under which fl(u q) < P does not hold, or 2^64."""
    k = min(int(P / q * 2.0**53), 2**53)
    while k > 0 and (k - 1) * 2.0**-53 * q >= P:
        k -= 1
    while k < 2**53 and k * 2.0**-53 * q < P:
        k += 1
    return k << 11


def begins(e: list[int]) -> list[int]:
    """The first words under which a draw by integer weights gives 1, 2, .. or a later token."""
    total = sum(e)
    if total == 0:  # nothing is drawn
        return [WORDS] * (len(e) - 1)
    return [-(-(sum(e[:v]) * WORDS) // total) for v in range(1, len(e))]


def left_of(tree: Tree, n: int, V: int) -> list[list[int]]:
    """For each tree the weights from which the token at place n was drawn; 0 without a node."""
    trees = Grove([], [], tree).nodes()
    at = [nodes.rows[n] for nodes in trees]
    e = torch.zeros(len(trees), V, dtype=torch.int64)
    columns = torch.arange(V) if tree.draft_ids is None else tree.draft_ids
    drawn = type(tree.distribution)(*(field[at] for field in tree.distribution))
    e[:, columns] = weights(tree.logits[at], drawn)
    for b, nodes in enumerate(trees):
        if at[b] < 0:
            e[b] = 0
        elif not tree.replacement:
            e[b, [nodes.tokens[s] for s in nodes.earlier(n)]] = 0
    return e.tolist()
