"""Whole rounds on small inputs: what tests of one backend's machinery run."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import torch

from specdiff_kernels import (
    RULES,
    Committed,
    Draft,
    Lenience,
    Pages,
    Reveal,
    Verified,
    commit,
    denoise_step,
    row_distribution,
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
    distribution = row_distribution(pool, backend="reference")
    tokens = sample(pool, distribution, seed=torch.arange(B * K), round=torch.zeros(B * K).long(),
                    backend="reference")  # fmt: skip
    draft = Draft(tokens.view(B, K), torch.zeros(B, K).int(), torch.arange(B * K).view(B, K), pool,
                  distribution)  # fmt: skip
    temperature = torch.full((B,), 0.0 if rule == "greedy" else 0.9)
    temperature[1:] *= rule != "lenient"  # there the other rows are greedy
    key = {"seed": torch.arange(B), "position" if rule == "coupled" else "round": torch.arange(B)}
    lenience = Lenience("ensemble", torch.full((B,), 0.7).double()) if rule == "lenient" else None
    how = {"rule": rule, "lenience": lenience}
    return target, draft, {"temperature": temperature, **how, **key}


def empty_result() -> Verified:
    sevens = torch.full((B,), 7)
    return Verified(sevens, torch.full((B, K + 1), 7), sevens.int(), sevens.double())


def every_op(V: int) -> Iterator[Callable[[], tuple]]:
    """Calls to be made: greedy and sampled rows, with and without truncation."""
    zero = torch.zeros(B, dtype=torch.int64)
    for truncation in ({}, {"top_k": 9, "top_p": 0.9}):
        for rule in RULES:
            target, draft, options = a_round(rule, V)
            yield partial(verify, target, draft, **options, **truncation)
        mixed, rows = torch.tensor([0.0, 1.0]), target[:, 0]
        yield partial(row_distribution, rows, mixed, **truncation)
        distribution = row_distribution(rows, mixed, **truncation, backend="reference")
        yield partial(sample, rows, distribution, seed=zero, round=zero)
        yield partial(sample, rows, distribution, seed=zero, position=zero)
        for reveal in (Reveal.sedd(0.5), Reveal.highest_confidence(2), Reveal.first_hitting()):
            empty = torch.ones(B, K, dtype=torch.float64)
            own = Draft.masked(B, K, draft.logits)._replace(entropy=empty)
            step = partial(denoise_step, reveal=reveal, step=0, seed=zero, round=zero, **truncation)
            yield partial(step, own, temperature=mixed, entropies=True, out=own)
            yield partial(step, Draft.masked(B, K, draft.logits), position=zero)
    yield partial(
        commit, zero, draft.tokens, out=Committed(zero, zero.clone(), zero.bool(), zero.clone())
    )
    yield from cache_commits(draft.tokens)


def cache_commits(emitted: torch.Tensor) -> Iterator[Callable[[], tuple]]:
    """Rows that give up the same blocks, and trees in paged and dense caches."""
    lengths, path = i64(*[1] * B), torch.arange(K).expand(B, K) * 2
    shared = Pages.empty(B, 4, 4, block_size=2)
    shared.reserve(i64(8, *[0] * (B - 1)))
    for row in range(1, B):
        shared.share(0, row, 8)
    yield partial(commit, lengths, emitted, pages=shared)
    own = Pages.empty(B, 4, 4 * B, block_size=2)
    own.reserve(i64(*[8] * B))
    paged = [torch.randn(4 * B, 2, 2, 4), torch.randn(4 * B, 2, 1, 3).bfloat16()]
    yield partial(commit, lengths, emitted, pages=own, path=path, caches=paged)
    yield partial(commit, lengths, emitted, path=path, caches=[torch.randn(B, 2, 8, 4)])
