"""SequentialHead: corrects the logits of a position for the drafted token before it.

A parallel drafter draws its tokens independently of each other. This small head reads the token
before a position and the network's state there, and adds a low-rank correction to the logits.
Tokens are then drawn from left to right without another forward. The Markov head of DSpark
(2607.05147) reads the token only; the head of Domino (2605.29707) also reads the state.
"""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specdiff_kernels.ops.decoder_layer import Norm, row_norm
from specdiff_kernels.ops.registry import watched

from ..loop.packed import usable

FACTOR_STD = 0.01
EPSILON = 1e-12  # of norms


class SequentialHead(nn.Module):
    """logits(v) += W[v] . C silu(A n(E[x]) + B n(s)), where n scales to a root mean square of 1.

    E is the target's embedding, x the token before the position, and s the network's state at the
    position. E represents x, because a table of its own would overfit a small training set. W is
    initially zero, so the head has no effect.

    Args:
        target_size: width of E.
        state_size: width of s; 0: the head does not read s.
        rank: rank of the correction.
        vocab_size: number of tokens that can be drafted.

    Example:
        >>> head = SequentialHead(target_size=576, state_size=576, rank=128, vocab_size=8192)
        >>> head(torch.randn(4, 576), torch.randn(4, 576)).shape
        torch.Size([4, 8192])
    """

    def __init__(self, target_size: int, state_size: int, rank: int, vocab_size: int) -> None:
        super().__init__()
        self.token = nn.Linear(target_size, rank, bias=False)
        self.state = nn.Linear(state_size, rank, bias=False) if state_size else None
        self.mix = nn.Linear(rank, rank, bias=False)
        self.out = nn.Linear(rank, vocab_size, bias=False)

    @torch.no_grad()
    def initialise(self, generator: torch.Generator | None = None) -> None:
        """A, B, C ~ N(0, .01^2), W = 0."""
        for weight in self.parameters():
            weight.copy_(FACTOR_STD * torch.randn(weight.shape, generator=generator))
        nn.init.zeros_(self.out.weight)

    def forward(self, embedded: Tensor, states: Tensor) -> Tensor:
        """Correction of the logits.

        Args:
            embedded: [..., target_size], E of the token before the position.
            states: [..., state_size], the network's state at the position.

        Returns:
            [..., vocab_size]
        """
        return self.out(self.code(embedded, states))

    @torch.no_grad()
    def codes(self, embedding: Tensor, rows: int = 4096) -> Tensor:
        """A n(E[x]) of every token.

        Args:
            embedding: E, [V, target_size].
            rows: tokens that are scaled at a time. All at once would take as much memory as E.

        Returns:
            [V, rank]
        """
        codes = embedding.new_empty(len(embedding), self.token.out_features)
        for part, into in zip(embedding.split(rows), codes.split(rows), strict=True):
            into.copy_(self.token(scaled(part)))
        return codes

    def code(self, embedded: Tensor, states: Tensor) -> Tensor:
        """The vector that W is multiplied by. [..., rank]"""
        inner = self.token(scaled(embedded))
        if self.state is not None:
            inner = inner + self.state(scaled(states))
        return self.mix(F.silu(inner))


def scaled(x: Tensor) -> Tensor:
    """Scale each row of [..., d] to a root mean square of 1."""
    if torch.compiler.is_compiling() or not usable(x) or x.numel() == 0 or watched((x,)):
        return F.rms_norm(x, x.shape[-1:], eps=EPSILON)
    return row_norm(x.contiguous(), unit_norm(x.shape[-1]))


@cache
def unit_norm(d: int) -> Norm:
    return Norm("rms", torch.ones(d), None, EPSILON)
