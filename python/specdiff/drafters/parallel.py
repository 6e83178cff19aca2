"""ParallelDrafter: k tokens in one causal forward, with k - 1 masks after the last token.

This is ParallelSpec (2410.05589). The last committed token's column predicts the next token, as in
any language model. Mask i after it predicts the token i positions later, and attends to the masks
before it. With a `SequentialHead`, each position's distribution also depends on the token drawn
before it, as in DSpark (2607.05147). No distribution depends on a token drawn later, so every token
is recorded with its distribution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdiff_kernels import Draft, Tree

from ..loop.drafter import Draws, News, check_length
from ..loop.trees import Growth
from .prefix import PrefixDrafter


class ParallelDrafter(PrefixDrafter):
    """Drafts k tokens in one forward. Arguments as in `PrefixDrafter`.

    Example:
        >>> decoder = Decoder(target, ParallelDrafter.load(folder, target))
    """

    kind = "parallel"

    grows = True

    @torch.no_grad()
    def draft(self, news: News, k: int, lengths: Tensor, draws: Draws) -> Draft:
        states = self.states(news, k)  # [B, k, d]
        draft = self.masked(self.head(states).flatten(0, 1), len(lengths), k, lengths)
        return self.draw(draft, 0, k, 0, states, draws)

    @torch.no_grad()
    def tree(self, news: News, k: int, growth: Growth, lengths: Tensor, draws: Draws) -> Tree:
        return self.grow(self.states(news, k), growth, lengths, draws)

    def states(self, news: News, k: int) -> Tensor:
        """The network's states at the next k positions, [B, k, d]."""
        check_length(self, k)
        B = len(news.counts)
        columns = [self.commit(news)]
        if k > 1:
            masks = self.network.embed_masks(self.anchor, k - 1)
            columns.append(self.behind(masks, causal=True))
        states = self.forward(self.cache, *columns)
        newest = states[torch.arange(B, device=states.device), self.newest]
        return torch.cat((newest[:, None], states[:, news.tokens.shape[1] :]), 1)
