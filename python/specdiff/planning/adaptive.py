"""AdaptiveK: the length of each row's draft follows its own acceptance so far."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from specdiff_kernels import Draft

from ..loop.chooser import Wanted

MEMORY = 0.95  # weight of the past after one more examined token


class AdaptiveK:
    """Chooses K from what a row accepted before and from entropies taken before sampling.

    It never looks at a drafted value, neither of a token that it withholds nor of any other, so
    that the text still follows the target's distribution exactly.

    A row drafts the most tokens for which the last would still be reached and accepted with
    probability `least_chance`, given its acceptance so far, weighted towards recent rounds. The
    draft is cut before the first position whose distribution has more entropy than `max_entropy`.

    Args:
        most: K is at most this; None: the drafter's own block.
        least_chance: in (0, 1).
        max_entropy: in nats; None: no limit. Only positions that the drafter's first step measured
            count. It measures all positions under the orders "analytic", "euler", "entropy" and
            "confidence" and in a single step, otherwise those that it reveals.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> decoder = Decoder(target, drafter, k=AdaptiveK(least_chance=0.2))
    """

    def __init__(
        self,
        most: int | None = None,
        least_chance: float = 0.1,
        max_entropy: float | None = None,
    ) -> None:
        if most is not None and most < 1:
            raise ValueError(f"most must be at least 1, got {most}")
        if not 0 < least_chance < 1:
            raise ValueError(f"least_chance must be in (0, 1), got {least_chance}")
        if max_entropy is not None and not max_entropy >= 0:
            raise ValueError(f"max_entropy must be at least 0, got {max_entropy}")
        self.most = most
        self.least_chance = least_chance
        self.max_entropy = max_entropy

    def start(self, batch: int) -> None:
        """Forget everything. Each row begins as if one of two tokens had been accepted."""
        self.accepted = [1.0] * batch
        self.examined = [2.0] * batch

    def forget(self, rows: Sequence[int]) -> None:
        """Forget some rows, whose places other sequences take."""
        for b in rows:
            self.accepted[b], self.examined[b] = 1.0, 2.0

    def want(self, most: int) -> Wanted:
        """The width is constant, so that a row's draft does not depend on its batch mates."""
        return Wanted(self.choose(most), most)

    def choose(self, most: int) -> list[int]:
        """K of each row for the coming round, 1 <= K <= most."""
        return [
            max(1, min(most, reach(a / e, self.least_chance)))
            for a, e in zip(self.accepted, self.examined, strict=True)
        ]

    def update(
        self, wanted: Sequence[int], drafted: Sequence[int], accepted: Sequence[int]
    ) -> None:
        """Learn that row b accepted `accepted[b]` tokens, and rejected the next if it had one."""
        for b, (proposed, passed) in enumerate(zip(drafted, accepted, strict=True)):
            for i in range(min(passed + 1, proposed)):
                self.accepted[b] = MEMORY * self.accepted[b] + (i < passed)
                self.examined[b] = MEMORY * self.examined[b] + 1

    def withhold(self, draft: Draft) -> Draft:
        """The draft, cut in front of the first position of too much entropy."""
        if self.max_entropy is None or draft.entropy is None:
            return draft
        certain = ~(draft.entropy > self.max_entropy)  # NaN: not measured
        leading = certain.long().cumprod(1).sum(1)
        wanted = leading if draft.lengths is None else draft.lengths
        return draft._replace(lengths=torch.minimum(wanted, leading))


def reach(acceptance: float, least_chance: float) -> int:
    """The most i with acceptance^i >= least_chance."""
    i, chance = 0, acceptance
    while chance >= least_chance and i < 1000:
        i, chance = i + 1, chance * acceptance
    return i
