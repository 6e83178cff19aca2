"""BlockDiffusion: a masked diffusion model drafts a block of tokens in T reverse steps.

This is absorbing-state diffusion (SEDD 2310.16834, MDLM 2406.07524) after a causal prefix. A block
of K masks attends to the prefix, and to itself in both directions. Chunks are revealed from left to
right, so every position records its distribution. With a `SequentialHead`, the tokens of a chunk
are drawn from left to right, too.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from specdiff_kernels import Draft, Tree

from ..loop.drafter import Draws, News, check_length
from ..loop.target import Target
from ..loop.trees import Growth
from .network import DraftNetwork
from .prefix import PrefixDrafter
from .schedule import chunk


class BlockDiffusion(PrefixDrafter):
    """Drafts k tokens in `steps` forwards over k masks.

    Step s reveals chunk s, counted from the left. No position's distribution depends on a token
    revealed later, so every token is recorded with its distribution.

    Args:
        network: the denoiser. It is moved to the target's device and dtype, and accelerated iff the
            target's model is.
        target: the target; the drafter reads its embeddings and states.
        steps: reverse steps T; None: the number in the network's configuration.
        backend: backend of the ops; None chooses one.

    Raises:
        ValueError: `steps` is out of range, or the network is of another kind or for a target of
            another shape.

    Example:
        >>> decoder = Decoder(target, BlockDiffusion.load(folder, target))
    """

    kind = "block-diffusion"
    grows = True

    def __init__(
        self,
        network: DraftNetwork,
        target: Target,
        *,
        steps: int | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__(network, target, backend=backend)
        self.steps: int = network.config.steps if steps is None else steps
        most = network.config.block
        if not 1 <= self.steps <= most:
            raise ValueError(f"steps must be in [1, block = {most}], got {self.steps}")

    @classmethod
    def load(
        cls,
        folder: str | Path,
        target: Target,
        *,
        backend: str | None = None,
        steps: int | None = None,
    ) -> BlockDiffusion:
        """Load a trained drafter from a folder.

        Raises:
            ValueError: as the constructor and `DraftNetwork.load`.
        """
        return cls(DraftNetwork.load(folder), target, steps=steps, backend=backend)

    @torch.no_grad()
    def draft(self, news: News, k: int, lengths: Tensor, draws: Draws) -> Draft:
        check_length(self, k)
        B = len(lengths)
        pool = self.head.weight.new_empty(B * k, self.head.out_features)
        draft = self.masked(pool, B, k, lengths)
        steps = min(self.steps, k)
        for step in range(steps):
            lo, hi = chunk(k, steps, step)
            committed = [self.commit(news)] if step == 0 else []
            block = self.behind(self.embed_block(draft.tokens, lo), causal=False)
            states = self.forward(self.cache, *committed, block)[:, -k:][:, lo:hi]
            self.pool(draft)[:, lo:hi] = self.head(states)
            draft = self.draw(draft, lo, hi, step, states, draws)
        return draft

    @torch.no_grad()
    def tree(self, news: News, k: int, growth: Growth, lengths: Tensor, draws: Draws) -> Tree:
        check_length(self, k)
        if self.steps != 1:
            raise ValueError(
                f"a tree grows from the logits of one reverse step, got steps = {self.steps}: pass "
                "steps=1, or leave tree out"
            )
        committed = self.commit(news)
        masks = self.network.embed_masks(self.anchor, k)
        states = self.forward(self.cache, committed, self.behind(masks, causal=False))[:, -k:]
        return self.grow(states, growth, lengths, draws)

    def embed_block(self, tokens: Tensor, revealed: int) -> Tensor:
        """Embed the first `revealed` of tokens [B, k], and masks at the others. -> [B, k, d]"""
        masks = self.network.embed_masks(self.anchor, tokens.shape[1])
        if revealed == 0:
            return masks
        known = F.embedding(tokens[:, :revealed].clamp(min=0), self.embedding)
        return torch.cat((self.network.embed_revealed(known), masks[:, revealed:]), 1)
