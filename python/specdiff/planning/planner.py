"""Planner: how many tokens to draft in how many steps, chosen anew in every round.

A round of K tokens drafted in T steps costs c(T, K) + v(K) seconds and brings E(K) tokens
(`specdiff.theory`). The costs are measured once for a pair of models on a machine. Acceptance is
learnt while decoding. No draft is made where none pays.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Sequence

from specdiff_kernels import Draft

from ..loop.chooser import Wanted
from .costs import PLAIN, PRIOR, Costs, Plan, count

SURE = 2.0  # accepted tokens before other steps' acceptance says as much of a text
MEMORY = 0.98  # weight of the past after one more round
CURIOSITY = 0.01  # share of the time that may be lost to learn
OPTIMISM = 2.0  # standard deviations by which acceptances might be higher


class Planner:
    """Chooses K and T of each round, the same for all rows, for the most tokens per second.

    It looks at the acceptance of earlier rounds only, so the text still follows the target's
    distribution exactly. The chance that position i is accepted, given that it is examined, has a
    Beta posterior for each T. Every session starts from the acceptance seen when the costs were
    measured, and forgets slowly. If other T are accepted less often than they were then, this T is
    expected to be, too. A plan that might beat the best known one is tried, for at most a hundredth
    of the time. Give it to a `Decoder` as its k. It sets the drafter's `steps`.

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
        """Does nothing: the acceptance learnt from earlier sequences holds for new ones, too."""

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
        """Acceptance at a position under other T, relative to their priors."""
        seen = foretold = SURE
        for T, prior in self.prior.items():
            if steps != T:
                seen += self.accepted[T][i]
                foretold += self.examined[T][i] * prior[i][0]
        return seen / foretold

    def seconds(self, plan: Plan) -> float:
        """Expected cost of a round."""
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
        """Learn from a round. A token that was wanted but not drafted counts as not accepted."""
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
