"""Session: rows that are decoded together, each admitted and finished by itself.

A round is a draft, one target forward over K + 1 tokens, `verify` and `commit`. Lengths, tokens and
counts stay on the device; the host looks at them every so many rounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from specdiff_kernels import Committed, Draft, check_status, commit, row_distribution, verify

from .cache import PagedRowCache, RowCache
from .capture import Replay
from .drafter import Drafter, Draws, News, StateDrafter, draft_status, joined
from .sampling import Sampling, row_seeds
from .stats import Stats, Step
from .target import PREFILL_CHUNK, Target

if TYPE_CHECKING:
    from .decoder import Decoder

LOOK_EVERY = 8  # rounds, on a GPU
SPAN = 256  # a captured round reads a multiple of so many keys

# tokens of each row, drafted tokens i64 [B, K], logits [B, K + 1, V] -> other logits [B, K + 1, V]
Process = Callable[[list[list[int]], Tensor, Tensor], Tensor]
# row, its new tokens up to some token -> whether it ends there
Ends = Callable[[int, list[int]], bool]


class Session:
    """A batch of rows under decoding; `Decoder.open` makes it.

    Rows begin as finished ones. `admit` puts prompts into places that are free, `step` runs rounds.

    Attributes:
        texts: prompt and new tokens of each row.
        prompts: how many of them are the prompt's.
        done: whether a row's place is free.
        stats: counts and times.
        cache: keys and values of the target.

    Example:
        >>> session = Decoder(target, PromptLookup()).open(rows=2, capacity=64)
        >>> session.admit([[1, 2, 3], [4, 5]], max_new_tokens=8)
        >>> while not all(session.done):
        ...     step = session.step()
    """

    def __init__(
        self,
        decoder: Decoder,
        rows: int,
        capacity: int,
        sampling: Sampling,
        stop_tokens: Sequence[int],
        *,
        process: Process | None = None,
        ends: Ends | None = None,
        logprobs: bool = False,
        look_every: int | None = None,
        capture: bool = False,
        block_size: int | None = None,
        blocks: int | None = None,
    ) -> None:
        self.decoder, self.target, self.drafter = decoder, decoder.target, decoder.drafter
        self.k = decoder.k
        self.capacity = capacity
        self.sampling = sampling
        self.process, self.ends, self.logprobs = process, ends, logprobs
        self.look_every = self._look_every(look_every)
        device = self.device = self.target.device
        # a forward brings k tokens that may all be padding
        self.cache = self.target.new_cache(
            rows, capacity + self.k, block_size=block_size, blocks=blocks
        )
        self.stats = Stats()
        self.texts: list[list[int]] = [[] for _ in range(rows)]
        self.prompts = [0] * rows
        self.done = [True] * rows
        self._lengths, self._limits = [0] * rows, [0] * rows  # as the host knows them
        self._used = [False] * rows
        self.longest = 0  # at least the largest of the lengths

        # what a round reads and writes in place
        zeros = torch.zeros(rows, dtype=torch.int64, device=device)
        self._stop_tokens = frozenset(stop_tokens)
        self.stops = torch.tensor(tuple(stop_tokens), dtype=torch.int64, device=device)
        self.lengths, self.limit, self.seeds, self.round = (zeros.clone() for _ in range(4))
        self.finished = torch.ones_like(zeros, dtype=torch.bool)
        self.most = torch.full_like(zeros, self.k)
        self.last = zeros[:, None].clone()
        hidden = None
        self.hears = self.drafter is not None and self.drafter.needs_hidden
        self.layers: tuple[int, ...] = getattr(self.drafter, "target_layers", ())
        if self.hears:
            width = (len(self.layers) + 1) * self.target.hidden_size
            hidden = torch.zeros(rows, self.k + 1, width, dtype=self.target.dtype, device=device)
        self.fresh = News(zeros[:, None].repeat(1, self.k + 1), zeros.clone(), hidden)
        self.news = self.fresh  # what a round brought, or a copy with prompts beside it
        self.missed: list[News] = []  # of rounds in which the drafter was not called
        self.width = self.k  # K of the coming round
        self.undrafted: Tensor | None = None  # status of the round's draft, where the host looks
        # of the rounds since the host last looked
        self.slot = zeros.new_zeros(1)
        self.emitted = zeros.new_empty(self.look_every, rows, self.k + 1)
        # kept, accepted, drafted, wanted, status
        self.counts = zeros.new_empty(self.look_every, 5, rows)
        self.chances = torch.empty(self.emitted.shape, dtype=torch.float64, device=device)
        self.biases = torch.zeros(self.look_every, rows, dtype=torch.float64, device=device)

        self._replay = Replay(self._round, device) if capture else None
        if capture and self.look_every == 1:
            raise ValueError("capture needs a look_every above 1: the host cannot look at a graph")
        if capture and not getattr(self.drafter, "capturable", self.drafter is None):
            raise ValueError(
                f"capture: {type(self.drafter).__name__} waits for the device or keeps new memory; "
                "take a drafter that is `capturable`, or none"
            )
        if self.drafter is not None:
            self.drafter.start(rows, capacity + 1, sampling)
        if decoder.adaptive is not None:
            decoder.adaptive.start(rows)

    def _look_every(self, wanted: int | None) -> int:
        """Rounds between two looks: 1 if something on the host has to see each of them."""
        watching = {
            type(self.decoder.adaptive).__name__: self.decoder.adaptive is not None,
            "a function of the logits": self.process is not None,
            "a stop string or criterion": self.ends is not None,
        }
        who = [name for name, watches in watching.items() if watches]
        if wanted is None:
            return 1 if who or self.target.device.type == "cpu" else LOOK_EVERY
        if wanted < 1:
            raise ValueError(f"look_every must be at least 1, got {wanted}")
        if wanted > 1 and who:
            raise ValueError(f"look_every must be 1 with {who[0]}, got {wanted}")
        return wanted

    @torch.inference_mode()
    def admit(
        self,
        prompts: list[list[int]],
        *,
        first: int = 0,
        max_new_tokens: int = 128,
        seed: int | Sequence[int] = 0,
    ) -> None:
        """Read prompts into the places first, first + 1, ..., which have to be free.

        Args:
            prompts: token ids.
            first: place of the first of them.
            max_new_tokens: at least 1.
            seed: one int, from which each prompt gets its own (see `row_seeds`), or one for each.

        Raises:
            ValueError: a place that is taken, a prompt that cannot be used, or no room for it.
        """
        check_prompts(self.target, prompts, max_new_tokens)
        places = range(first, first + len(prompts))
        seeds = row_seeds(seed, len(prompts))
        rows = slice(places.start, places.stop)
        ends = [min(len(row) + max_new_tokens, self.target.context_limit) - 1 for row in prompts]
        self._check(places, ends)
        device = self.device
        tokens, counts = pad(prompts, device)  # [n, N], [n]
        # the cache holds all tokens of a row but its last, so that every round is alike
        part = self.cache.part(rows)
        self._forget(places)
        with self.stats.time("prefill", device):
            before = self._prefill(rows, tokens, counts, part)
        self.lengths[rows] = counts - 1
        self.limit[rows] = torch.tensor(ends, device=device)
        self.seeds[rows] = torch.tensor(seeds, device=device)
        self.round[rows] = 0
        self.finished[rows] = False
        self.last[rows] = tokens.gather(1, counts[:, None] - 1)
        self._tell_prompts(rows, tokens, counts, before)
        for b, row, end in zip(places, prompts, ends, strict=True):
            self.texts[b], self.prompts[b] = list(row), len(row)
            self._lengths[b], self._limits[b] = len(row) - 1, end
            self.done[b] = False

    @torch.inference_mode()
    def abort(self, place: int) -> None:
        """End a row where it is; its blocks go back, and its place is free."""
        self.finished[place] = True
        self.done[place] = True
        if self.cache.pages is not None:
            nothing = torch.full_like(self.lengths[:, None], -1)
            commit(self.lengths, nothing, finished=self.finished, pages=self.cache.pages,
                   release=True, backend=self.decoder.backend)  # fmt: skip

    def has_room(self, *tokens: int) -> bool:
        """Whether rows of so many tokens, prompts included, may be admitted: rows that are under
        way could all reach their limits, and the pool of a paged cache would still do."""
        pages, more = self.cache.pages, [n - 1 for n in tokens]
        if max(more) > self.capacity or pages is None:
            return max(more) <= self.capacity
        running = [end for end, over in zip(self._limits, self.done, strict=True) if not over]
        blocks = sum(-(-end // pages.block_size) for end in [*running, *more])
        return blocks <= len(pages.references)

    def left(self) -> int:
        """The fewest tokens that a row under way may still emit; 0 without any."""
        rows = zip(self._limits, self._lengths, self.done, strict=True)
        return min((end - length for end, length, over in rows if not over), default=0)

    @torch.inference_mode()
    def step(self) -> Step:
        """Run one round, or `look_every` of them, and look at what they brought.

        Raises:
            DistributionError: the target's or drafter's logits define no distribution; names the
                row and reason. What other rows gained is in `texts`; they go on once `abort` has
                freed this one's place.
        """
        longest = max(self._lengths)
        if self.decoder.adaptive is not None:
            lengths, self.width, steps = self.decoder.adaptive.want(self.k)
            self.most.copy_(torch.tensor(lengths))
            if steps is not None:
                self.drafter.steps = steps  # type: ignore[union-attr]
        often = self.look_every == 1
        with nullcontext() if often else self.stats.time("rounds", self.device):
            for n in range(self.look_every):
                self._run(longest + n * (self.k + 1))
        return self._look()

    def _run(self, longest: int) -> None:
        """A round of rows of at most `longest` cached tokens."""
        captured = self._replay is not None and self.news is self.fresh
        if captured:
            longest = -(-longest // SPAN) * SPAN
        self.longest = longest
        if captured and self._replay is not None:
            self._replay(longest)
        else:
            self._round()

    def _round(self) -> None:
        """Draft, one target forward over K + 1 tokens, verify, commit."""
        decoder, target, cache = self.decoder, self.target, self.cache
        cache.set_lengths(
            self.lengths,
            self.longest,
            room=self.limit.masked_fill(self.finished, 0),
            exact=self.look_every == 1,
        )
        position = self.lengths + 1 if decoder.rule == "coupled" else None
        # a row drafts at most one token less than it may still emit
        room = torch.minimum(self.limit - self.lengths - 1, self.most).clamp(min=0)
        room = room.masked_fill(self.finished, 0)
        drafter = self.drafter if self.look_every > 1 or room.any() else None
        with self._time("draft"):
            draws = Draws(self.seeds, self.round, position)
            if drafter is None:
                draft, drafted = no_draft(room)
                self._miss()
            else:
                draft, drafted = self._draft(drafter, room, draws)
        with self._time("target"):
            ahead = draft.tokens.clamp(0, target.vocab_size - 1)  # verify reports bad ids
            read = torch.cat([self.last, ahead], 1)
            logits, hidden = target.forward(read, cache, layers=self.layers)
            if self.process is not None:
                logits = self.process(self.texts, ahead, logits)
        with self._time("verify"):
            verified = verify(
                logits, draft, *self.sampling.parameters,
                rule=decoder.rule, lenience=decoder.lenience,
                record=None if drafter is None else decoder.record,
                seed=self.seeds, round=self.round, position=position, backend=decoder.backend,
            )  # fmt: skip
            status = verified.status.masked_fill(self.finished, 0)
        with self._time("commit"):
            limit = self.limit if self.ends is None else self._cut(verified.emitted)
            committed = commit(
                self.lengths, verified.emitted,
                stop_tokens=self.stops, limit=limit, finished=self.finished,
                pages=cache.pages, release=cache.pages is not None, backend=decoder.backend,
                out=Committed(self.lengths, torch.empty_like(self.lengths), self.finished),
            )  # fmt: skip

        kept = committed.kept
        emitted = verified.emitted.clamp(min=0)  # [B, K + 1]
        end = emitted.gather(1, (kept[:, None] - 1).clamp(min=0))
        self.last.copy_(torch.where(kept[:, None] > 0, end, self.last))
        self.round += 1
        self._tell(emitted, kept, hidden)
        if self.logprobs:
            chances = log_probabilities(logits, emitted, self.sampling, decoder.backend)
            self._log(self.chances, chances)
        if decoder.lenience is not None:
            self._log(self.biases, verified.bias)
        self._log(self.emitted, emitted)
        self._log(self.counts, torch.stack([kept, verified.accepted, drafted, room, status]))
        self.slot.add_(1).remainder_(self.look_every)

    def _time(self, stage: str) -> AbstractContextManager[None]:
        """Timing waits for the device, so it is for those who look at every round."""
        return self.stats.time(stage, self.device) if self.look_every == 1 else nullcontext()

    def _draft(self, drafter: Drafter, room: Tensor, draws: Draws) -> tuple[Draft, Tensor]:
        """A draft as wide as k, or as its longest row if the host looks anyway; and its lengths."""
        looks = self.look_every == 1
        news = self.news if looks else self.news._replace(longest=self.longest + 1)
        if self.missed:
            news, self.missed = joined([*self.missed, news]), []
        # never narrower for want of room: a row's draft does not depend on that of its batch mates
        draft = drafter.draft(news, self.width, room, draws)
        if looks:
            self.undrafted = draft_status(draft)
        adaptive = self.decoder.adaptive
        if adaptive is not None:
            if draft.entangled:
                raise ValueError(
                    "k must be a number with a drafter that keeps entangled tokens: they have to "
                    "be examined, whatever was accepted before"
                )
            draft = adaptive.withhold(draft)
        lengths = torch.full_like(room, self.width) if draft.lengths is None else draft.lengths
        if not looks:
            return draft._replace(lengths=lengths), lengths
        if (lengths > room).any():
            raise ValueError(
                f"the drafter proposed {lengths.tolist()} tokens where {room.tolist()} were wanted"
            )
        width = int(lengths.max())
        tokens, tau, rows = (x[:, :width] for x in draft[:3])
        return draft._replace(tokens=tokens, tau=tau, rows=rows, lengths=lengths), lengths

    def _cut(self, emitted: Tensor) -> Tensor:
        """Limits by which each row ends at the first token after which `ends` says so. [B]"""
        limits = list(self._limits)
        for b, tokens in enumerate(emitted.tolist()):
            if self.ends is None or self.done[b]:
                continue
            new = self.texts[b][self.prompts[b] :]
            for n, token in enumerate(tokens[: self._limits[b] - self._lengths[b]]):
                if token < 0:
                    break
                new.append(token)
                if token in self._stop_tokens:
                    break
                if self.ends(b, new):
                    limits[b] = min(limits[b], self._lengths[b] + n + 1)
                    break
        return torch.tensor(limits, device=emitted.device)

    def _forget(self, places: range) -> None:
        """Other sequences take these places."""
        again = [b for b in places if self._used[b]]
        if again and self.drafter is not None:
            self.drafter.forget(again)
        if again and self.decoder.adaptive is not None:
            self.decoder.adaptive.forget(again)
        for b in places:
            self._used[b] = True
        for missed in self.missed:
            missed.counts[places.start : places.stop] = 0

    def _prefill(
        self, rows: slice, tokens: Tensor, counts: Tensor, cache: RowCache
    ) -> Tensor | None:
        """Read prompts but for their last tokens. -> the states before these [n, 1, width]

        A drafter that wants states reads along, chunk by chunk: a chunk's states are all there is.
        """
        if not self.hears or self.news.hidden is None:
            self.target.prefill(tokens, counts - 1, cache)
            return None
        drafter = cast(StateDrafter, self.drafter)
        last = torch.zeros_like(self.news.hidden[rows, :1])
        row = torch.arange(len(tokens), device=self.device)

        def heard(start: int, before: Tensor) -> None:
            read = before.shape[1] - 1
            known = (counts - 1 - start).clamp(0, read)
            news = News(tokens[:, start : start + read], known, before[:, :-1], start + read)
            drafter.read(rows, news)
            ends = (counts - 1 - start == known)[:, None]
            last[:, 0] = before[row, known].where(ends, last[:, 0])

        self.target.prefill(tokens, counts - 1, cache, layers=self.layers, heard=heard)
        return last

    def _miss(self) -> None:
        """Keep the news that the drafter is not told now, for when it is called again; of states
        so many that they fill a chunk, then it reads them."""
        if self.drafter is None or self.look_every > 1:
            return
        width = int(self.news.counts.max())
        tokens, counts, hidden, _ = self.news
        hidden = None if hidden is None else hidden[:, :width].clone()
        self.missed.append(News(tokens[:, :width].clone(), counts.clone(), hidden))
        if self.hears and sum(part.tokens.shape[1] for part in self.missed) >= PREFILL_CHUNK:
            cast(StateDrafter, self.drafter).read(slice(0, len(counts)), joined(self.missed))
            self.missed = []

    def _tell(self, emitted: Tensor, counts: Tensor, hidden: Tensor) -> None:
        """What a round brought is the drafter's news."""
        fresh = self.news = self.fresh
        width = emitted.shape[1]
        fresh.tokens[:, :width] = emitted
        fresh.counts.copy_(counts)
        if fresh.hidden is not None:
            fresh.hidden[:, :width] = hidden

    def _tell_prompts(
        self, rows: slice, tokens: Tensor, counts: Tensor, before: Tensor | None
    ) -> None:
        """Prompts are news of their rows, beside what the last round brought to others; of their
        last tokens alone, if the drafter has read the rest."""
        if before is not None:
            tokens, counts = tokens.gather(1, counts[:, None] - 1), torch.ones_like(counts)
        news, N = self.news, tokens.shape[1]
        more = max(0, N - news.tokens.shape[1])
        known, heard = F.pad(news.tokens, (0, more)), news.counts.clone()
        known[rows, :N], heard[rows] = tokens, counts
        hidden = news.hidden
        if hidden is not None and before is not None:
            hidden = hidden.clone()
            hidden[rows, :N] = before
        self.news = News(known, heard, hidden)

    def _log(self, log: Tensor, entry: Tensor) -> None:
        """Keep what a round brought, right-padded to the log's width, until the host looks."""
        padding = log.shape[-1] - entry.shape[-1]
        log.index_copy_(0, self.slot, F.pad(entry, (0, padding))[None])

    def _look(self) -> Step:
        """Read what the rounds since the last look brought, and add it to the texts."""
        if isinstance(self.cache, PagedRowCache):
            self.cache.check()
        emitted, chances = self.emitted.tolist(), self.chances.tolist() if self.logprobs else None
        if self.decoder.lenience is not None:
            self.stats.bias += float(self.biases.sum())
        batch = len(self.done)
        tokens: list[list[int]] = [[] for _ in range(batch)]
        logprobs: list[list[float]] | None = None if chances is None else [[] for _ in tokens]
        stood, proposed = [0] * batch, [0] * batch
        faults = [0] * batch
        for n, (kept, accepted, drafted, wanted, status) in enumerate(self.counts.tolist()):
            faults = [old or new for old, new in zip(faults, status, strict=True)]
            if not any(kept):
                continue  # all rows had finished
            self.stats.count(drafted, accepted, kept)
            if self.decoder.adaptive is not None:
                self.decoder.adaptive.update(wanted, drafted, accepted)
            for b in range(batch):
                tokens[b] += emitted[n][b][: kept[b]]
                if logprobs is not None and chances is not None:
                    logprobs[b] += chances[n][b][: kept[b]]
                stood[b] += min(accepted[b], kept[b])
                proposed[b] += drafted[b]
                self._lengths[b] += kept[b]
        for text, more in zip(self.texts, tokens, strict=True):
            text += more
        self.done = self.finished.tolist()
        if self.undrafted is not None:
            undrafted, self.undrafted = self.undrafted, None
            check_status(undrafted, "the drafter's logits: sequence")
        check_status(torch.tensor(faults), "sequence")
        return Step(tokens, stood, proposed, self.done, self.stats, logprobs)

    def _check(self, places: range, ends: list[int]) -> None:
        if places.start < 0 or places.stop > len(self.done):
            raise ValueError(
                f"places {places.start} to {places.stop - 1} were asked for, but the session has "
                f"{len(self.done)}: open it with more rows"
            )
        if taken := [b for b in places if not self.done[b]]:
            raise ValueError(f"place {taken[0]} is taken: wait until done[{taken[0]}]")
        if max(ends) > self.capacity:
            raise ValueError(
                f"a row of up to {max(ends) + 1} tokens does not fit a session of capacity "
                f"{self.capacity}: open it with a larger one, or lower max_new_tokens"
            )
        if not self.has_room(*(end + 1 for end in ends)):
            raise ValueError(
                "the pool has too few blocks for these rows beside those under way: wait for one "
                "to finish, or open the session with more blocks"
            )


