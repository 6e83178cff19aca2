"""Checks: texts of the target pass, others do not."""

from __future__ import annotations

import math

import pytest
import torch

from specdiff import Decoder, Sampling
from specdiff.bench.checks import (
    DEVIATIONS,
    ROUNDING,
    follows_distribution,
    next_logits,
    same_texts,
    surprise,
)
from specdiff.drafters import PromptLookup
from specdiff_kernels import Lenience

PROMPTS = [[5, 6, 7], [9, 8, 9, 8], [40]]


def texts(decoder, sampling, count, tokens=24):
    """New tokens of `count` batches, and the prompt of each."""
    found, prompts = [], []
    for seed in range(count):
        run = decoder.generate(
            PROMPTS, max_new_tokens=tokens, sampling=sampling, seed=seed, stop_tokens=()
        )
        found += run.new_tokens
        prompts += PROMPTS
    return prompts, found


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("drafter", [None, PromptLookup()])
def test_sampled_text_follows_the_distribution(models, temperature, drafter):
    sampling = Sampling(temperature)
    check = follows_distribution(
        models.target, *texts(Decoder(models.target, drafter), sampling, 10), sampling
    )
    assert check.passed and abs(check.z) < DEVIATIONS and check.kind == "distribution"


@pytest.mark.parametrize("mutant", ["cooler", "warmer", "lenient", "top-k"])
def test_text_of_another_distribution_is_refused(models, mutant):
    distribution, decoder, count = Sampling(1.0), Decoder(models.target), 10
    own = {"cooler": Sampling(0.8), "warmer": Sampling(1.3), "top-k": Sampling(1.0, top_k=40)}
    if mutant == "lenient":  # all that the drafter says is taken
        lenience = Lenience("ensemble", 0.0)
        decoder = Decoder(models.target, PromptLookup(), 4, "lenient", lenience=lenience)
        count = 40
    check = follows_distribution(
        models.target, *texts(decoder, own.get(mutant, distribution), count), distribution
    )
    assert not check.passed and abs(check.z) > DEVIATIONS
    assert "standard deviations" in check.reason


def test_surprise_is_what_its_name_says():
    """Mean 0 and the variance it claims, by enumeration."""
    logits = torch.randn(1, 6, generator=torch.Generator().manual_seed(0)) * 2
    logits[0, 2] = -math.inf
    p = logits[0].double().softmax(-1)
    drawn = [surprise(logits, torch.tensor([v]))[0] for v in range(6) if v != 2]
    weights = p[p > 0].tolist()
    assert sum(w * x for w, x in zip(weights, drawn, strict=True)) == pytest.approx(0, abs=1e-12)
    variance = sum(w * x * x for w, x in zip(weights, drawn, strict=True))
    assert surprise(logits, torch.tensor([0]))[1] == pytest.approx(variance, rel=1e-12)


def test_truncated_distributions_are_not_checked(models):
    with pytest.raises(ValueError, match="expected a temperature only"):
        follows_distribution(models.target, [], [], Sampling(1.0, top_k=3))


def test_greedy_texts(models):
    prompts, plain = texts(Decoder(models.target), Sampling(), 1)
    assert same_texts(models.target, prompts, plain, plain).identical == 3
    shorter = [plain[0][:-1], *plain[1:]]
    check = same_texts(models.target, prompts, shorter, plain)
    assert not check.passed and "23 tokens" in check.reason
    other = [list(text) for text in plain]
    other[1][4] = (other[1][4] + 1) % models.target.vocab_size
    check = same_texts(models.target, prompts, other, plain)
    assert not check.passed and "text 1" in check.reason and "token 4" in check.reason
    assert check.identical == 1


def test_a_tie_may_part_texts(models, monkeypatch):
    """Two logits within the model's rounding: either is greedy."""
    prompts, plain = texts(Decoder(models.target), Sampling(), 1)
    other = [list(text) for text in plain]
    logits = next_logits(models.target, [*prompts[0], *plain[0][:4]], 1)[0]
    best, second = logits.topk(2)
    other[0][4] = int(second[1])
    gap = float(best[0] - best[1])
    for allowed, passed in ((gap * 1.01, True), (gap * 0.99, False)):
        monkeypatch.setitem(ROUNDING, torch.float32, allowed)
        check = same_texts(models.target, prompts, other, plain)
        assert (check.passed, check.identical) == (passed, 2 if passed else 0)
    monkeypatch.setitem(ROUNDING, torch.float32, gap * 1.01)
    assert not same_texts(models.target, prompts, other, plain, exact=True).passed
