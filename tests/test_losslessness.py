"""Whole decoding runs, enumerated through the ops: the output law is the target's.

A target over V tokens and a drafter with reverse steps are random tables. Every draft, every
acceptance and every residual draw is followed with its exact probability (tests/enumeration.py).
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Callable
from fractions import Fraction
from functools import cache
from itertools import product
from typing import NamedTuple

import pytest
import torch

from specdiff_kernels import Draft, Verified, row_law, sample, use_backend, verify
from specdiff_kernels.reference.numerics import weights

from .enumeration import first_word, probabilities

Text = tuple[int, ...]
LENGTH = 3
SCHEDULES = ["one step", "chunks", "right to left", "random"]
MULTI_STEP = SCHEDULES[2:]


@pytest.fixture(params=["reference", "cpp"])
def backend(request):
    with use_backend(request.param):
        yield request.param


class Drafted(NamedTuple):
    """A draft, its probability, and the logits row that drew each token."""

    prefix: Text
    chance: Fraction
    tokens: tuple
    rows: tuple
    tau: tuple[int, ...]


class World:
    """A random target and a random drafter over V tokens."""

    def __init__(self, V: int, schedule: str, record: str, seed: int):
        self.V, self.schedule, self.record, self.seed = V, schedule, record, seed

    @cache  # noqa: B019 the world lives as long as its test
    def logits(self, *key) -> torch.Tensor:
        noise = random.Random(f"{self.seed} {key}")
        return torch.tensor([noise.gauss(0, 1.5) for _ in range(self.V)])

    def reveal_steps(self, prefix: Text) -> tuple[int, ...]:
        """tau of each position; it depends on the prefix, never on drafted values."""
        K = LENGTH - len(prefix)
        order = list(range(K))
        random.Random(f"{prefix}").shuffle(order)
        return {
            "one step": (0,) * K,
            "chunks": (0, 1, 1)[:K],
            "right to left": tuple(reversed(range(K))),
            "random": tuple(order),
        }[self.schedule]

    def target_law(self) -> dict[Text, float]:
        """Product of the target's row laws."""
        law = {(): 1.0}
        for _ in range(LENGTH):
            longer = {}
            for text, chance in law.items():
                row = self.logits("target", text)[None]
                e = weights(row, row_law(row))[0].tolist()
                for v in range(self.V):
                    longer[(*text, v)] = chance * e[v] / sum(e)
            law = longer
        return law

    def drafts(self, prefixes: list[Text]) -> list[Drafted]:
        """All drafts behind prefixes of one length, each position drawn by `sample` in its step."""
        K = LENGTH - len(prefixes[0])
        partial = [
            Drafted(prefix, Fraction(1), (None,) * K, (None,) * K, self.reveal_steps(prefix))
            for prefix in prefixes
        ]
        for step in range(K):
            asked = [(d, i) for d in partial for i in range(K) if d.tau[i] == step]
            if not asked:
                continue
            logits = torch.stack([self.logits("draft", d.prefix, d.tokens, i) for d, i in asked])
            law = row_law(logits)
            found = probabilities(
                lambda w, x=logits, y=law: sample(x, y, words=w), len(asked), self.V
            )
            laws = {(d.prefix, d.tokens, i): found[n] for n, (d, i) in enumerate(asked)}
            partial = [grown for d in partial for grown in self.reveal(d, step, laws)]
        return partial

    def reveal(self, d: Drafted, step: int, laws: dict) -> list[Drafted]:
        """Every way in which one reverse step may continue a draft."""
        positions = [i for i, tau in enumerate(d.tau) if tau == step]
        grown = []
        for values in product(range(self.V), repeat=len(positions)):
            tokens, rows, chance = list(d.tokens), list(d.rows), d.chance
            for i, v in zip(positions, values, strict=True):
                tokens[i], rows[i] = v, self.logits("draft", d.prefix, d.tokens, i)
                chance *= laws[d.prefix, d.tokens, i][v]
            grown.append(d._replace(chance=chance, tokens=tuple(tokens), rows=tuple(rows)))
        return grown

    def outcomes(self, drafts: list[Drafted]) -> Callable[[torch.Tensor], Verified]:
        """`verify` of every draft K + 1 times over: words [drafts * (K + 1), K + 1] -> Verified."""
        K = len(drafts[0].tokens)
        texts = [[d.prefix + d.tokens[:i] for i in range(K + 1)] for d in drafts]
        target = torch.stack(
            [torch.stack([self.logits("target", text) for text in row]) for row in texts]
        )
        pool = torch.stack([row for d in drafts for row in d.rows])
        rows = torch.arange(len(pool)).view(-1, K)
        if self.record == "one-hot":
            rows = torch.full_like(rows, -1)
        tau = torch.tensor([d.tau for d in drafts], dtype=torch.int32)
        if self.record == "everywhere":
            tau = torch.zeros_like(tau)  # claims that one step drew everything
        tokens = torch.tensor([d.tokens for d in drafts])
        tokens, tau, rows, target = (
            x.repeat_interleave(K + 1, 0) for x in (tokens, tau, rows, target)
        )
        draft = Draft(tokens, tau, rows, pool, row_law(pool))
        return lambda words: verify(target, draft, words=words)

    def rounds(self, prefixes: list[Text]) -> dict[Text, dict[Text, Fraction]]:
        """For each prefix the law of the prefix extended by one round."""
        drafts = self.drafts(prefixes)
        K = len(drafts[0].tokens)
        outcome = self.outcomes(drafts)
        stop = torch.arange(K + 1).repeat(len(drafts))  # the position that is asked about
        row = torch.arange(len(stop))
        words = torch.zeros(len(stop), K + 2, dtype=torch.int64)  # u = 0 accepts whatever has p > 0

        def asked(column: torch.Tensor | int, word: torch.Tensor) -> Verified:
            changed = words.clone()
            changed[row, column] = word
            return outcome(torch.cat((changed[:, :K], changed[:, -1:]), 1))

        accept = first_word(lambda word: asked(stop, word).accepted <= stop, len(stop))
        words[row, stop] = -1  # the largest u: position `stop` ends the round
        last = probabilities(lambda word: asked(-1, word).emitted[row, stop], len(stop), self.V)

        laws: dict = {prefix: defaultdict(Fraction) for prefix in prefixes}
        for n, d in enumerate(drafts):
            alive = d.chance
            for i in range(K + 1):
                at = n * (K + 1) + i
                accepted = Fraction(accept[at], 2**64) if i < K else Fraction(0)
                for v in range(self.V):
                    text = (*d.prefix, *d.tokens[:i], v)
                    laws[d.prefix][text] += alive * (1 - accepted) * last[at][v]
                alive *= accepted
        return laws

    def output_law(self) -> dict[Text, Fraction]:
        """Law of the text of whole runs, cut at LENGTH."""
        law: dict[Text, Fraction] = defaultdict(Fraction)
        waiting: dict[Text, Fraction] = defaultdict(Fraction, {(): Fraction(1)})
        for length in range(LENGTH):
            prefixes = [text for text in waiting if len(text) == length]
            for prefix, extended in self.rounds(prefixes).items():
                for text, chance in extended.items():
                    longer = law if len(text) >= LENGTH else waiting
                    longer[text[:LENGTH]] += waiting[prefix] * chance
        return law

    def distance(self) -> float:
        """Total variation between the output law and the target's."""
        law, target = self.output_law(), self.target_law()
        return sum(abs(float(law.get(text, 0)) - p) for text, p in target.items()) / 2


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("V", [2, 3])
@pytest.mark.parametrize("record", ["running max", "one-hot"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_output_law_is_the_targets(schedule, record, V):
    assert World(V, schedule, record, seed=V).distance() < 1e-12


@pytest.mark.usefixtures("backend")
@pytest.mark.parametrize("schedule", MULTI_STEP)
def test_recording_everywhere_is_biased(schedule):
    """The rule matters: the same drafts with q recorded everywhere leave the target's law."""
    biases = [World(2, schedule, "everywhere", seed).distance() for seed in range(3)]
    assert max(biases) > 1e-3
