"""Planner: how many tokens to draft in how many steps, chosen anew in every round.

A round of K tokens drafted in T steps costs c(T, K) + v(K) seconds and brings E(K) tokens
(`specdiff.theory`). The costs are measured once for a pair of models on a machine, what is accepted
is learnt on the way; where no draft pays, none is made.
"""

from __future__ import annotations

import itertools
import json
import math
import operator
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import Tensor

from specdiff_kernels import Draft

from .adaptive import Wanted
from .drafters.base import Draws, News
from .files import write_atomically
from .sampling import Sampling

if TYPE_CHECKING:
    from .decoder import Decoder
    from .session import Session

KS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # lengths of drafts that are tried
STEPS = (1, 2, 4, 8, 16)
ROUNDS = 240  # when costs are measured, of all plans
TURNS = 8  # at least so many of each plan
TOKENS = 64  # of each text that is decoded for it
PATIENCE = 30.0  # seconds after which no plan is measured again
ALIKE = 32.0  # examined tokens under one T that say as much of it as those under all T
NEAR = 8.0  # examined tokens of a position that say as much of it as the position before does
PRIOR = 24.0  # most examined tokens that what was seen then counts for
SURE = 2.0  # accepted tokens before other steps' acceptance says as much of a text
MEMORY = 0.98  # weight of the past after one more round
CURIOSITY = 0.01  # share of the time that may be lost to learn
OPTIMISM = 2.0  # standard deviations by which acceptances might be higher


class Plan(NamedTuple):
    """One way to spend a round."""

    k: int  # tokens drafted; 0: none
    steps: int  # T; 0: the drafter takes none


PLAIN = Plan(0, 0)


@dataclass(frozen=True)
class Costs:
    """What rounds of a pair of models cost on a machine, and what was accepted meanwhile.

    Attributes:
        batch: rows decoded together.
        plans: what was measured: (0, 0), then K and T.
        draft: seconds of each plan's drafting.
        verify: seconds of the rest of its round, with all K tokens drafted; they depend on K alone.
        examined: by T, how often position 1, 2, ... was examined: all before it were accepted.
        accepted: by T, how often its token was accepted; where none was drafted, it was not.
        share: by T, how many tokens were drafted of those that were wanted.
        first: seconds that a text's first draft takes more: in it the drafter reads the prompt.
    """

    batch: int
    plans: list[Plan]
    draft: list[float]
    verify: list[float]
    examined: dict[int, list[int]] = field(default_factory=dict)
    accepted: dict[int, list[int]] = field(default_factory=dict)
    share: dict[int, float] = field(default_factory=dict)
    first: float = 0.0

    def save(self, path: Path) -> None:
        """Write a JSON file, the whole file or nothing."""
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, (json.dumps(asdict(self), indent=1) + "\n").encode())

    @classmethod
    def load(cls, path: Path) -> Costs:
        """Read what `save` wrote.

        Raises:
            ValueError: it is not such a file.
        """
        try:
            fields = json.loads(path.read_text())
            fields["plans"] = [Plan(*plan) for plan in fields["plans"]]
            for name in ("examined", "accepted", "share"):
                fields[name] = {int(steps): value for steps, value in fields[name].items()}
            costs = cls(**fields)
            costs.check()
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} holds no costs ({error}): remove it") from error
        return costs

    def check(self) -> None:
        """Raise ValueError unless every plan, and plain decoding among them, has finite costs."""
        if PLAIN not in self.plans:
            raise ValueError("plans: expected plain decoding, (0, 0), among them")
        for name in ("draft", "verify"):
            costs = getattr(self, name)
            if len(costs) != len(self.plans) or not all(map(math.isfinite, costs)):
                raise ValueError(f"{name}: expected {len(self.plans)} finite numbers, got {costs}")

    def rest(self, plan: Plan, share: float) -> float:
        """Seconds of a plan's round without its drafting, if that share of K is drafted."""
        plain = self.verify[self.plans.index(PLAIN)]
        return plain + share * (self.verify[self.plans.index(plan)] - plain)

    def acceptances(self, steps: int, most: int) -> list[tuple[float, float]]:
        """Prior of positions 1 .. most under T steps: mean and how many tokens it counts for.

        What was seen under T alone is drawn towards what was seen under all T: of many T with few
        tokens each the best would else be the luckiest. Positions that were hardly examined are
        thought to be like the one before them.
        """
        prior, mean, weight = [], 0.5, 2.0
        for i in range(most):
            n, a = (
                {T: seen[i] if i < len(seen) else 0 for T, seen in counts.items()}
                for counts in (self.examined, self.accepted)
            )
            mean = (sum(a.values()) + weight * mean) / (sum(n.values()) + weight)
            own = (a.get(steps, 0) + ALIKE * mean) / (n.get(steps, 0) + ALIKE)
            prior.append((own, min(sum(n.values()) + 2.0, PRIOR)))
            weight = NEAR
        return prior