def check_prompts(target: Target, prompts: list[list[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ValueError(f"max_new_tokens must be at least 1, got {max_new_tokens}")
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    for b, row in enumerate(prompts):
        if not row:
            raise ValueError(f"prompt {b} is empty: give it at least one token, such as the bos")
        if min(row) < 0 or max(row) >= target.vocab_size:
            raise ValueError(
                f"prompt {b} has ids from {min(row)} to {max(row)}, outside the target's "
                f"vocabulary [0, {target.vocab_size}): was it made with another tokenizer?"
            )
        if len(row) >= target.context_limit:
            raise ValueError(
                f"prompt {b} has {len(row)} tokens and leaves no room in the target's context of "
                f"{target.context_limit}: shorten it"
            )


def no_draft(room: Tensor) -> tuple[Draft, Tensor]:
    """A draft of width 0 for each row, and its lengths."""
    none, lengths = room.new_empty(len(room), 0), torch.zeros_like(room)
    return Draft(none, none.int(), none, lengths=lengths), lengths


def pad(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-pad with 0. -> tokens i64 [B, N], counts i64 [B]"""
    counts = [len(row) for row in rows]
    tokens = [row + [0] * (max(counts) - len(row)) for row in rows]
    return torch.tensor(tokens, device=device), torch.tensor(counts, device=device)


def log_probabilities(
    logits: Tensor, tokens: Tensor, sampling: Sampling, backend: str | None
) -> Tensor:
    """log p of tokens [B, Q] under the distribution that each row [B, Q, V] is sampled from, f64
    [B, Q].

    Greedy rows are those of temperature 1, without truncation.
    """
    parameters = Sampling(1.0).parameters if sampling.greedy else sampling.parameters
    rows = logits.flatten(0, 1)
    distribution = row_distribution(rows, *parameters, backend=backend)
    logit = rows.gather(1, tokens.flatten()[:, None])[:, 0].float()
    # weights are 2^44 2^t; total is their sum over what is not truncated
    t = ((logit - distribution.max) * distribution.scale).double()
    return (math.log(2) * (t + 44 - distribution.total.double().log2())).view(tokens.shape)
