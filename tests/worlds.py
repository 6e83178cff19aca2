"""Whole decoding runs in small random worlds, enumerated through the ops.

A target over V tokens and a drafter with reverse steps are random tables. Every reveal, every
draft, every acceptance and every residual draw is followed with its exact probability, which is
found from the outside of the ops: see tests/enumeration.py.
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Iterable
from fractions import Fraction
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor

from specdiff.drafters.sedd import carry_over
from specdiff_kernels import (
    Draft,
    Lenience,
    Reveal,
    Verified,
    denoise_step,
    row_distribution,
    verify,
)
from specdiff_kernels.reference.numerics import weights

from .enumeration import WORDS, first_word, patterns, probabilities

Text = tuple[int, ...]
REMASK = "remask"  # in place of a Reveal: mask the least likely of the drawn tokens again

SCHEDULES: dict[str, list] = {
    "one step": [Reveal.all()],
    "chunks": [Reveal.chunk(0, 1), Reveal.all()],
    "random": [Reveal.sedd(0.3), Reveal.sedd(0.3), Reveal.all()],
    "first-hitting": [Reveal.first_hitting(), Reveal.first_hitting(), Reveal.all()],
    "right first": [Reveal.chunk(2, 3), Reveal.chunk(1, 2), Reveal.all()],
    "entropy": [Reveal.lowest_entropy(1), Reveal.lowest_entropy(1), Reveal.all()],
    "confidence": [Reveal.highest_confidence(1), Reveal.highest_confidence(1), Reveal.all()],
    "remasking": [Reveal.all(), REMASK, Reveal.all()],
    "sequential head": [Reveal.chunk(0, 1), Reveal.chunk(1, 2), Reveal.all()],
}


class Way(NamedTuple):
    """How drafts are verified and what becomes of them."""

    record: str | None = None  # of `verify`; "forced": q everywhere, by a false tau
    rule: str = "token"
    hot_start: str | None = None  # "entangled", "recycled", or "entangled anew": kept once only
    withhold: str | None = None  # "entropy" (before sampling) or "value" (after it)
    forget: bool = False  # hide that sampled values decided on the reveal, or that tokens stayed
    lenience: Lenience | None = None
    uncorrected: bool = False  # record what a sequential head's correction was added to


class State(NamedTuple):
    """A text and the draft behind it, with masks in it or not."""

    prefix: Text
    tokens: Text  # -1: masked
    tau: Text
    origins: tuple  # of each token, the prefix and tokens that its distribution depends on, or None
    final_step: int | None = None
    value_dependent: bool = False


Distribution = dict[State, Fraction]


class World:
    """A random target and a random drafter over V tokens, and texts of `length` of them.

    schedule: a name in SCHEDULES, or reverse steps.
    """

    def __init__(self, V: int, schedule: str | list, seed: int, *, length: int = 3) -> None:
        self.V, self.schedule, self.seed, self.length = V, schedule, seed, length
        self.reveals = SCHEDULES[schedule] if isinstance(schedule, str) else schedule
        self.drafted: dict[State, Distribution] = {}

    def fresh(self, prefix: Text) -> State:
        """The state at the begin of a round behind `prefix`, all masked."""
        K = self.length - len(prefix)
        return State(prefix, (-1,) * K, (-1,) * K, (None,) * K)

    @cache  # noqa: B019 the world lives as long as its test
    def logits(self, *key) -> Tensor:
        noise = random.Random(f"{self.seed} {key}")
        return torch.tensor([noise.gauss(0, 1.5) for _ in range(self.V)])

    def target_distribution(self) -> dict[Text, float]:
        """Product of the target's row distributions."""
        distribution = {(): 1.0}
        for _ in range(self.length):
            longer = {}
            for text, chance in distribution.items():
                row = self.logits("target", text)[None]
                e = weights(row, row_distribution(row))[0].tolist()
                for v in range(self.V):
                    longer[(*text, v)] = chance * e[v] / sum(e)
            distribution = longer
        return distribution

    # --- drafting -------------------------------------------------------------------------------

    def drafts(self, states: list[State]) -> dict[State, Distribution]:
        """The distribution of the draft that follows from each state; all of one prefix length."""
        new = [state for state in states if state not in self.drafted]
        distributions: dict[State, Distribution] = {state: {state: Fraction(1)} for state in new}
        for number, reveal in enumerate(self.reveals):
            reached = list(
                dict.fromkeys(s for distribution in distributions.values() for s in distribution)
            )
            if reveal == REMASK:
                after = {s: {self.remasked(s): Fraction(1)} for s in reached}
            else:
                step = number + 10 * len(reached[0].prefix) if reached else 0  # grows
                after = self.step(reached, reveal, step)
            distributions = {
                start: compose(distribution, after) for start, distribution in distributions.items()
            }
        self.drafted.update(distributions)
        return {state: self.drafted[state] for state in states}

    def step(self, states: list[State], reveal: Reveal, step: int) -> dict[State, Distribution]:
        """The states that one `denoise_step` may make of each state. It is called once for every
        box of words in which it does the same."""
        open_ = [s for s in states if -1 in s.tokens]
        ends = {"final_step": step} if reveal.order.name == "ALL" else {}
        after: dict[State, Distribution] = {
            s: {s._replace(**ends): Fraction(1)} for s in states if s not in open_
        }
        if not open_:
            return after
        tokens, coins = (
            self.token_distributions(open_),
            self.coin_distributions(open_, reveal, step),
        )
        boxes = []  # state, its chance, words [K][2]
        for s, token, coin in zip(open_, tokens, coins, strict=True):
            for drawn, thrown in product(product(*token), product(*coin)):
                chance = Fraction(1)
                for share, _ in (*drawn, *thrown):
                    chance *= share
                words = [[t[1], c[1]] for c, t in zip(drawn, thrown, strict=True)]
                boxes.append((s, chance, words))
        batch, (B, K) = [s for s, _, _ in boxes], (len(boxes), len(open_[0].tokens))
        words = patterns([w for *_, box in boxes for pair in box for w in pair]).view(B, K, 2)
        done = denoise_step(self.draft_of(batch), reveal, step, words=words)
        for (s, chance, _), now, tau in zip(
            boxes, done.tokens.tolist(), done.tau.tolist(), strict=True
        ):
            fresh = [a != b for a, b in zip(now, s.tokens, strict=True)]
            origins = tuple((s.prefix, s.tokens) if f else o
                            for f, o in zip(fresh, s.origins, strict=True))  # fmt: skip
            state = State(s.prefix, tuple(now), tuple(tau), origins, done.final_step,
                          s.value_dependent or done.value_dependent)  # fmt: skip
            distribution = after.setdefault(s, {})
            distribution[state] = distribution.get(state, Fraction(0)) + chance
        return after

    def draft_of(self, states: list[State], *, unfinished: bool = True, **fields) -> Draft:
        """States as one Draft, row b K + i of the pool being position i of state b: its logits for
        the next step where it is masked (unfinished), those that it was drawn from elsewhere."""
        B, K = len(states), len(states[0].tokens)
        pool = torch.stack([
            self.drafters_row(s, i, (s.prefix, s.tokens) if o is None or t < 0 else o)
            for s in states
            for i, (t, o) in enumerate(zip(s.tokens, s.origins, strict=True))
        ])  # fmt: skip
        rows = torch.arange(B * K).view(B, K)
        recorded = torch.tensor([[o is not None for o in s.origins] for s in states])
        draft = Draft.masked(B, K, pool)._replace(
            tokens=torch.tensor([s.tokens for s in states]),
            tau=torch.tensor([s.tau for s in states], dtype=torch.int32),
            rows=rows.where(recorded, -1),
            **fields,
        )
        return draft if unfinished else draft._replace(distribution=row_distribution(pool))

    def drafters_row(self, s: State, i: int, seen: tuple) -> Tensor:
        """The drafter's logits at position i behind s.prefix, conditioned on what it has seen.

        A sequential head has seen the prefix and, of the draft, the token before.
        """
        position = len(s.prefix) + i
        if self.schedule != "sequential head":
            return self.logits("draft", *seen, position)
        before = (None, *seen[0], *seen[1])[position]
        return self.backbones_row(s, i, seen) + self.logits("head", seen[0], position, before)

    def backbones_row(self, s: State, i: int, seen: tuple) -> Tensor:
        """The same without the head's correction."""
        return self.logits("backbone", seen[0], len(s.prefix) + i)

    def token_distributions(self, states: list[State]) -> list[list[list[tuple[Fraction, int]]]]:
        """For each position the tokens it may draw, as (share of the words, one such word)."""
        draft, K = self.draft_of(states), len(states[0].tokens)
        n = len(states) * K

        def drawn(words: Tensor) -> Tensor:
            both = torch.stack((torch.zeros_like(words), words), 1).view(-1, K, 2)
            return denoise_step(draft, Reveal.all(), 99, words=both).tokens.flatten()

        distributions = probabilities(drawn, n, self.V)
        boxes = [
            share_out(distribution) if state.tokens[i] < 0 else [(Fraction(1), 0)]
            for (state, i), distribution in zip(
                product(states, range(K)), distributions, strict=True
            )
        ]
        return [boxes[b * K : (b + 1) * K] for b in range(len(states))]

    def coin_distributions(
        self, states: list[State], reveal: Reveal, step: int
    ) -> list[list[list[tuple[Fraction, int]]]]:
        """The same for the words that decide on the reveal."""
        draft, K = self.draft_of(states), len(states[0].tokens)
        one = [(Fraction(1), 0)]

        def revealed(coins: Tensor) -> Tensor:
            words = torch.stack((coins, torch.zeros_like(coins)), -1)
            done = denoise_step(draft, reveal, step, words=words)
            return (done.tokens >= 0) & (draft.tokens < 0)

        if reveal.order.name == "SEDD":
            at = lambda words: ~revealed(words.view(-1, K)).flatten()
            edges = first_word(at, len(states) * K)
            boxes = [share_out([Fraction(e, WORDS), 1 - Fraction(e, WORDS)]) for e in edges]
            return [[box if t < 0 else one for box, t in
                     zip(boxes[b * K : (b + 1) * K], s.tokens, strict=True)]
                    for b, s in enumerate(states)]  # fmt: skip
        if reveal.order.name == "FIRST_HITTING":
            which = lambda words: revealed(words[:, None].expand(-1, K)).long().argmax(1)
            distributions = probabilities(which, len(states), K)
            return [[share_out(distribution)] + [one] * (K - 1) for distribution in distributions]
        return [[one] * K for _ in states]

    def remasked(self, s: State) -> State:
        """The drawn token of least probability is masked again: sampled values decide."""
        chances = {
            i: self.drafters_row(s, i, o).softmax(0)[t].item()
            for i, (t, o) in enumerate(zip(s.tokens, s.origins, strict=True))
            if o is not None
        }
        worst = min(chances, key=lambda i: (chances[i], i), default=None)
        mask = lambda values, blank: tuple(blank if i == worst else x for i, x in enumerate(values))
        return s._replace(tokens=mask(s.tokens, -1), tau=mask(s.tau, -1),
                          origins=mask(s.origins, None), value_dependent=True)  # fmt: skip

    # --- verification ---------------------------------------------------------------------------

    def lengths(self, s: State, way: Way) -> int:
        """How much of a draft is shown to the target."""
        K = len(s.tokens)
        if way.withhold == "entropy":  # of the first position, before anything was drawn
            start = self.fresh(s.prefix)
            distribution = self.drafters_row(start, 0, (start.prefix, start.tokens)).softmax(0)
            return K if -(distribution * distribution.log()).sum() < 0.5 else min(K, 1)
        if way.withhold == "value":
            return K if s.tokens[-1] == 0 else K - 1
        return K

    def shown(self, states: list[State], way: Way) -> Draft:
        """Finished drafts as `verify` is told of them."""
        final = {s.final_step for s in states} - {None}
        fields = {
            "lengths": torch.tensor([self.lengths(s, way) for s in states]),
            "final_step": final.pop() if final else None,
            "value_dependent": any(s.value_dependent for s in states) and not way.forget,
            "entangled": way.hot_start not in (None, "recycled") and not way.forget,
        }
        draft = self.draft_of(states, unfinished=False, **fields)
        if way.uncorrected:
            rows = [
                self.backbones_row(s, i, o or (s.prefix, s.tokens))
                for s in states
                for i, o in enumerate(s.origins)
            ]
            draft = draft._replace(
                logits=torch.stack(rows), distribution=row_distribution(torch.stack(rows))
            )
        if way.record == "forced":
            draft = draft._replace(
                tau=torch.zeros_like(draft.tau), value_dependent=False, entangled=False
            )
        return draft

    def rounds(self, states: list[State], way: Way) -> dict[State, dict[State, Fraction]]:
        """From each state, the distribution of the state that a round ends in."""
        distributions = self.drafts(states)
        drafts = list(
            dict.fromkeys(s for distribution in distributions.values() for s in distribution)
        )
        K = len(drafts[0].tokens)
        accept, last, _ = self.outcomes(drafts, way)
        ends: dict[State, dict[State, Fraction]] = {}
        for n, s in enumerate(drafts):
            end = ends.setdefault(s, defaultdict(Fraction))
            for i, chance in enumerate(stops(accept[n], way.rule)):
                for v in range(self.V):
                    if chance and last[n * (K + 1) + i][v]:
                        after = self.carried(s, i, v, way)
                        end[after] += chance * last[n * (K + 1) + i][v]
        return {state: compose(distribution, ends) for state, distribution in distributions.items()}

    def outcomes(self, drafts: list[State], way: Way) -> tuple[list, list, list]:
        """For each draft P(accept) of each token, in the sense of the rule; for each draft and
        each number of accepted tokens the distribution of the one behind them, and the bias
        returned."""
        B, K, V = len(drafts), len(drafts[0].tokens), self.V
        texts = [[s.prefix + s.tokens[:i] for i in range(K + 1)] for s in drafts]
        target = torch.stack(
            [torch.stack([self.logits("target", text) for text in row]) for row in texts]
        ).repeat_interleave(K + 1, 0)
        draft = self.shown(drafts, way)
        draft = draft._replace(**{
            name: getattr(draft, name).repeat_interleave(K + 1, 0)
            for name in ("tokens", "tau", "rows", "lengths")
        })  # fmt: skip
        record = None if way.record == "forced" else way.record

        def outcome(words: Tensor) -> Verified:
            return verify(target, draft, rule=way.rule, record=record, lenience=way.lenience,
                          words=words)  # fmt: skip

        block = way.rule == "block"
        stop = torch.arange(K + 1).repeat(B)  # the number of accepted tokens that is asked about
        row, column = torch.arange(len(stop)), torch.arange(K + 1)
        # token rule: all before are accepted; block rule: nothing longer is
        words = torch.where(column >= stop[:, None], -1, 0) if block else torch.zeros(
            len(stop), K + 1, dtype=torch.int64
        )  # fmt: skip

        def accepts(word: Tensor) -> Tensor:
            """Whether drafted token `stop` is (block: a prefix that ends with it is)."""
            changed = torch.where(column > stop[:, None], -1, 0) if block else words.clone()
            changed[row, stop] = torch.where(stop < K, word, changed[row, stop])
            return outcome(changed).accepted <= stop

        accept = first_word(accepts, len(stop))
        words[row, stop] = -1  # the largest u: position `stop` ends the round

        def behind(word: Tensor) -> Tensor:
            return outcome(torch.cat((words[:, :K], word[:, None]), 1)).emitted[row, stop]

        last, bias = probabilities(behind, len(stop), V), outcome(words).bias.tolist()
        shares = [Fraction(a, WORDS) for a in accept]
        lengths = [self.lengths(s, way) for s in drafts]
        return [shares[b * (K + 1) : b * (K + 1) + lengths[b]] for b in range(B)], last, bias

    def carried(self, s: State, accepted: int, token: int, way: Way) -> State:
        """The state behind a round: what the drafter keeps is decided by `carry_over`."""
        prefix = (*s.prefix, *s.tokens[:accepted], token)
        if way.hot_start is None or len(prefix) >= self.length:
            return self.fresh(prefix[: self.length])
        K, count = self.length - len(prefix), accepted + 1
        old = self.draft_of([s], unfinished=False, lengths=torch.tensor([self.lengths(s, way)]))
        pool = torch.zeros(K, self.V)
        new = Draft.masked(1, K, pool, entangled=way.hot_start != "recycled")
        kept = carry_over(old, new, torch.tensor([count]))
        if way.hot_start == "entangled anew":
            kept = kept._replace(tau=old.tau[:, count:].where(kept.tokens >= 0, -1))
        rows, tokens = kept.rows[0].tolist(), tuple(kept.tokens[0].tolist())
        for i, r in enumerate(rows):
            if r >= 0:  # the record moved with its token
                assert torch.equal(pool[r], old.logits[i + count])
        origins = tuple(s.origins[i + count] if r >= 0 else None for i, r in enumerate(rows))
        return State(prefix, tokens, tuple(kept.tau[0].tolist()), origins)

    # --- whole runs -----------------------------------------------------------------------------

    def output_distribution(self, way: Way) -> dict[Text, Fraction]:
        """Distribution of the text of whole runs, cut at `length`."""
        return self.runs(way)[0]

    def expected_bias(self, way: Way) -> float:
        """Mean over whole runs of the sum of the biases that `verify` returns."""
        waiting, total = self.runs(way)[1], 0.0
        for length in range(self.length):
            distributions = self.drafts([s for s in waiting if len(s.prefix) == length])
            drafts: Distribution = defaultdict(Fraction)
            for state, distribution in distributions.items():
                for draft, chance in distribution.items():
                    drafts[draft] += waiting[state] * chance
            if not drafts:
                continue
            accept, _, bias = self.outcomes(list(drafts), way)
            for n, chance in enumerate(drafts.values()):
                for i, share in enumerate(stops(accept[n], way.rule)):
                    total += float(chance * share) * bias[n * (self.length - length + 1) + i]
        return total

    def runs(self, way: Way) -> tuple[dict[Text, Fraction], Distribution]:
        """Distribution of the text of whole runs, cut at `length`; of each state the chance that a
        round begins there."""
        waiting: Distribution = defaultdict(Fraction, {self.fresh(()): Fraction(1)})
        distribution: dict[Text, Fraction] = defaultdict(Fraction)
        for length in range(self.length):
            states = [s for s in waiting if len(s.prefix) == length]
            if not states:
                continue
            for state, ends in self.rounds(states, way).items():
                for end, chance in ends.items():
                    if len(end.prefix) >= self.length:
                        distribution[end.prefix] += waiting[state] * chance
                    else:
                        waiting[end] += waiting[state] * chance
        return distribution, waiting

    def distance(self, way: Way) -> float:
        """Total variation between the output distribution and the target's."""
        distribution, target = self.output_distribution(way), self.target_distribution()
        return sum(abs(float(distribution.get(text, 0)) - p) for text, p in target.items()) / 2


def compose(distribution: Distribution, after: dict[State, dict[State, Fraction]]) -> Distribution:
    """The distribution of the second of two steps."""
    result: Distribution = defaultdict(Fraction)
    for state, chance in distribution.items():
        for end, share in after[state].items():
            result[end] += chance * share
    return result


def share_out(distribution: Iterable[Fraction]) -> list[tuple[Fraction, int]]:
    """Intervals of words, in order, as (length, a word in the middle); empty ones are left out."""
    boxes, start = [], Fraction(0)
    for share in distribution:
        if share:
            boxes.append((share, int((start + share / 2) * WORDS)))
        start += share
    return boxes


def stops(accept: list[Fraction], rule: str) -> list[Fraction]:
    """P(n tokens are accepted), n = 0 .. K, from P(accept) of each."""
    chances, alive = [], Fraction(1)
    if rule == "block":  # the longest prefix that is accepted, on its own word
        for h in reversed([Fraction(1), *accept]):
            chances.append(alive * h)
            alive *= 1 - h
        return chances[::-1]
    for share in accept:
        chances.append(alive * (1 - share))
        alive *= share
    return [*chances, alive]
