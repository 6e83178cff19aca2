"""Whole rounds on small inputs: what tests of one backend's machinery run."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from specdiff_kernels import (
    RULES,
    Committed,
    Draft,
    Reveal,
    Verified,
    commit,
    denoise_step,
    row_law,
    sample,
    verify,
)

from .helpers import i64

B, K = 2, 3


def a_round(rule: str, V: int, seed: int = 0) -> tuple[torch.Tensor, Draft, dict]:
    """Target logits, a recorded draft of them, and the arguments of `verify`, all tensors."""
    torch.manual_seed(seed)
    target = torch.randn(B, K + 1, V)
    pool = target[:, :K].reshape(B * K, V) + 0.5 * torch.randn(B * K, V)
    law = row_law(pool, backend="reference")
    tokens = sample(pool, law, seed=torch.arange(B * K), round=torch.zeros(B * K).long(),
                    backend="reference")  # fmt: skip
    draft = Draft(tokens.view(B, K), torch.zeros(B, K).int(), torch.arange(B * K).view(B, K), pool,
                  law)  # fmt: skip
    temperature = torch.full((B,), 0.0 if rule == "greedy" else 0.9)
    key = {"seed": torch.arange(B), "position" if rule == "coupled" else "round": torch.arange(B)}
    return target, draft, {"temperature": temperature, "rule": rule, **key}


def empty_result() -> Verified:
    return Verified(i64(*[7] * B), torch.full((B, K + 1), 7), i64(*[7] * B).int())


def every_op(V: int) -> Iterator[tuple]:
    """One call after another: greedy and sampled rows, with and without truncation."""
    zero, one = torch.zeros(B, dtype=torch.int64), torch.ones(B * K)
    mixed = torch.tensor([0.0, 1.0])
    for truncation in ({}, {"top_k": 9, "top_p": 0.9}):
        for rule in RULES:
            target, draft, options = a_round(rule, V)
            yield verify(target, draft, **options, **truncation)
        law = row_law(target[:, 0], mixed, **truncation)
        yield sample(target[:, 0], law, seed=zero, round=zero)
        yield sample(target[:, 0], law, seed=zero, position=zero)
        for reveal in (Reveal.sedd(0.5), Reveal.highest_confidence(2), Reveal.first_hitting()):
            own = Draft.masked(B, K, draft.logits)._replace(entropy=one.view(B, K).double())
            key = {"seed": zero, "round": zero, **truncation}
            yield denoise_step(own, reveal, 0, mixed, entropies=True, out=own, **key)
            yield denoise_step(Draft.masked(B, K, draft.logits), reveal, 0, position=zero, **key)
    yield commit(zero, draft.tokens, out=Committed(zero, zero.clone(), zero.bool()))
