"""Controlled: runs a drafter, then replaces its tokens so that acceptance has a set value.

It measures the cost of rounds, not the quality of a drafter: acceptance is an input. A pair of
models can thus be timed at an acceptance that others report, without their weights.
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
    """Runs a drafter and replaces its tokens by tokens that are accepted with a set probability.

    Such runs measure the cost of rounds, not the quality of a drafter. The text of plain decoding
    after each prompt must be known beforehand. Each drafted token is independently the token of
    that text with probability `chance`, and else its neighbour in the vocabulary. Under greedy
    decoding, and under the coupled rule at any temperature, a token is accepted iff it is the
    text's token. Acceptance is therefore exactly as set, for any drafter and target, and the
    output is plain decoding's text. Nothing is drafted after the end of a known text. If the
    drafter's rounds can be captured, so can these, once every row of the session has had a prompt.

    The draws depend on `seed`, the sequence's seed, its prompt and the position only. Runs are
    reproducible, and at a constant chance the same tokens are rejected for all K and T.

    Args:
        drafter: the drafter to run. Its forwards and reverse steps count as cost. Its tokens and
            their distributions are dropped.
        texts: prompt, as a tuple -> the text of plain decoding with the same seed, prompt included.
            It must be as long as the decoding. `learn` adds texts.
        chance: probability that a drafted token is accepted, given that all before it were: one
            number, or one for each of at least K positions.
        seed: seed of the draws.

    Raises:
        ValueError: a chance is outside [0, 1], or as `learn`.

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
        """Add the text of a prompt, or extend a known text.

        Raises:
            ValueError: the text does not begin with the prompt, has no continuation, or contradicts
                the known text.
        """
        key, text = tuple(prompt), list(text)
        if not key or tuple(text[: len(key)]) != key or len(text) == len(key):
            raise ValueError(
                f"text must be its prompt of {len(key)} tokens and a continuation, got {len(text)} "
                "tokens: pass an entry of Generation.sequences"
            )
        known = self.texts.get(key, [])
        if known[: len(text)] != text[: len(known)]:
            raise ValueError(
                f"text differs from the known text of this prompt of {len(key)} tokens: before "
                "adding texts of another seed or target, clear `texts`"
            )
        self.texts[key] = max(known, text, key=len)

    def start(self, batch: int, capacity: int, sampling: RowSampling) -> None:
        self.drafter.start(batch, capacity, sampling)
        self.sampling = sampling
        self.shape = batch, capacity
        self.unheard = set(range(batch))
        # row whose prompt is not known yet -> tokens that `read` passed
        self.earlier: dict[int, list[int]] = {}
        self.tokens: Any = None  # allocated with the rest at the first news, on its device

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
                "Controlled needs a text that is known beforehand: expected temperature 0 or "
                "rule='coupled', got another rule at a higher temperature"
            )
        draft = self.drafter.draft(news, k, lengths, draws)
        text, coins = self._hear(news, draws)
        self.counts.add_(news.counts)  # in place, because a captured round reads it again
        K = draft.tokens.shape[1]
        left = (self.ends - self.counts).clamp(min=0)
        if news.longest is None and ((lengths > 0) & (left == 0)).any():
            raise ValueError(
                "texts: a row continues after the end of its known text: learn longer texts, "
                "decoded by the same target with the same seed and stop tokens"
            )
        at = self.counts[:, None] + torch.arange(K, device=lengths.device)  # [B, K]
        at.clamp_(max=text.shape[1] - 1)
        right = text.gather(1, at)
        wrong = (right - 1).abs()  # in any vocabulary of at least two tokens
        wanted = torch.full_like(left, K) if draft.lengths is None else draft.lengths
        tokens = right.where(coins.gather(1, at) < self._chances(K), wrong)
        return Draft.guesses(tokens, torch.minimum(wanted, left))._replace(entropy=draft.entropy)

    def _chances(self, K: int) -> Tensor:
        """Acceptance of the K positions of a draft, f32 [K], or [] if it is constant."""
        if self.limits.ndim and len(self.limits) < K:
            raise ValueError(
                f"chance must have a value for each of K = {K} positions, got {len(self.limits)}"
            )
        return self.limits[:K] if self.limits.ndim else self.limits

    def _hear(self, news: News, draws: Draws) -> tuple[Tensor, Tensor]:
        """Texts i64 [B, N] and draws f32 [B, N] of all rows, including those that begin now.

        It waits for the device only while some row has had no prompt.
        """
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
        """Begin a sequence with this seed in row b."""
        row, coins = self.tokens[b], self.coins[b]  # [N]
        # the hash of a tuple of ints is the same in every process
        generator = torch.Generator().manual_seed(hash((self.seed, seed, *prompt)))
        coins.copy_(torch.rand(len(coins), generator=generator))
        text = self.texts[prompt][: len(row)]
        row[: len(text)] = torch.tensor(text)
        self.counts[b], self.ends[b] = 0, len(text)
        self.unheard.remove(b)

    def _find(self, b: int, tokens: list[int]) -> tuple[int, ...]:
        """The known prompt that `tokens` begin with.

        `tokens` are longer than the prompt if there were rounds without a draft.
        """
        for n in range(len(tokens), 0, -1):
            if (prompt := tuple(tokens[:n])) in self.texts:
                return prompt
        raise ValueError(
            f"texts: row {b}'s prompt of {len(tokens)} tokens, beginning with {tokens[:4]}, is not "
            f"among the {len(self.texts)} known prompts: decode it without drafts and call "
            "learn(prompt, text) first"
        )


def chance_for_share(alpha: float, k: int) -> float:
    """The constant acceptance a at which a share alpha of the drafted tokens is accepted.

    It solves sum_{i=1..k} a^i = alpha k. A token is accepted only if all before it are, so a >=
    alpha. SpecDiff (2408.05636) reports a share: alpha k accepted tokens a draft. Leviathan et al.
    (2211.17192) call a itself alpha.

    Args:
        alpha: accepted tokens / drafted tokens, in [0, 1].
        k: draft length, at least 1.

    Raises:
        ValueError: an argument is out of range.

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
