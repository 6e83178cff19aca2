"""Chooser: how many tokens each row drafts, chosen anew in every round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

from specdiff_kernels import Draft


class Wanted(NamedTuple):
    """What a session asks of its drafter in the coming round."""

    lengths: list[int]  # of each row, at most `width`
    width: int  # K that the drafter is asked for; 0: it is not called
    steps: int | None = None  # T that the drafter is set to; None: as it is


class Chooser(Protocol):
    """What a `Decoder` takes in place of a number of tokens to draft.

    It may look at anything that was decided before a draft was drawn, never at a drafted value: a
    token that is withheld because of what it is would bias the text.
    """

    @property
    def most(self) -> int | None:
        """K is at most this; None: the drafter's own block."""

    def start(self, batch: int) -> None:
        """A session begins."""

    def forget(self, rows: Sequence[int]) -> None:
        """Other sequences take the places of these rows."""

    def want(self, most: int) -> Wanted:
        """What to draft in the coming round, K at most `most`."""

    def update(
        self, wanted: Sequence[int], drafted: Sequence[int], accepted: Sequence[int]
    ) -> None:
        """How many tokens of each row were wanted, as far as there was room, how many drafted and
        accepted; the one behind those was not."""

    def withhold(self, draft: Draft) -> Draft:
        """The draft, or its beginning."""
