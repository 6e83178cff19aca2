"""Checks that a text is the target's, without which no figure of it counts.

Greedy text must be plain decoding's, up to logits that are as close as a model's rounding. Sampled
text must follow the target's distribution: log p of its tokens, less what is expected of them, is a
sum with mean 0 and known variance (a martingale), whatever the text.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..loop.sampling import Sampling
from ..loop.target import Target

# by how much a logit may move between forwards of 1 and of K + 1 tokens: ten times what
# benchmarks/bench_forward.py saw in fp32, and as much as one rounding of a logit of 64 to 127
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.0625}
DEVIATIONS = 4.5  # false alarm 7e-6


@dataclass(frozen=True)
class Check:
    """What was found.

    Attributes:
        kind: "identical" or "distribution".
        passed: whether the figures count.
        texts: how many were looked at.
        identical: texts that equal plain decoding's, if they must.
        z: standard deviations between the text and the distribution, if it was sampled.
        reason: why it did not pass.
    """

    kind: str
    passed: bool
    texts: int
    identical: int | None = None
    z: float | None = None
    reason: str | None = None


def same_texts(
    target: Target,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    plain: Sequence[Sequence[int]],
) -> Check:
    """Whether new tokens are those of plain decoding.

    Where they part, the target's two logits there must be closer than ROUNDING: then either token
    is a greedy one, and what follows is not compared. A text may not end early.

    Args:
        prompts: of each text.
        texts, plain: new tokens.
    """
    identical = 0
    for number, (prompt, text, other) in enumerate(zip(prompts, texts, plain, strict=True)):
        if list(text) == list(other):
            identical += 1
            continue
        shared = min(len(text), len(other))
        at = next((i for i in range(shared) if text[i] != other[i]), None)
        if at is None:
            reason = f"text {number} has {len(text)} tokens, plain decoding's has {len(other)}"
            return Check("identical", False, len(texts), identical, reason=reason)
        logits = next_logits(target, [*prompt, *other[:at]], 1)[0]
        gap = abs(float(logits[text[at]] - logits[other[at]]))
        if gap > ROUNDING[target.dtype]:
            reason = (
                f"text {number} is not plain decoding's from token {at} on: the two logits are "
                f"{gap:.2g} apart"
            )
            return Check("identical", False, len(texts), identical, reason=reason)
    return Check("identical", True, len(texts), identical)


def follows_distribution(
    target: Target,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    sampling: Sampling,
) -> Check:
    """Whether new tokens were sampled from the target at a temperature, as far as they can show.

    With H the entropy of a token's distribution p, the sum over all tokens of log p(x) + H has mean
    0, and its variance is that of log p, summed. `z` is that sum in its standard deviations.

    Raises:
        ValueError: the distribution is truncated, which leaves texts of probability 0.
    """
    if sampling.greedy or sampling.parameters[1:] != (None, None, None):
        raise ValueError(f"sampling must be a temperature alone, got {sampling}")
    total = variance = 0.0
    for prompt, text in zip(prompts, texts, strict=True):
        logits = next_logits(target, [*prompt, *text[:-1]], len(text))
        excess, spread = surprise(logits / sampling.temperature, torch.tensor(text))
        total, variance = total + excess, variance + spread
    z = total / math.sqrt(variance) if variance > 0 else 0.0 if total == 0 else math.inf
    if abs(z) <= DEVIATIONS:
        return Check("distribution", True, len(texts), z=z)
    reason = f"the texts' log-probability is {z:.1f} standard deviations from the distribution's"
    return Check("distribution", False, len(texts), z=z, reason=reason)


def surprise(logits: Tensor, tokens: Tensor) -> tuple[float, float]:
    """Sums over rows of log p(x) + H(p), and of the variance of log p. [N, V], [N]"""
    log_p = logits.double().log_softmax(-1)
    p = log_p.exp()
    log_p = log_p.clamp(min=-1e100)  # for p = 0
    mean = (p * log_p).sum(-1)
    variance = (p * (log_p - mean[:, None]) ** 2).sum(-1)
    drawn = log_p.gather(1, tokens[:, None].to(log_p.device))[:, 0]
    return float((drawn - mean).sum()), float(variance.sum())


@torch.inference_mode()
def next_logits(target: Target, tokens: list[int], count: int) -> Tensor:
    """Logits behind the last `count` of some tokens, in one forward. -> f32 [count, V]"""
    cache = target.new_cache(batch=1, capacity=len(tokens))
    hidden = target.hidden(torch.tensor([tokens], device=target.device), cache)
    return target.head(hidden[0, -count:]).float()