class Planner:
    """Chooses K and T of each round, for all rows alike, so that most tokens come in a second.

    It looks at what was accepted in earlier rounds alone, so that the text still follows the
    target's distribution exactly. The chance that position i is accepted, given that it is
    examined, has a Beta posterior for each T. It begins anew with each session, at what was seen
    when the costs were measured, and forgets slowly; where other T are accepted less than they were
    then, so will this one be. A plan that might be better than the best one known is tried, for at
    most a hundredth of the time. Give it to a `Decoder` as its k; it sets the drafter's
    `steps`.

    Args:
        costs: as `measure` finds them, for as many rows as the session has.
        ks: the K to choose from, 0 for rounds without a draft; None: all that were measured.
        steps: the T to choose from; None: all that were measured.

    Raises:
        ValueError: nothing is left to choose from.

    Example:
        >>> costs = measure(Decoder(target, drafter))
        >>> decoder = Decoder(target, drafter, Planner(costs))
    """

    def __init__(
        self, costs: Costs, *, ks: Sequence[int] | None = None, steps: Sequence[int] | None = None
    ) -> None:
        wanted = [
            (ks is None or plan.k in ks) and (steps is None or plan.k == 0 or plan.steps in steps)
            for plan in costs.plans
        ]
        self.costs = costs
        self.plans = [plan for plan, choose in zip(costs.plans, wanted, strict=True) if choose]
        if not self.plans:
            measured = sorted({plan.k for plan in costs.plans})
            raise ValueError(
                f"nothing to choose from with ks={ks} and steps={steps}: K of "
                f"{', '.join(map(str, measured))} were measured"
            )
        self.most = max(1, *(plan.k for plan in self.plans))
        self.start(costs.batch)

    def start(self, batch: int) -> None:
        """Forget all evidence; the prior stays.

        Raises:
            ValueError: the costs are those of another batch.
        """
        if batch != self.costs.batch:
            raise ValueError(
                f"the costs were measured with {self.costs.batch} rows and the session has {batch}:"
                f" call measure(decoder, batch={batch})"
            )
        tried = {plan.steps for plan in self.plans}
        self.prior = {steps: self.costs.acceptances(steps, self.most) for steps in tried}
        self.examined = {steps: [0.0] * self.most for steps in tried}
        self.accepted = {steps: [0.0] * self.most for steps in tried}
        self.wanted = dict.fromkeys(tried, PRIOR)  # tokens, and how many of them were drafted
        self.drafted = {steps: PRIOR * self.costs.share.get(steps, 1.0) for steps in tried}
        self.spent = self.lost = 0.0  # seconds, by the costs
        self.unread = self.costs.first  # seconds, until the drafter has read a prompt
        self.plan = PLAIN

    def forget(self, rows: Sequence[int]) -> None:
        """Rows that other sequences take the places of: what was learnt holds for them too."""

    def posterior(self, steps: int) -> list[tuple[float, float]]:
        """Mean and standard deviation of the acceptance at positions 1, 2, ... under T steps."""
        result = []
        for i, (mean, weight) in enumerate(self.prior[steps]):
            mean = min(1.0, mean * self.others(steps, i))
            total = weight + self.examined[steps][i]
            mean = (weight * mean + self.accepted[steps][i]) / total
            result.append((mean, math.sqrt(mean * (1 - mean) / (total + 1))))
        return result

    def others(self, steps: int, i: int) -> float:
        """What was accepted at a position under other T, over what their priors foretold."""
        seen = foretold = SURE
        for T, prior in self.prior.items():
            if steps != T:
                seen += self.accepted[T][i]
                foretold += self.examined[T][i] * prior[i][0]
        return seen / foretold

    def seconds(self, plan: Plan) -> float:
        """What a round is expected to cost."""
        if plan == PLAIN:
            return self.costs.rest(plan, 0.0)
        share = self.drafted[plan.steps] / self.wanted[plan.steps]
        drafting = self.costs.draft[self.costs.plans.index(plan)]
        return drafting + self.costs.rest(plan, share)

    def speeds(self, optimism: float = 0.0) -> dict[Plan, float]:
        """Expected tokens a second of each plan, acceptances so many standard deviations up."""
        expected = {}
        for steps in self.prior:
            up = [min(1.0, mean + optimism * std) for mean, std in self.posterior(steps)]
            chances = itertools.accumulate(up, operator.mul)
            expected[steps] = list(itertools.accumulate(chances, initial=1.0))  # E(0), E(1), ...
        return {plan: expected[plan.steps][plan.k] / self.seconds(plan) for plan in self.plans}

    def want(self, most: int) -> Wanted:
        """The plan of the coming round."""
        plans = [plan for plan in self.plans if plan.k <= most]
        speeds, hopes = self.speeds(), self.speeds(OPTIMISM)
        best = max(plans, key=lambda plan: speeds[plan])
        hope = max(plans, key=lambda plan: hopes[plan])
        loss = self.seconds(hope) * (1 - speeds[hope] / speeds[best])
        if best == PLAIN:
            loss += self.unread
        self.plan = best
        if hopes[hope] > speeds[best] and self.lost + loss <= CURIOSITY * self.spent:
            self.plan = hope
            self.lost += loss
        self.spent += self.seconds(self.plan)
        if self.plan != PLAIN:
            self.spent, self.unread = self.spent + self.unread, 0.0
        k, steps = self.plan
        return Wanted([k] * self.costs.batch, k, steps or None)

    def update(
        self, wanted: Sequence[int], drafted: Sequence[int], accepted: Sequence[int]
    ) -> None:
        """Learn from a round; a token that was wanted and not drafted was not accepted."""
        if self.plan == PLAIN:
            return
        steps = self.plan.steps
        examined_at, accepted_at = self.examined[steps], self.accepted[steps]
        for i in range(self.most):
            examined_at[i] *= MEMORY
            accepted_at[i] *= MEMORY
        count(wanted, accepted, examined_at, accepted_at)
        self.wanted[steps] = MEMORY * self.wanted[steps] + sum(wanted)
        self.drafted[steps] = MEMORY * self.drafted[steps] + sum(drafted)

    def withhold(self, draft: Draft) -> Draft:
        """The draft as it is."""
        return draft


