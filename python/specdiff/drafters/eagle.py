"""Eagle: a small network reads the target's states and drafts token by token.

EAGLE (2401.15077) drafts autoregressively on the target's states. After the last committed token,
the network's own predictions replace these states. It is also trained on such predictions, as in
HASS (2408.15766). The network is that of `ParallelDrafter` and `BlockDiffusion` without masks. A
comparison shows how many forwards parallel drafting saves and how much acceptance it loses.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from specdiff_kernels import Draft, Reveal

from ..loop.drafter import Draws, News, check_length
from .prefix import PrefixDrafter


class Eagle(PrefixDrafter):
    """Drafts k tokens in k forwards. Arguments as in `PrefixDrafter`.

    Example:
        >>> decoder = Decoder(target, Eagle.load(folder, target))
    """

    kind = "eagle"

    @torch.no_grad()
    def draft(self, news: News, k: int, lengths: Tensor, draws: Draws) -> Draft:
        check_length(self, k)
        if news.longest is None:
            k = max(1, int(lengths.max()))  # one forward each, so no longer than the longest draft
        B = len(lengths)
        pool = self.head.weight.new_empty(B * k, self.head.out_features)
        draft = self.masked(pool, B, k, lengths)
        states = self.forward(self.cache, self.commit(news))
        state = states[torch.arange(B, device=states.device), self.newest]  # [B, d]
        for i in range(k):
            self.pool(draft)[:, i] = self.head(state)
            draft = self.reveal(draft, Reveal.chunk(i, i + 1), i, draws, entropies=i == 0)
            if i + 1 < k:
                x = self.embed_next(draft.tokens[:, i], state)
                state = self.forward(self.cache, self.behind(x, causal=True, first=i))[:, 0]
        return draft

    def embed_next(self, tokens: Tensor, state: Tensor) -> Tensor:
        """Embed drafted tokens i64 [B], drawn from `state` [B, d]. -> [B, 1, d]"""
        embedded = F.embedding(tokens.clamp(min=0), self.embedding)
        return self.network.embed_prefix(embedded, self.network.embed_out(state))[:, None]
