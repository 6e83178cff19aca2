"""Checks that decoded text follows the target. Figures of a run count only if it passes.

Greedy text must equal plain decoding's, except where two logits are within a model's rounding.
Sampled text must follow the target's distribution. The test statistic is the sum over tokens of
log p minus its expectation, a martingale with mean 0 and known variance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..loop.sampling import Sampling
from ..loop.target import Target

# tolerance for the difference of a logit between forwards of 1 and of K + 1 tokens: ten times the
# differences in benchmarks/bench_forward.py for fp32; else one rounding of a logit of 64 to 127
ROUNDING = {torch.float32: 1e-3, torch.bfloat16: 0.5, torch.float16: 0.0625}
DEVIATIONS = 4.5  # probability of a false alarm: 7e-6


@dataclass(frozen=True)
class Check:
    """Result of a check.

    Attributes:
        kind: "identical" for greedy text, "distribution" for sampled text.
        passed: whether the figures count.
        texts: number of texts checked.
        identical: number of texts equal to plain decoding's; greedy text only.
        z: deviation of the texts from the distribution, in standard deviations; sampled text only.
        reason: why the check failed.
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
    *,
    exact: bool = False,
) -> Check:
    """Check that new tokens equal those of plain decoding.

    At the first difference, the target's logits of the two tokens must be closer than ROUNDING.
    Then either token is greedy, and the rest of the text is not compared. A text that ends early
    fails. So does any difference where `exact`.

    Args:
        prompts: prompt of each text.
        texts, plain: new tokens of each text, and those of plain decoding.
        exact: whether forwards of 1 and of K + 1 tokens give the same bits.
    """
    identical = 0
    for number, (prompt, text, other) in enumerate(zip(prompts, texts, plain, strict=True)):
        if list(text) == list(other):
            identical += 1
            continue
        shared = min(len(text), len(other))
        at = next((i for i in range(shared) if text[i] != other[i]), None)
        if at is None:
            reason = f"text {number} has {len(text)} tokens, plain decoding has {len(other)}"
            return Check("identical", False, len(texts), identical, reason=reason)
        logits = next_logits(target, [*prompt, *other[:at]], 1)[0]
        gap = abs(float(logits[text[at]] - logits[other[at]]))
        if exact or gap > ROUNDING[target.dtype]:
            reason = (
                f"text {number} differs from plain decoding from token {at} on: the logits of the "
                f"two tokens differ by {gap:.2g}"
            )
            return Check("identical", False, len(texts), identical, reason=reason)
    return Check("identical", True, len(texts), identical)


def follows_distribution(
    target: Target,
    prompts: Sequence[Sequence[int]],
    texts: Sequence[Sequence[int]],
    sampling: Sampling,
) -> Check:
    """Test whether new tokens were sampled from the target at a temperature.

    Let H be the entropy of a token's distribution p. The sum over all tokens of log p(x) + H has
    mean 0, and its variance is the sum of the variances of log p. `z` is the sum divided by its
    standard deviation.

    Raises:
        ValueError: the sampling truncates the distribution, so some texts have probability 0.
    """
    if sampling.greedy or sampling.parameters[1:] != (None, None, None):
        raise ValueError(f"sampling: expected a temperature only, got {sampling}")
    total = variance = 0.0
    for prompt, text in zip(prompts, texts, strict=True):
        logits = next_logits(target, [*prompt, *text[:-1]], len(text))
        excess, spread = surprise(logits / sampling.temperature, torch.tensor(text))
        total, variance = total + excess, variance + spread
    z = total / math.sqrt(variance) if variance > 0 else 0.0 if total == 0 else math.inf
    if abs(z) <= DEVIATIONS:
        return Check("distribution", True, len(texts), z=z)
    reason = f"the texts' log-probability is {z:.1f} standard deviations from its expectation"
    return Check("distribution", False, len(texts), z=z, reason=reason)


def surprise(logits: Tensor, tokens: Tensor) -> tuple[float, float]:
    """Sums over rows of log p(x) + H(p), and of the variance of log p, for [N, V] and [N]."""
    log_p = logits.double().log_softmax(-1)
    p = log_p.exp()
    log_p = log_p.clamp(min=-1e100)  # for p = 0
    mean = (p * log_p).sum(-1)
    variance = (p * (log_p - mean[:, None]) ** 2).sum(-1)
    drawn = log_p.gather(1, tokens[:, None].to(log_p.device))[:, 0]
    return float((drawn - mean).sum()), float(variance.sum())


@torch.inference_mode()
def next_logits(target: Target, tokens: list[int], count: int) -> Tensor:
    """Logits after each of the last `count` tokens, in one forward. -> f32 [count, V]"""
    cache = target.new_cache(batch=1, capacity=len(tokens))
    hidden = target.hidden(torch.tensor([tokens], device=target.device), cache)
    return target.head(hidden[0, -count:]).float()
