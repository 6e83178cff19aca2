"""Small worlds of drafts whose every outcome can be counted."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

V, K = 3, 2
NEVER = float("-inf")
Text = tuple[int, ...]
Distribution = dict[Text, float]
Sampler = Callable[[Tensor], Tensor]  # f32 [N, V] -> one token of each row's softmax, [N]


class Drafted(NamedTuple):
    """N drafts and what is known of them. Rows are independent of each other."""

    tokens: Tensor  # i64 [N, K]
    draft_logits: Tensor  # f32 [N, K, V], the row that each token was drawn from
    target_logits: Tensor  # f32 [N, K + 1, V]
    steps: Tensor  # i32 [K], the reverse step that drew each position, counted from 0
    recorded: Tensor  # bool [K], whether its row may be used: no earlier position came later
    zero: bool = False  # take 0 for every uniform number; torch's are, see `zero_uniforms`

    def split(self, size: int) -> list[Drafted]:
        """The same rows in groups of at most `size`."""
        rows = (self.tokens, self.draft_logits, self.target_logits)
        return [
            Drafted(tokens, draft, target, *self[3:])
            for tokens, draft, target in zip(*(field.split(size) for field in rows), strict=True)
        ]


class Case(NamedTuple):
    """A world of two drafted positions. Tables of logits, indexed by the tokens they depend on."""

    name: str
    target: tuple[Tensor, ...]  # position i: [V] * i + [V]
    draft: tuple[Tensor, ...]  # position i: [V] * len(given[i]) + [V]
    given: tuple[tuple[int, ...], ...]  # drafted positions that each one is conditioned on
    steps: tuple[int, ...]  # the reverse step that draws each

    def recorded(self) -> list[bool]:
        """Rows that rejection sampling may use: no position to the left is drawn later."""
        return [all(self.steps[j] <= step for j in range(i)) for i, step in enumerate(self.steps)]

    def rows(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Logits of draft and target behind drafted tokens. [N, K] -> [N, K, V], [N, K + 1, V]"""
        columns = tokens.unbind(1)
        draft = [
            t[tuple(columns[j] for j in g)] for t, g in zip(self.draft, self.given, strict=True)
        ]
        draft = [row.expand(len(tokens), V) for row in draft]
        target = [t[columns[:i]].expand(len(tokens), V) for i, t in enumerate(self.target)]
        return torch.stack(draft, 1), torch.stack(target, 1)

    def drafted(self, tokens: Tensor) -> Drafted:
        """Drafts of these tokens, whichever they are. i64 [N, K]"""
        draft, target = self.rows(tokens)
        steps = torch.tensor(self.steps, dtype=torch.int32)
        return Drafted(tokens, draft, target, steps, torch.tensor(self.recorded()))

    def draw(self, N: int, sample: Sampler) -> Drafted:
        """N drafts, each position by `sample`, in the order of the reverse steps."""
        tokens = torch.zeros(N, K, dtype=torch.int64)
        for i in sorted(range(K), key=lambda position: self.steps[position]):
            tokens[:, i] = sample(self.rows(tokens)[0][:, i].contiguous())
        return self.drafted(tokens)

    def drafts(self) -> Iterator[tuple[Text, float, Tensor, Tensor]]:
        """Every draft with its chance, and the distributions q f64 [K, V] and p f64 [K + 1, V]
        around it."""
        for text in itertools.product(range(V), repeat=K):
            rows = self.rows(torch.tensor([text]))
            q, p = (row[0].double().softmax(-1) for row in rows)
            if (chance := _product(q, text)) > 0:
                yield text, chance, q, p

    def text_distribution(self) -> Distribution:
        """Distribution of K + 1 tokens of the target: the product of its rows."""
        distribution: Distribution = {}
        for text in itertools.product(range(V), repeat=K + 1):
            p = self.rows(torch.tensor([text[:K]]))[1][0].double().softmax(-1)
            distribution[text] = _product(p, text)
        return distribution

    def outcome_distribution(self) -> Distribution:
        """The accepted count and the emitted tokens under the token rule, as one tuple.

        Leviathan et al. 2023, Algorithm 1; Chen et al. 2023, Theorem 1. A token without a usable
        row counts as a bare guess: q is 1 on it.
        """
        distribution: Distribution = {}
        for text, chance, q, p in self.drafts():
            for i, token in enumerate(text):
                guess = torch.eye(V, dtype=torch.float64)[token]
                known = q[i] if self.recorded()[i] else guess
                left = (p[i] - known).clamp_min(0)
                stays = min(1.0, (p[i, token] / known[token]).item())
                for v in range(V) if left.sum() > 0 else ():
                    here = (i, *text[:i], v)
                    rejected = chance * (1 - stays) * (left[v] / left.sum()).item()
                    distribution[here] = distribution.get(here, 0.0) + rejected
                chance *= stays
            for v in range(V):
                whole = (K, *text, v)
                distribution[whole] = distribution.get(whole, 0.0) + chance * p[K, v].item()
        return distribution


def _product(rows: Tensor, text: Text) -> float:
    """Of row i's entry at token i."""
    return rows[torch.arange(len(text)), torch.tensor(text)].prod().item()


def _case(name: str, seed: int, given: Sequence[Text], steps: Text, *, zeros: bool = False) -> Case:
    """Random tables; zeros: some tokens are impossible for the target, others for the draft."""
    noise = torch.Generator().manual_seed(seed)

    def table(depth: int) -> Tensor:
        return 1.2 * torch.randn((V,) * (depth + 1), generator=noise)

    target = [table(i) for i in range(K + 1)]
    draft = [table(len(g)) for g in given]
    if zeros:
        target[0][0], target[1][..., 1] = NEVER, NEVER
        draft[1][..., 2] = NEVER
    return Case(name, tuple(target), tuple(draft), tuple(given), steps)


CASES: tuple[Case, ...] = (
    _case("autoregressive", 1, [(), (0,)], (0, 1)),
    _case("one reverse step", 2, [(), ()], (0, 0)),
    _case("impossible tokens", 3, [(), (0,)], (0, 1), zeros=True),
    _case("right to left", 4, [(1,), ()], (1, 0)),
)
