"""Autoregressive drafter: a smaller causal language model drafts token by token.

This is standard speculative decoding (Leviathan et al. 2211.17192, Chen et al. 2302.01318), the
baseline.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specdiff_kernels import Draft, Purpose, row_distribution, sample

from ..loop.drafter import Drafter, Draws, News
from ..loop.sampling import RowSampling
from ..loop.target import Target


class Autoregressive(Drafter):
    """Drafts with any causal language model that `Target` supports, in k forwards a round.

    Tokens are drawn with the target's sampling parameters and recorded with their distribution.

    Args:
        model: the draft model; it needs the target's vocabulary.
        backend: backend of the ops; None chooses one.

    Example:
        >>> decoder = Decoder(target, Autoregressive(small_model), k=5)
    """

    reads = True
    capturable = True
    block = 4

    def __init__(self, model: PreTrainedModel | Target, *, backend: str | None = None) -> None:
        self.model = model if isinstance(model, Target) else Target(model)
        self.vocab_size: int | None = self.model.vocab_size
        self.backend = backend

    def start(self, batch: int, capacity: int, sampling: RowSampling) -> None:
        if capacity > self.model.context_limit:
            raise ValueError(
                f"sequences may reach {capacity} tokens, but the drafter's context holds only "
                f"{self.model.context_limit}: lower max_new_tokens or use another drafter"
            )
        self.sampling = sampling
        self.cache = self.model.new_cache(batch, capacity)

    def forget(self, rows: list[int]) -> None:
        cache = self.cache
        cache.lengths[rows] = 0
        cache.set_lengths(cache.lengths, cache.longest, exact=False)

    @torch.no_grad()
    def read(self, rows: slice, news: News) -> None:
        """Read the prompts of rows that have none yet."""
        self.model.prefill(news.tokens, news.counts, self.cache.part(rows))
        cache = self.cache
        cache.lengths[rows] = news.counts
        longest = max(cache.longest, int(news.counts.max()))
        cache.set_lengths(cache.lengths, longest, exact=False)

    def draft(self, news: News, k: int, lengths: Tensor, draws: Draws) -> Draft:
        B = len(lengths)
        if news.longest is None:
            k = max(1, int(lengths.max()))  # one forward each, so no longer than the longest draft
        logits = self._read(news)  # [B, V]
        pool = logits.new_empty(B, k, logits.shape[-1])
        tokens = torch.empty(B, k, dtype=torch.int64, device=lengths.device)
        distributions = []
        committed, longest, exact = self.cache.lengths, self.cache.longest, self.cache.window.exact
        for i in range(k):
            pool[:, i] = logits
            distribution = row_distribution(logits, *self.sampling.parameters, backend=self.backend)
            tokens[:, i] = sample(
                logits,
                distribution,
                seed=draws.seed,
                round=draws.round,
                slot=i,
                purpose=Purpose.DRAFT,
                position=None if draws.position is None else draws.position + i,
                backend=self.backend,
            )
            distributions.append(distribution)
            if i + 1 < k:
                next_token = tokens[:, i : i + 1].clamp(min=0)
                logits = self.model.forward(next_token, self.cache)[0][:, 0]
                self.cache.set_lengths(committed + i + 1, longest + i + 1, exact=exact)
        self.cache.set_lengths(committed, longest, exact=exact)
        return Draft.sequential(
            tokens, pool, distributions, lengths=lengths, coupled=draws.position is not None
        )

    def _read(self, news: News) -> Tensor:
        """Read each row's committed tokens, however many. -> logits after the last [B, V]"""
        tokens, counts = news.tokens, news.counts
        last = (counts - 1).clamp(min=0)  # rows without new tokens compute padding
        lengths, bound = self.cache.lengths, news.longest
        if bound is not None:
            self.cache.set_lengths(lengths, bound, exact=False)
        hidden = self.model.hidden(tokens, self.cache)
        lengths.add_(counts)  # in place, because a captured round reads it again
        if bound is None:
            self.cache.set_lengths(lengths, int(lengths.max()))
        return self.model.head(hidden[torch.arange(len(last), device=last.device), last])
