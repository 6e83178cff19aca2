"""Inputs shared by all benchmarks: logits like those of a language model and a good drafter.

A target row has N(0, 2.5^2) logits over the whole vocabulary, and 64 random tokens that follow
Zipf's distribution with exponent 2 and have nine times the probability of all others together
(entropy about 2.5 nats). The draft's row is the target's plus N(0, noise^2) on every logit. The
noise is chosen such that the acceptance sum_v min(p, q) is ACCEPTANCE on average over the rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

ACCEPTANCE = 0.72
BULK = 2.5
HEAD = 64
HEAD_MASS = 0.9
DRAWS = 16


class Shape(NamedTuple):
    batch: int
    k: int
    vocab: int

    def __str__(self) -> str:
        return f"B={self.batch} K={self.k} V={self.vocab}"


SHAPES = (Shape(1, 8, 49152), Shape(1, 40, 50257), Shape(1, 8, 128256), Shape(32, 8, 128256))


@dataclass(frozen=True)
class Inputs:
    """Inputs of the verifier in DRAWS rounds of speculative decoding."""

    shape: Shape
    target_logits: Tensor  # f32 [B, K + 1, V]
    draft_logits: Tensor  # f32 [B, K, V]
    tokens: Tensor  # i64 [DRAWS, B, K], drawn from softmax(draft_logits)
    acceptance: Tensor = field(repr=False)  # f64 [B, K], sum_v min(p, q)
    chances: Tensor = field(repr=False)  # f64 [DRAWS, B, K], min(1, p/q) at the tokens


def make_inputs(shape: Shape, seed: int = 0) -> Inputs:
    """Reproducible inputs of a shape; see the module's docstring for their distribution."""
    generator = torch.Generator().manual_seed(seed)
    B, K, V = shape
    target, draft = make_logits(shape, generator)
    draws = torch.stack([multinomial(row, generator) for row in draft.view(-1, V)])
    tokens = draws.T.reshape(DRAWS, B, K).contiguous()
    acceptance = torch.stack([overlap(target[b, :K], draft[b]).double() for b in range(B)])
    ratios = torch.stack([ratio(target[b, :K], draft[b], tokens[:, b]) for b in range(B)], 1)
    return Inputs(shape, target, draft, tokens, acceptance, ratios.clamp(max=1))


def make_logits(shape: Shape, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The target's f32 [B, K + 1, V] and the draft's f32 [B, K, V], on the generator's device."""
    B, K, V = shape
    target = target_rows(B * (K + 1), V, generator).view(B, K + 1, V)
    noise = torch.randn(B, K, V, generator=generator, device=generator.device)
    scale = noise_for(target[: min(B, 4), :K], noise[: min(B, 4)], ACCEPTANCE)
    return target, noise.mul_(scale).add_(target[:, :K])


def target_rows(N: int, V: int, generator: torch.Generator) -> Tensor:
    """f32 [N, V]"""
    device = generator.device
    logits = torch.randn(N, V, generator=generator, device=device).mul_(BULK)
    zipf = -2 * torch.arange(1, HEAD + 1, device=device).log()
    head = zipf - zipf.logsumexp(0) + math.log(HEAD_MASS / (1 - HEAD_MASS))
    for row in logits:
        ids = torch.randperm(V, generator=generator, device=device)[:HEAD]
        row[ids] = head + row.logsumexp(0)
    return logits


def noise_for(target: Tensor, noise: Tensor, acceptance: float) -> float:
    """Standard deviation of the noise that gives this mean acceptance, by bisection."""
    low, high = 0.0, 8.0
    for _ in range(12):
        middle = (low + high) / 2
        if overlap(target, target + middle * noise).mean() > acceptance:
            low = middle
        else:
            high = middle
    return low


def overlap(target: Tensor, draft: Tensor) -> Tensor:
    """sum_v min(p, q). [..., V], [..., V] -> [...]"""
    return torch.minimum(target.softmax(-1), draft.softmax(-1)).sum(-1)


def ratio(target: Tensor, draft: Tensor, tokens: Tensor) -> Tensor:
    """p / q at the tokens. [K, V], [K, V], [DRAWS, K] -> f64 [DRAWS, K]"""
    p, q = (logits.double().log_softmax(-1).gather(-1, tokens.T).T for logits in (target, draft))
    return (p - q).exp()


def accepted_moments(chances: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance of the number of accepted tokens. [..., K] -> [...], [...]"""
    reached = chances.cumprod(-1)  # P(n >= i)
    odd = 2 * torch.arange(1, chances.shape[-1] + 1, device=chances.device) - 1
    mean = reached.sum(-1)
    return mean, (reached * odd).sum(-1) - mean**2  # E[n^2] = sum_i (2i - 1) P(n >= i)


def multinomial(logits: Tensor, generator: torch.Generator) -> Tensor:
    return torch.multinomial(logits.softmax(-1), DRAWS, replacement=True, generator=generator)