def count(
    wanted: Sequence[int],
    accepted: Sequence[int],
    examined_at: list[Any],
    accepted_at: list[Any],
) -> None:
    """Add a round, row by row: which positions were examined, and accepted."""
    for most, passed in zip(wanted, accepted, strict=True):
        for i in range(min(passed + 1, most)):
            examined_at[i] += 1
            accepted_at[i] += i < passed


class Probe:
    """Asks for one plan after another, as a Planner would."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.plan = PLAIN

    def start(self, batch: int) -> None:
        self.batch = batch

    def forget(self, rows: Sequence[int]) -> None:
        pass

    def want(self, most: int) -> Wanted:
        return Wanted([self.plan.k] * self.batch, self.plan.k, self.plan.steps or None)

    def update(
        self, wanted: Sequence[int], drafted: Sequence[int], accepted: Sequence[int]
    ) -> None:
        self.wanted, self.drafted, self.accepted = wanted, drafted, accepted

    def withhold(self, draft: Draft) -> Draft:
        return draft


class Guesses:
    """Drafts as many tokens as it may, whatever they are."""

    needs_hidden = False
    vocab_size: int | None = None
    block = 1

    def start(self, batch: int, capacity: int, sampling: Sampling) -> None:
        pass

    def forget(self, rows: list[int]) -> None:
        pass

    def draft(self, news: News, k: int, lengths: Tensor, draws: Draws) -> Draft:
        tokens = lengths.new_zeros(len(lengths), k)
        return Draft(tokens, tokens.int(), tokens - 1, lengths=lengths)


def measure(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]] | None = None,
    *,
    batch: int = 1,
    sampling: Sampling | None = None,
    ks: Sequence[int] | None = None,
    steps: Sequence[int] = STEPS,
) -> Costs:
    """Decode with one plan after another, each several times, and note what rounds cost.

    It takes some seconds with a small model; after half a minute no plan is measured again. Of the
    times of a plan the median counts, and no more than that of a longer draft or of more steps.

    Args:
        decoder: with a drafter; its k does not matter.
        prompts: token ids of texts like those to come, which are begun one after another; None: the
            target's first token alone.
        batch: rows, as many as the planner will see.
        sampling: None is temperature 1.
        ks: the K to measure, as far as the drafter can; None: some up to 8 or the drafter's block.
        steps: the T to measure up to each K, if the drafter takes steps.

    Raises:
        ValueError: no drafter, or no K that it can draft in so many steps.

    Example:
        >>> costs = measure(Decoder(Target(model), PromptLookup()))
        >>> costs.save(Path("costs.json"))
    """
    from .decoder import Decoder

    drafter = decoder.drafter
    if drafter is None:
        raise ValueError("decoder: expected one with a drafter, got plain decoding")
    most = min(getattr(drafter, "most", KS[-1]), decoder.target.context_limit // 4)
    if ks is None:
        ks = [k for k in KS if k <= max(8, drafter.block)]
    taken = steps if hasattr(drafter, "steps") else (0,)
    plans = [Plan(k, T) for k in ks for T in taken if T <= k <= most]
    if not plans:
        raise ValueError(
            f"nothing to measure: this drafter drafts 1 to {most} tokens, in no more steps; got "
            f"ks={list(ks)}, steps={list(steps)}"
        )
    before = getattr(drafter, "steps", None)
    probe = Probe(max(plan.k for plan in plans))
    own = Decoder(
        decoder.target,
        drafter,
        probe,
        decoder.rule,
        lenience=decoder.lenience,
        record=decoder.record,
        backend=decoder.backend,
    )
    if prompts is not None and not prompts:
        raise ValueError("prompts must hold at least one prompt, got none; None: the first token")
    if prompts is None:
        bos = decoder.target.model.config.bos_token_id
        prompts = [[min(bos or 0, decoder.target.vocab_size - 1)]]
    prompts = [prompt[: decoder.target.context_limit // 2] for prompt in prompts]
    sampling = sampling or Sampling(1.0)
    try:
        costs = probed(own, probe, [PLAIN, *plans], prompts, batch, sampling)
    finally:
        if before is not None:
            drafter.steps = before  # type: ignore[attr-defined]
    if not all(map(math.isfinite, costs.verify)):
        # it hardly ever drafts as much as it may: what rounds cost then is seen with guesses
        guesses = Decoder(decoder.target, Guesses(), probe, backend=decoder.backend)
        widths = [PLAIN, *(Plan(k, 0) for k in dict.fromkeys(plan.k for plan in plans))]
        seen = probed(guesses, probe, widths, prompts, batch, sampling)
        by_k = dict(zip((plan.k for plan in widths), seen.verify, strict=True))
        costs = replace(costs, verify=[by_k[plan.k] for plan in costs.plans])
    return costs


def probed(
    decoder: Decoder,
    probe: Probe,
    plans: list[Plan],
    prompts: Sequence[Sequence[int]],
    batch: int,
    sampling: Sampling,
) -> Costs:
    """Costs of plans, in rounds that take turns, and what was accepted under each T."""
    longest = max(map(len, prompts))
    # the first round brings a token, and a draft is of one less than may still come
    room = min(decoder.target.context_limit - longest, max(TOKENS, 2 * probe.most + 2))
    session = decoder.open(batch, longest + room, sampling=sampling, stop_tokens=())
    draft: dict[Plan, list[float]] = {plan: [] for plan in plans}
    rest: dict[int, list[float]] = {plan.k: [] for plan in plans}
    asked, drafted = (dict.fromkeys((plan.steps for plan in plans[1:]), 0) for _ in range(2))
    examined = {plan.steps: [0] * probe.most for plan in plans[1:]}
    accepted = {plan.steps: [0] * probe.most for plan in plans[1:]}
    texts, first, begun = itertools.cycle(prompts), plans[-1], [math.inf]
    start = time.monotonic()
    for turn in range(1 + max(TURNS, ROUNDS // len(plans))):  # the first warms up
        if turn > 1 and time.monotonic() - start > PATIENCE:
            break
        for plan in plans:
            if session.left() <= probe.most:
                for place in range(batch):
                    session.abort(place)
                    session.admit([list(next(texts))], first=place, max_new_tokens=room, seed=turn)
                probe.plan = first
                begun.append(timed(session)[0])  # in which the drafter reads the prompts
            probe.plan = plan
            seconds = timed(session)
            if turn == 0:
                continue
            draft[plan].append(seconds[0])
            if max(probe.drafted) == plan.k:
                rest[plan.k].append(seconds[1])
            if plan != PLAIN:
                count(probe.wanted, probe.accepted, examined[plan.steps], accepted[plan.steps])
                asked[plan.steps] += sum(probe.wanted)
                drafted[plan.steps] += sum(probe.drafted)
    drafting = {
        p: min(median(draft[q]) for q in plans if q.k >= p.k and q.steps >= p.steps) for p in plans
    }
    round = {k: median(seconds) if seconds else math.inf for k, seconds in rest.items()}
    return Costs(
        batch,
        plans,
        [drafting[p] for p in plans],
        [min(round[k] for k in round if k >= p.k) for p in plans],
        examined,
        accepted,
        {steps: drafted[steps] / max(1, asked[steps]) for steps in asked},
        max(0.0, min(begun) - drafting[first]),
    )


def timed(session: Session) -> tuple[float, float]:
    """Seconds of a round's draft, and of the rest of it."""
    drafted = session.stats.seconds["draft"]
    start = time.perf_counter()
    session.step()
    whole = time.perf_counter() - start
    drafted = session.stats.seconds["draft"] - drafted
    return drafted, whole - drafted
