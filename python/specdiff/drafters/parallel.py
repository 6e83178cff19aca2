"""ParallelDrafter: k tokens in one causal forward, with k - 1 masks behind the last token.

ParallelSpec (2410.05589). The last committed token's column says what comes next, as in any
language model; mask i behind it says what comes i tokens later, and sees the masks before it. Each
position's law knows nothing of the tokens drawn at the others, so every draw is recorded.
"""

from __future__ import annotations

import torch
from torch import Tensor

from specdiff_kernels import Draft, Reveal, denoise_step

from .base import Draws, News
from .prefix import PrefixDrafter


class ParallelDrafter(PrefixDrafter):
    """Drafts k tokens in one forward; arguments as of `PrefixDrafter`.

    Example:
        >>> decoder = Decoder(target, ParallelDrafter.load(folder, target))
    """

    kind = "parallel"

    @torch.no_grad()
    def draft(self, news: News, k: int, lengths: Tensor, draws: Draws) -> Draft:
        self.check(news, k)
        B = len(lengths)
        columns = [self.commit(news)]
        if k > 1:
            masks = self.network.embed_masks(self.anchor, k - 1)
            columns.append(self.behind(masks, causal=True))
        states = self.read(*columns)
        newest = states[torch.arange(B, device=states.device), self.newest]
        at = torch.cat((newest[:, None], states[:, news.tokens.shape[1] :]), 1)  # [B, k, d]
        draft = denoise_step(
            Draft.masked(
                B,
                k,
                self.head(at).flatten(0, 1),
                draft_ids=self.network.draft_ids,
                lengths=lengths,
            ),
            Reveal.all(),
            0,
            *self.sampling.parameters,
            entropies=True,
            **draws._asdict(),
            backend=self.backend,
        )
        return draft
