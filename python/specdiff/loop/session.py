"""Session: rows that are decoded together, each admitted and finished by itself.

A round is a draft, one target forward over K + 1 tokens, `verify` and `commit`. Lengths, tokens and
counts stay on the device; the host looks at them every so many rounds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Integral
from typing import Any, cast

import torch
from torch import Tensor

from specdiff_kernels import (
    Committed,
    Draft,
    Tree,
    Verified,
    check_status,
    commit,
    row_distribution,
    row_seeds,
    verify,
    verify_tree,
)

from .arguments import Prompts, as_rows, check_prompts, per_prompt, token_ids, whole_number
from .cache import PagedRowCache
from .capture import Captured
from .drafter import Draws
from .drafting import Drafting
from .rows import DeviceRows, HostRows, Log
from .sampling import RowSampling, Sampling
from .settings import Settings
from .stats import Stats, Step
from .trees import Growth, behind_root

LOOK_EVERY = 8  # rounds, on a GPU

# tokens of each row, drafted tokens i64 [B, K], logits [B, K + 1, V] -> other logits [B, K + 1, V]
Process = Callable[[list[list[int]], Tensor, Tensor], Tensor]
# row, its new tokens up to some token -> whether it ends there
Ends = Callable[[int, list[int]], bool]


class Session:
    """A batch of rows under decoding; `Decoder.open` makes it.

    Rows begin as finished ones. `admit` puts prompts into places that are free, `step` runs rounds.

    Attributes:
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
        settings: Settings,
        rows: int,
        capacity: int,
        sampling: Sampling,
        stop_tokens: Sequence[int],
        *,
        process: Process | None = None,
        ends: Ends | None = None,
        logprobs: bool = False,
        look_every: int | None = None,
        capture: bool | Captured = False,
        block_size: int | None = None,
        blocks: int | None = None,
    ) -> None:
        if not isinstance(sampling, Sampling):
            raise TypeError(
                f"sampling must be a specdiff.Sampling, got {sampling!r}: pass "
                "Sampling(temperature=...)"
            )
        stops = token_ids("stop_tokens", stop_tokens)
        self.settings, self.target, self.capacity = settings, settings.target, capacity
        self.process, self.ends, self.logprobs = process, ends, logprobs
        self.look_every = self._look_every(look_every)
        self._captured = Captured(self.target.device) if capture is True else capture or None
        if self._captured is not None:
            self._check_capture()
        if process is not None and settings.tree is not None:
            raise ValueError("process sees chains alone: open a decoder without tree")
        device = self.target.device
        # a forward brings k tokens that may all be padding, or a tree's nodes, which are not
        self.more = 0 if settings.tree is None else settings.tree.nodes
        self.cache = self.target.new_cache(
            rows, capacity + max(settings.k, self.more), block_size=block_size, blocks=blocks
        )
        self.stats = Stats()
        self.sampling = RowSampling(sampling, rows, device)
        self.host = HostRows.empty(rows)
        self.rows = DeviceRows(rows, stops, device)
        self.log = Log(
            self.look_every, rows, settings.k + 1, device,
            logprobs=logprobs, bias=settings.lenience is not None,
        )  # fmt: skip
        self.drafting = Drafting(
            settings, rows, capacity + 1, self.sampling, looks=self.look_every == 1
        )
        self.longest = 0  # at least the largest of the lengths
        self.next_seed = 0  # of a prompt that comes without one
        self._stop_tokens = frozenset(stops)

    @property
    def texts(self) -> list[list[int]]:
        """Prompt and new tokens of each row."""
        return self.host.texts

    @property
    def prompts(self) -> list[int]:
        """How many tokens of each row are the prompt's."""
        return self.host.prompts

    @property
    def done(self) -> list[bool]:
        """Whether a row has finished, so that its place is free."""
        return self.host.done

    def _look_every(self, wanted: int | None) -> int:
        """Rounds between two looks: 1 if something on the host has to see each of them."""
        chooser = self.settings.chooser
        watching = {
            type(chooser).__name__: chooser is not None,
            "a function of the logits": self.process is not None,
            "a stop string or criterion": self.ends is not None,
        }
        who = [name for name, watches in watching.items() if watches]
        if wanted is None:
            return 1 if who or self.target.device.type == "cpu" else LOOK_EVERY
        wanted = whole_number("look_every", wanted, 1)
        if wanted > 1 and who:
            raise ValueError(f"look_every must be 1 with {who[0]}, got {wanted}")
        return wanted

    def _check_capture(self) -> None:
        drafter = self.settings.drafter
        if self.look_every == 1:
            raise ValueError("capture needs a look_every above 1: the host cannot look at a graph")
        if self.settings.tree is not None:
            raise ValueError("capture: trees are built on the host so far; leave tree out")
        if drafter is not None and not drafter.capturable:
            raise ValueError(
                f"capture: {type(drafter).__name__} waits for the device or keeps new memory; "
                "take a drafter that is `capturable`, or none"
            )

    @torch.inference_mode()
    def admit(
        self,
        prompts: Prompts,
        *,
        first: int = 0,
        max_new_tokens: int | Sequence[int] = 128,
        seed: int | Sequence[int] | None = None,
        sampling: Sampling | Sequence[Sampling] | None = None,
    ) -> None:
        """Read prompts into the places first, first + 1, ..., which have to be free.

        Args:
            prompts: token ids, one prompt or several.
            first: place of the first of them.
            max_new_tokens: at least 1; one number, or one for each prompt.
            seed: one int, from which each prompt gets its own (see `row_seeds`), or one for each.
                The same seed gives the same prompt the same text. None: each prompt of the session
                gets another one, in the order in which they are admitted.
            sampling: of all these rows, or one for each; None: the session's.

        Raises:
            ValueError: a place is taken, a prompt cannot be used, there is no room for it, or there
                are not as many values as prompts.
            TypeError: a value of another type.
        """
        texts = as_rows(prompts)
        n = len(texts)
        new = per_prompt("max_new_tokens", max_new_tokens, (Integral,), n)
        check_prompts(self.target, texts, min(new, default=1))
        each = [
            self.sampling.common if one is None else one
            for one in per_prompt("sampling", sampling, (Sampling, type(None)), n)
        ]
        places = range(first, first + n)
        *own, next_seed = row_seeds(self.next_seed, n + 1)
        seeds = own if seed is None else row_seeds(seed, n)
        rows = slice(places.start, places.stop)
        limits = [
            min(len(row) + more, self.target.context_limit) - 1
            for row, more in zip(texts, new, strict=True)
        ]
        self._check(places, limits)
        tokens, counts = pad(texts, self.target.device)  # [n, N], [n]
        # the cache holds all tokens of a row but its last, so that every round is alike
        part = self.cache.part(rows)
        self.drafting.forget(places, self.host.used)
        for b in places:  # before anything is read, which may fail
            self.host.used[b] = True
        if self.sampling.admit(rows, each) and self._captured is not None:
            self._captured.forget()  # its graphs read other tensors
        with self.stats.time("prefill", self.target.device):
            self.drafting.prefill(rows, tokens, counts, part)
        self.rows.admit(rows, tokens, counts, limits, seeds)
        self.host.admit(places, texts, limits)
        self.next_seed = next_seed

    @torch.inference_mode()
    def abort(self, place: int) -> None:
        """End a row where it is; its blocks go back, and its place is free."""
        rows = self.rows
        rows.finished[place] = True
        self.host.done[place] = True
        if self.cache.pages is not None:
            nothing = torch.full_like(rows.last, -1)
            commit(rows.lengths, nothing, finished=rows.finished, pages=self.cache.pages,
                   release=True, backend=self.settings.backend)  # fmt: skip

    def has_room(self, *tokens: int) -> bool:
        """Whether rows of so many tokens, prompts included, may be admitted: rows that are under
        way could all reach their limits, and the pool of a paged cache would still do."""
        pages, more = self.cache.pages, [n - 1 for n in tokens]
        if max(more) > self.capacity or pages is None:
            return max(more) <= self.capacity
        rows = zip(self.host.limits, self.host.done, strict=True)
        running = [limit for limit, over in rows if not over]
        blocks = sum(-(-(limit + self.more) // pages.block_size) for limit in [*running, *more])
        return blocks <= len(pages.references)

    def left(self) -> int:
        """The fewest tokens that a row under way may still emit; 0 without any."""
        return self.host.left()

    @torch.inference_mode()
    def step(self) -> Step:
        """Run one round, or `look_every` of them, and look at what they brought.

        Raises:
            DistributionError: the target's or drafter's logits define no distribution; names the
                row and reason. The tokens of other rows are in `texts`; they go on once `abort` has
                freed this row's place.
            ValueError: the drafter or the chooser broke its contract.
        """
        longest = max(self.host.lengths)
        self.drafting.choose()
        often = self.look_every == 1
        with nullcontext() if often else self.stats.time("rounds", self.target.device):
            for n in range(self.look_every):
                self._run(longest + n * (self.settings.k + 1))
        return self._look()

    def _run(self, longest: int) -> None:
        """A round of rows of at most `longest` cached tokens."""
        captured = self._captured if self.drafting.news is self.drafting.fresh else None
        if captured is None:
            self.longest = longest
            self._round()
        else:
            self.longest = -(-longest // captured.span) * captured.span
            captured(self.longest, self._round)

    def _round(self) -> None:
        """Draft, one target forward over K + 1 tokens, verify, commit."""
        settings, target, cache, rows = self.settings, self.target, self.cache, self.rows
        cache.set_lengths(
            rows.lengths,
            self.longest,
            room=(rows.limit + self.more).masked_fill(rows.finished, 0),
            exact=self.look_every == 1,
        )
        position = rows.lengths + 1 if settings.rule == "coupled" else None
        # a row drafts at most one token less than it may still emit
        room = torch.minimum(rows.limit - rows.lengths - 1, self.drafting.most).clamp(min=0)
        room = room.masked_fill(rows.finished, 0)
        with self._time("draft"):
            draws = Draws(rows.seeds, rows.round, position)
            draft, drafted = self.drafting.draft(room, draws, self.longest + 1)
        with self._time("target"):
            ahead = draft.tokens.clamp(0, target.vocab_size - 1)  # verify reports bad ids
            read = torch.cat([rows.last, ahead], 1)
            tree = {"parents": behind_root(draft)} if isinstance(draft, Tree) else {}
            logits, hidden = target.forward(read, cache, layers=self.drafting.layers, **tree)
            if self.process is not None:
                logits = self.process(self.host.texts, ahead, logits)
        with self._time("verify"):
            verified, path = self._verify(logits, draft, position)
            status = verified.status.masked_fill(rows.finished, 0)
            if path is not None:  # what is behind the path is of no more interest
                at = path.clamp(min=0)[..., None]
                hidden = hidden.gather(1, at.expand(-1, -1, hidden.shape[2]))
                if self.logprobs:
                    logits = logits.gather(1, at.expand(-1, -1, logits.shape[2]))
        with self._time("commit"):
            moved = path if path is None or not self._lies_in_order(path) else None
            limit = rows.limit if self.ends is None else self._cut(verified.emitted)
            kept, last = torch.empty_like(rows.lengths), torch.empty_like(rows.lengths)
            commit(
                rows.lengths, verified.emitted,
                stop_tokens=rows.stops, limit=limit, finished=rows.finished,
                pages=cache.pages, release=cache.pages is not None, backend=settings.backend,
                path=moved, caches=() if moved is None else cache.stores(),
                out=Committed(rows.lengths, kept, rows.finished, last),
            )  # fmt: skip

        emitted = verified.emitted.clamp(min=0)  # [B, K + 1]
        rows.advance(last)
        self.drafting.tell(emitted, kept, hidden)
        chances = None
        if self.logprobs:
            chances = log_probabilities(logits, emitted, self.sampling, settings.backend)
        self.log.write(
            emitted,
            torch.stack([kept, verified.accepted, drafted, room, status]),
            chances,
            None if settings.lenience is None else verified.bias,
        )

    def _verify(
        self, logits: Tensor, draft: Draft | Tree, position: Tensor | None
    ) -> tuple[Verified, Tensor | None]:
        """What the target's logits say of a draft; and of a tree the accepted path, as `commit`
        takes it, up to the depth that it can have."""
        settings, rows = self.settings, self.rows
        keys: dict[str, Any] = dict(seed=rows.seeds, round=rows.round, position=position)
        if isinstance(draft, Draft):
            return verify(
                logits, draft, *self.sampling.parameters,
                rule=settings.rule, lenience=settings.lenience,
                record=settings.record if self.drafting.called else None,
                **keys, backend=settings.backend,
            ), None  # fmt: skip
        rule = cast(Growth, settings.tree).rule
        tree = verify_tree(
            logits, draft, *self.sampling.parameters, rule=rule, **keys, backend=settings.backend
        )
        end = settings.k + 1
        none = torch.zeros_like(tree.accepted, dtype=torch.float64)
        verified = Verified(tree.accepted, tree.emitted[:, :end].contiguous(), tree.status, none)
        return verified, tree.path[:, :end].contiguous()

    def _lies_in_order(self, path: Tensor) -> bool:
        """Whether the host can see that accepted nodes lie one behind the other already."""
        if self.look_every > 1:
            return False
        own = torch.arange(path.shape[1], device=path.device)
        return bool(((path == own) | (path < 0)).all())

    def _time(self, stage: str) -> AbstractContextManager[None]:
        """Timing waits for the device, so it is for those who look at every round."""
        often = self.look_every == 1
        return self.stats.time(stage, self.target.device) if often else nullcontext()

    def _cut(self, emitted: Tensor) -> Tensor:
        """Limits by which each row ends at the first token after which `ends` says so. [B]"""
        host = self.host
        limits = list(host.limits)
        for b, tokens in enumerate(emitted.tolist()):
            if self.ends is None or host.done[b]:
                continue
            new = host.new(b)
            for n, token in enumerate(tokens[: host.limits[b] - host.lengths[b]]):
                if token < 0:
                    break
                new.append(token)
                if token in self._stop_tokens:
                    break
                if self.ends(b, new):
                    limits[b] = min(limits[b], host.lengths[b] + n + 1)
                    break
        return torch.tensor(limits, device=emitted.device)

    def _look(self) -> Step:
        """Read what the rounds since the last look brought, and add it to the texts."""
        host, chooser = self.host, self.settings.chooser
        if isinstance(self.cache, PagedRowCache):
            self.cache.check()
        self.stats.bias += self.log.bias()
        batch = len(host.done)
        tokens: list[list[int]] = [[] for _ in range(batch)]
        logprobs: list[list[float]] | None = [[] for _ in tokens] if self.logprobs else None
        stood, proposed, faults = [0] * batch, [0] * batch, [0] * batch
        for round in self.log.read():
            faults = [old or new for old, new in zip(faults, round.status, strict=True)]
            if not any(round.kept):
                continue  # all rows had finished
            self.stats.count(round.drafted, round.accepted, round.kept)
            if chooser is not None:
                chooser.update(round.wanted, round.drafted, round.accepted)
            for b, kept in enumerate(round.kept):
                tokens[b] += round.emitted[b][:kept]
                if logprobs is not None and round.logprobs is not None:
                    logprobs[b] += round.logprobs[b][:kept]
                stood[b] += min(round.accepted[b], kept)
                proposed[b] += round.drafted[b]
                host.lengths[b] += kept
        for text, more in zip(host.texts, tokens, strict=True):
            text += more
        host.done = self.rows.finished.tolist()
        if self.drafting.status is not None:
            status, self.drafting.status = self.drafting.status, None
            check_status(status, "the drafter's logits: sequence")
        check_status(torch.tensor(faults), "sequence")
        return Step(tokens, stood, proposed, host.done, self.stats, logprobs)

    def _check(self, places: range, limits: list[int]) -> None:
        done = self.host.done
        if places.start < 0 or places.stop > len(done):
            raise ValueError(
                f"places {places.start} to {places.stop - 1} were asked for, but the session has "
                f"{len(done)}: open it with more rows"
            )
        if taken := [b for b in places if not done[b]]:
            free = [b for b, over in enumerate(done) if over]
            raise ValueError(
                f"place {taken[0]} is taken: wait until done[{taken[0]}], or pass first=, the "
                f"first of some free places; free are {free}"
            )
        if max(limits) > self.capacity:
            raise ValueError(
                f"a row of up to {max(limits) + 1} tokens does not fit a session of capacity "
                f"{self.capacity + 1}: open it with a larger one, or lower max_new_tokens"
            )
        if not self.has_room(*(limit + 1 for limit in limits)):
            raise ValueError(
                "the pool has too few blocks for these rows beside those under way: wait for one "
                "to finish, or open the session with more blocks"
            )


def pad(rows: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    """Right-pad with 0. -> tokens i64 [B, N], counts i64 [B]"""
    counts = [len(row) for row in rows]
    tokens = [row + [0] * (max(counts) - len(row)) for row in rows]
    return torch.tensor(tokens, device=device), torch.tensor(counts, device=device)


def log_probabilities(
    logits: Tensor, tokens: Tensor, sampling: RowSampling, backend: str | None
) -> Tensor:
    """log p of tokens [B, Q] under the distribution that each row [B, Q, V] is sampled from, f64
    [B, Q].

    Greedy rows are those of temperature 1, without truncation.
    """
    rows, Q = logits.flatten(0, 1), logits.shape[1]
    parameters = sampling.without_greedy()
    each: Any = [x if x is None else x.repeat_interleave(Q) for x in parameters]
    distribution = row_distribution(rows, *each, backend=backend)
    logit = rows.gather(1, tokens.flatten()[:, None])[:, 0].float()
    return distribution.log_probability(logit).view(tokens.shape)
