"""Chooser: how many tokens each row drafts, chosen anew in every round."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, runtime_checkable

from specdiff_kernels import Draft


class Wanted(NamedTuple):
    """The draft that a session asks for in the coming round."""

    lengths: list[int]  # of each row, at most `width`
    width: int  # K that the drafter is asked for; 0: it is not called
    steps: int | None = None  # T that the drafter is set to; None: as it is


@runtime_checkable
class Chooser(Protocol):
    """Chooses the length of each draft; a `Decoder` takes it in place of a number.

    It may look at anything that was decided before a draft was drawn, never at a drafted value.
    Withholding a token because of its value would bias the text.
    """

    @property
    def most(self) -> int | None:
        """K is at most this; None: the drafter's own block."""

    def start(self, batch: int) -> None:
        """A session begins."""

    def forget(self, rows: Sequence[int]) -> None:
        """Other sequences take the places of these rows."""

    def want(self, most: int) -> Wanted:
        """Choose the draft of the coming round, K at most `most`."""

    def update(
        self, wanted: Sequence[int], drafted: Sequence[int], accepted: Sequence[int]
    ) -> None:
        """Learn from a round.

        Args:
            wanted: tokens of each row that were asked for, as far as there was room.
            drafted: tokens of each row that were drafted.
            accepted: leading tokens of each row that were accepted. The next one, if it was
                drafted, was rejected.
        """

    def withhold(self, draft: Draft) -> Draft:
        """The draft, or its beginning."""
