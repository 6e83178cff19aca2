"""Drafting: a session's drafter, the news that it is told, and the drafts that it makes."""

from __future__ import annotations

import weakref
from typing import cast
from weakref import WeakKeyDictionary

import torch
import torch.nn.functional as F
from torch import Tensor

from specdiff_kernels import Draft, Tree
from specdiff_kernels.trees import ROOT

from .cache import RowCache
from .drafter import Drafter, Draws, News, draft_status, joined
from .sampling import RowSampling
from .settings import Settings
from .trees import check_grown, depths_of

# the session that each drafter with a state was last started for
SERVED: WeakKeyDictionary[Drafter, weakref.ref[Drafting]] = WeakKeyDictionary()


class Drafting:
    """The drafting side of a session: it keeps the news for the drafter and asks it for drafts.

    Args:
        settings: of the decoder.
        rows, capacity: of the session.
        sampling: of its rows.
        looks: whether the host looks at every round. Otherwise drafts are always as wide as k, and
            the drafter must not wait for the device.

    Attributes:
        layers: layers of the target whose states the drafter reads.
        width: K of the coming round.
        called: whether the drafter was asked for the latest draft.
    """

    def __init__(
        self, settings: Settings, rows: int, capacity: int, sampling: RowSampling, *, looks: bool
    ) -> None:
        self.drafter, self.chooser, self.target = (
            settings.drafter,
            settings.chooser,
            settings.target,
        )
        self.k = self.width = settings.k
        self.growth = settings.tree
        self.looks, self.called = looks, False
        self.layers = () if self.drafter is None else self.drafter.target_layers
        device, hidden = self.target.device, None
        self.most = torch.full((rows,), self.k, dtype=torch.int64, device=device)
        if self.drafter is not None and self.drafter.needs_hidden:
            width = (len(self.layers) + 1) * self.target.hidden_size
            hidden = torch.zeros(rows, self.k + 1, width, dtype=self.target.dtype, device=device)
        tokens = torch.zeros(rows, self.k + 1, dtype=torch.int64, device=device)
        self.fresh = News(tokens, tokens.new_zeros(rows), hidden)
        self.news = self.fresh  # of the last round, or a copy with prompts beside it
        self.missed: list[News] = []  # of rounds in which the drafter was not called
        self.status: Tensor | None = None  # of the round's draft, where the host looks
        if self.drafter is not None:
            SERVED[self.drafter] = weakref.ref(self)
            self.drafter.start(rows, capacity, sampling)
        if self.chooser is not None:
            self.chooser.start(rows)

    def choose(self) -> None:
        """Let the chooser decide how many tokens are drafted in the coming round."""
        if self.chooser is None:
            return
        lengths, self.width, steps = self.chooser.want(self.k)
        self.most.copy_(torch.tensor(lengths))
        if steps is not None:
            if self.drafter is None or self.drafter.steps is None:
                raise ValueError(
                    f"{type(self.chooser).__name__} chose {steps} steps, but "
                    f"{type(self.drafter).__name__} takes none: choose steps=None"
                )
            self.drafter.steps = steps

    def draft(self, room: Tensor, draws: Draws, longest: int) -> tuple[Draft | Tree, Tensor]:
        """A draft of at most room [B] tokens a row, and its lengths [B]; a tree if the settings
        say so, whose length is that of its longest path.

        Where the host looks, a draft that nobody has room for is not made, and its width is that of
        its longest row.

        Args:
            room: i64 [B].
            draws: keys of the random numbers.
            longest: at least the tokens that any row has.

        Raises:
            ValueError: the drafter broke its contract.
        """
        self.called = self.drafter is not None and not (self.looks and not room.any())
        if self.drafter is not None and type(self.drafter).start is not Drafter.start:
            self._check_owner(self.drafter)
        if self.drafter is None or not self.called:
            self._miss()
            none, lengths = room.new_empty(len(room), 0), torch.zeros_like(room)
            return Draft.guesses(none, lengths), lengths
        news = self.news if self.looks else self.news._replace(longest=longest)
        if self.missed:
            news, self.missed = joined([*self.missed, news]), []
        if self.growth is not None:
            tree = self.drafter.tree(news, self.width, self.growth, room, draws)
            check_grown(tree, len(room), self.growth.nodes, looks=self.looks)
            if self.looks:
                self.status = draft_status(tree)
                present = (tree.tokens >= 0).any(0).nonzero()
                width = int(present.max()) + 1 if len(present) else 0
                cut = {
                    name: getattr(tree, name)[:, :width] for name in ("tokens", "parents", "rows")
                }
                tree = tree._replace(**cut)
            missing = tree.tokens < 0
            depths = depths_of(tree.parents.masked_fill(missing, ROOT)) + 1
            lengths = depths.masked_fill(missing, 0).amax(1) if depths.shape[1] else room * 0
            if self.looks:
                check_lengths(lengths, room)
            return tree, lengths
        # never narrower for want of room: a row's draft does not depend on that of its batch mates
        draft = self.drafter.draft(news, self.width, room, draws)
        if self.looks:
            self.status = draft_status(draft)
        if self.chooser is not None:
            if draft.entangled:
                raise ValueError(
                    "k must be a number with a drafter that keeps entangled tokens: they have to "
                    "be examined, whatever was accepted before"
                )
            draft = self.chooser.withhold(draft)
        lengths = torch.full_like(room, self.width) if draft.lengths is None else draft.lengths
        if not self.looks:
            return draft._replace(lengths=lengths), lengths
        check_lengths(lengths, room)
        width = int(lengths.max())
        tokens, tau, rows = (x[:, :width] for x in draft[:3])
        return draft._replace(tokens=tokens, tau=tau, rows=rows, lengths=lengths), lengths

    def _check_owner(self, drafter: Drafter) -> None:
        if SERVED[drafter]() is not self:
            raise ValueError(
                f"this {type(drafter).__name__} is in use by a session that began later: give each "
                "session, and each thread, a drafter of its own, such as copy.copy(drafter)"
            )

    def forget(self, places: range, used: list[bool]) -> None:
        """Other sequences take these places."""
        again = [b for b in places if used[b]]
        if again and self.drafter is not None:
            self.drafter.forget(again)
        if again and self.chooser is not None:
            self.chooser.forget(again)
        for missed in self.missed:
            missed.counts[places.start : places.stop] = 0

    def prefill(self, rows: slice, tokens: Tensor, counts: Tensor, cache: RowCache) -> None:
        """Have the target read prompts but for their last tokens, and the drafter with it.

        A drafter that wants states reads each chunk as its states come, which are then forgotten.
        """
        drafter = self.drafter
        if self.fresh.hidden is not None:
            self._prefill_with_states(rows, tokens, counts, cache)
            return
        self.target.prefill(tokens, counts - 1, cache)
        if drafter is not None and drafter.reads:
            N = tokens.shape[1]
            if N > 1:
                drafter.read(rows, News(tokens[:, : N - 1], counts - 1, None, N - 1))
            tokens, counts = tokens.gather(1, counts[:, None] - 1), torch.ones_like(counts)
        self._tell_prompts(rows, tokens, counts, None)

    def _prefill_with_states(
        self, rows: slice, tokens: Tensor, counts: Tensor, cache: RowCache
    ) -> None:
        drafter, hidden = cast(Drafter, self.drafter), cast(Tensor, self.news.hidden)
        last = torch.zeros_like(hidden[rows, :1])
        row = torch.arange(len(tokens), device=tokens.device)

        def heard(start: int, before: Tensor) -> None:
            read = before.shape[1] - 1
            known = (counts - 1 - start).clamp(0, read)
            news = News(tokens[:, start : start + read], known, before[:, :-1], start + read)
            drafter.read(rows, news)
            ends = (counts - 1 - start == known)[:, None]
            last[:, 0] = before[row, known].where(ends, last[:, 0])

        self.target.prefill(tokens, counts - 1, cache, layers=self.layers, heard=heard)
        self._tell_prompts(rows, tokens.gather(1, counts[:, None] - 1), counts.clamp(max=1), last)

    def tell(self, emitted: Tensor, counts: Tensor, hidden: Tensor) -> None:
        """Make a round's tokens [B, K + 1], `counts` [B] of them, the drafter's news."""
        fresh = self.news = self.fresh
        width = emitted.shape[1]
        fresh.tokens[:, :width] = emitted
        fresh.counts.copy_(counts)
        if fresh.hidden is not None:
            fresh.hidden[:, :width] = hidden

    def _tell_prompts(
        self, rows: slice, tokens: Tensor, counts: Tensor, before: Tensor | None
    ) -> None:
        """Make prompts [n, N] the news of their rows, beside the last round's of other rows."""
        news, N = self.news, tokens.shape[1]
        more = max(0, N - news.tokens.shape[1])
        known, heard = F.pad(news.tokens, (0, more)), news.counts.clone()
        known[rows, :N], heard[rows] = tokens, counts
        hidden = news.hidden
        if hidden is not None and before is not None:
            hidden = hidden.clone()
            hidden[rows, :N] = before
        self.news = News(known, heard, hidden)

    def _miss(self) -> None:
        """Keep the news for the next call of the drafter. States that fill a chunk are read now."""
        if self.drafter is None or not self.looks:
            return
        width = int(self.news.counts.max())
        tokens, counts, hidden, _ = self.news
        hidden = None if hidden is None else hidden[:, :width].clone()
        self.missed.append(News(tokens[:, :width].clone(), counts.clone(), hidden))
        if hidden is None:
            return
        if sum(part.tokens.shape[1] for part in self.missed) >= self.target.prefill_chunk:
            self.drafter.read(slice(0, len(counts)), joined(self.missed))
            self.missed = []


def check_lengths(lengths: Tensor, room: Tensor) -> None:
    """Raise ValueError if a draft is longer than was wanted."""
    if (lengths > room).any():
        raise ValueError(
            f"the drafter proposed {lengths.tolist()} tokens where {room.tolist()} were wanted"
        )
