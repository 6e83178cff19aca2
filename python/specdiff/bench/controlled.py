"""Controlled: a drafter that does all its work, and then drafts what the target accepts as often as
it is told to.

It measures what rounds cost, not how good a drafter is: acceptance is put in, not found out. So a
pair of models can be timed at the acceptance that others report, without their weights.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from specdiff_kernels import Draft

from ..loop.drafter import Drafter, Draws, News
from ..loop.sampling import RowSampling
from ..theory.speed import least


class Controlled(Drafter):
    """Runs a drafter, then puts tokens in place of its own that stand with a set probability.

    Runs with it measure cost, not a drafter. What plain decoding says after each prompt has to be
    known beforehand. A drafted token is the right one with probability `chance`, drawn for each
    token by itself, and else its neighbour in the vocabulary. Under greedy decoding, and under the
    coupled rule at any temperature, a token is accepted iff it is the text's own, so that
    acceptance is exactly as set, whatever the drafter and the target are. The text stays plain
    decoding's. Nothing is drafted behind the end of a known text. Rounds can be captured if the
    drafter's can, in sessions of which every place has had a prompt.

    The draws belong to `seed`, the sequence's own seed, its prompt and the position in its text: a
    run is the same again, and at a constant chance other K and T stumble at the same tokens.

    Args:
        drafter: what works. Its forwards and reverse steps happen, and their cost is counted; its
            tokens and their distributions are dropped.
        texts: by prompt, as a tuple, the text that plain decoding gives with the same seed, prompt
            included, and as long as will be decoded; see `learn` for more of them.
        chance: that a drafted token is accepted, given that all before it were: one number, or one
            for each position, of which there are then at least K.
        seed: of the draws.

    Raises:
        ValueError: a chance outside [0, 1], or as `learn`.

    Example:
        >>> plain = Decoder(target).generate(prompt, max_new_tokens=64, stop_tokens=())
        >>> drafter = Controlled(drafter, {tuple(prompt): plain.sequences[0]}, chance=0.9)
        >>> Decoder(target, drafter).generate(prompt, max_new_tokens=64, stop_tokens=()).stats
    """

    def __init__(
        self,
        drafter: Drafter,
        texts: Mapping[tuple[int, ...], Sequence[int]],
        chance: float | Sequence[float],
        *,
        seed: int = 0,
    ) -> None:
        for c in chance if isinstance(chance, Sequence) else [chance]:
            if not 0 <= c <= 1:
                raise ValueError(f"chance must be in [0, 1], got {c}")
        self.drafter: Any = drafter
        self.chance = chance
        self.seed = seed
        self.needs_hidden = drafter.needs_hidden
        self.vocab_size = drafter.vocab_size
        self.block = drafter.block
        self.capturable, self.reads = drafter.capturable, drafter.reads
        self.most, self.target_layers = drafter.most, drafter.target_layers
        self.texts: dict[tuple[int, ...], list[int]] = {}
        for prompt, text in texts.items():
            self.learn(prompt, text)

    @property
    def steps(self) -> int | None:
        """T of the drafter; None: it takes no steps."""
        return self.drafter.steps

    @steps.setter
    def steps(self, steps: int | None) -> None:
        self.drafter.steps = steps

    def learn(self, prompt: Sequence[int], text: Sequence[int]) -> None:
        """Know the text of one more prompt, or more of one that is known.

        Raises:
            ValueError: the text does not begin with the prompt and go on, or contradicts the one
                that is known.
        """
        key, text = tuple(prompt), list(text)
        if not key or tuple(text[: len(key)]) != key or len(text) == len(key):
            raise ValueError(
                f"text must begin with its prompt of {len(key)} tokens and go on, got {len(text)} "
                "tokens: pass prompt and continuation, as Generation.sequences holds them"
            )
        known = self.texts.get(key, [])
        if known[: len(text)] != text[: len(known)]:
            raise ValueError(
                f"text differs from the one that is known of this prompt of {len(key)} tokens: for "
                "texts of another seed or target, clear `texts` first"
            )
        self.texts[key] = max(known, text, key=len)

    def start(self, batch: int, capacity: int, sampling: RowSampling) -> None:
        self.drafter.start(batch, capacity, sampling)
        self.sampling = sampling
        self.shape = batch, capacity
        self.unheard = set(range(batch))
        self.earlier: dict[int, list[int]] = {}  # what an unheard place was told by `read`
        self.tokens: Any = None  # made with the rest on the device of the first news

    def forget(self, rows: list[int]) -> None:
        self.drafter.forget(rows)
        self.unheard.update(rows)
        for b in rows:
            self.earlier.pop(b, None)

    def read(self, rows: slice, news: News) -> None:
        self.drafter.read(rows, news)
        told = zip(news.tokens.tolist(), news.counts.tolist(), strict=True)
        for b, (tokens, count) in enumerate(told, rows.start):
            if b in self.unheard:
                self.earlier.setdefault(b, []).extend(tokens[:count])
            else:
                self.counts[b] += count

    @torch.no_grad()
    def draft(self, news: News, k: int, lengths: Tensor, draws: Draws) -> Draft:
        if draws.position is None and not self.sampling.greedy:
            raise ValueError(
                "Controlled sets acceptance only where the text is known beforehand: decode with "
                "temperature 0 or rule='coupled', got another rule at a higher temperature"
            )
        draft = self.drafter.draft(news, k, lengths, draws)
        text, coins = self._hear(news, draws)
        self.counts.add_(news.counts)  # in place: a captured round reads it again
        K = draft.tokens.shape[1]
        left = (self.ends - self.counts).clamp(min=0)
        if news.longest is None and ((lengths > 0) & (left == 0)).any():
            raise ValueError(
                "texts: a row goes on behind the end of its text: learn texts of as many tokens, "
                "decoded by the same target, with the same seed and stop tokens"
            )
        at = self.counts[:, None] + torch.arange(K, device=lengths.device)  # [B, K]
        at.clamp_(max=text.shape[1] - 1)
        right = text.gather(1, at)
        wrong = (right - 1).abs()  # in every vocabulary of two tokens
        wanted = torch.full_like(left, K) if draft.lengths is None else draft.lengths
        return Draft(
            tokens=right.where(coins.gather(1, at) < self._chances(K), wrong),
            tau=torch.zeros_like(at, dtype=torch.int32),
            rows=torch.full_like(at, -1),
            lengths=torch.minimum(wanted, left),
            entropy=draft.entropy,
        )

    def _chances(self, K: int) -> Tensor:
        """Of the K positions of a draft, f32 [K], or [] if they are all alike."""
        if self.limits.ndim and len(self.limits) < K:
            raise ValueError(
                f"chance must have a value for each of K = {K} positions, got {len(self.limits)}"
            )
        return self.limits[:K] if self.limits.ndim else self.limits

    def _hear(self, news: News, draws: Draws) -> tuple[Tensor, Tensor]:
        """Texts i64 [B, N] and draws f32 [B, N] of all rows, after a look at whose first news these
        are. The device is waited for only while some place has had no prompt."""
        if self.tokens is None:
            device = news.tokens.device
            self.tokens = torch.zeros(self.shape, dtype=torch.int64, device=device)
            self.coins = torch.zeros(self.shape, device=device)
            self.counts = torch.zeros_like(self.tokens[:, 0])  # tokens of each row so far
            self.ends = torch.zeros_like(self.counts)  # tokens of each text
            self.limits = torch.tensor(self.chance, dtype=torch.float32, device=device)
        if self.unheard:
            seeds = draws.seed.tolist()
            for b, count in enumerate(news.counts.tolist()):
                if count and b in self.unheard:
                    earlier = self.earlier.pop(b, [])
                    begun = [*earlier, *news.tokens[b, :count].tolist()]
                    self._open(b, self._find(b, begun), seeds[b])
                    self.counts[b] = len(earlier)
        return self.tokens, self.coins

    def _open(self, b: int, prompt: tuple[int, ...], seed: int) -> None:
        """A sequence of this seed begins in place b."""
        row, coins = self.tokens[b], self.coins[b]  # [N]
        # a hash of ints alone is the same in every process
        generator = torch.Generator().manual_seed(hash((self.seed, seed, *prompt)))
        coins.copy_(torch.rand(len(coins), generator=generator))
        text = self.texts[prompt][: len(row)]
        row[: len(text)] = torch.tensor(text)
        self.counts[b], self.ends[b] = 0, len(text)
        self.unheard.remove(b)

    def _find(self, b: int, tokens: list[int]) -> tuple[int, ...]:
        """The known prompt that they begin with; rounds without a draft may have brought more."""
        for n in range(len(tokens), 0, -1):
            if (prompt := tuple(tokens[:n])) in self.texts:
                return prompt
        raise ValueError(
            f"texts: expected one of row {b}'s prompt, {len(tokens)} tokens from {tokens[:4]} on, "
            f"got those of {len(self.texts)} others: decode it plainly and learn(prompt, text) "
            "first"
        )


def chance_for_share(alpha: float, k: int) -> float:
    """The constant chance a at which the share alpha of drafted tokens is accepted.

    sum_{i=1..k} a^i = alpha k. A token counts only if all before it were accepted, so that a is
    above alpha. SpecDiff (2408.05636) reports alpha k accepted tokens a draft, a share; Leviathan
    et al. (2211.17192) call a itself alpha.

    Args:
        alpha: accepted tokens / drafted tokens, in [0, 1].
        k: tokens of a draft, at least 1.

    Raises:
        ValueError: an argument out of its range.

    Example:
        >>> chance_for_share(0.375, 2)
        0.5
    """
    if not 0 <= alpha <= 1:
        raise ValueError(f"alpha must be in [0, 1], got {alpha}")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    chance = least(partial(enough, alpha, k), 0.0, 1.0)
    return 1.0 if chance is None or alpha == 1 else chance


def enough(alpha: float, k: int, chance: float) -> bool:
    return math.fsum(chance**i for i in range(1, k + 1)) >= alpha * k
