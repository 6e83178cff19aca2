"""Seeds and counts that are numbers: the same as tensors, and each row draws by itself."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from specdiff_kernels import (
    Draft,
    Reveal,
    denoise_step,
    row_distribution,
    row_seeds,
    sample,
    verify,
)

from .helpers import assert_same, i64

B, K, V = 3, 4, 50
SEEDS = [0, 7, -1, -(2**63), 2**63 - 1, 2**63, 2**64 - 1]


def calls() -> list[tuple[partial, int, tuple[str, ...]]]:
    """Ops that draw, with their rows and the parts of their keys."""
    torch.manual_seed(0)
    pool, target = torch.randn(B * K, V), torch.randn(B, K + 1, V)
    masked = Draft.masked(B, K, pool)
    draft = denoise_step(masked, Reveal.all(), 0, **{"seed": i64(1, 2, 3), "round": i64(0, 0, 0)})
    step = partial(denoise_step, masked, Reveal.sedd(0.5), 0)
    return [
        (partial(verify, target, draft), B, ("round",)),
        (partial(verify, target, draft, rule="coupled"), B, ("position",)),
        (partial(sample, pool, row_distribution(pool)), B * K, ("round", "slot")),
        (partial(sample, pool, row_distribution(pool)), B * K, ("position",)),
        (step, B, ("round",)),
        (step, B, ("round", "position")),
    ]


def fields(result) -> tuple:
    """Of a draft those that a step draws."""
    return result[:3] if isinstance(result, Draft) else result


@pytest.mark.parametrize("seed", SEEDS)
def test_a_number_is_a_tensor_of_row_seeds(seed):
    for op, rows, counts in calls():
        tensor = torch.tensor(row_seeds(seed, rows))
        assert len(set(tensor.tolist())) == rows
        number = fields(op(seed=seed, **dict.fromkeys(counts, 5)))
        tensors = {name: torch.full((rows,), 5) for name in counts}
        want = fields(op(seed=tensor, **tensors))
        for have, expected in zip(number, want, strict=True):
            assert torch.equal(have, expected)


def test_rows_share_no_random_bits():
    logits = torch.zeros(64, 10_000)
    tokens = sample(logits, row_distribution(logits), seed=3, round=0)
    assert len(tokens.unique()) > 60


def test_a_graph_takes_other_numbers():
    torch._dynamo.reset()
    logits = torch.randn(3, 40)
    distribution = row_distribution(logits)
    compiled = torch.compile(sample, fullgraph=True, dynamic=True, backend="eager")
    for i, (seed, round) in enumerate([(5, 3), (7, 4), (9, 2)]):
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            have = compiled(logits, distribution, seed=seed, round=round)
        assert torch.equal(have, sample(logits, distribution, seed=seed, round=round))


@pytest.mark.parametrize("zero", [0, 0.0])
def test_greedy_rows_need_no_seed(zero):
    torch.manual_seed(0)
    pool, target = torch.randn(B * K, V), torch.randn(B, K + 1, V)
    key = {"seed": i64(1, 2, 3), "round": i64(4, 5, 6)}
    masked = Draft.masked(B, K, pool)
    for reveal in (Reveal.all(), Reveal.chunk(1, 3), Reveal.lowest_entropy(2),
                   Reveal.highest_confidence(2)):  # fmt: skip
        drafts = [denoise_step(masked, reveal, 0, zero, **given) for given in (key, {})]
        for have, want in zip(*map(fields, drafts), strict=True):
            assert torch.equal(have, want)
    draft = Draft.guesses(pool.argmax(-1).view(B, K))
    want = verify(target, draft, zero, **key)
    assert_same(verify(target, draft, zero), want)
    assert_same(verify(target, draft, 0.8, rule="greedy"), want)
    assert_same(verify(target, draft, zero, rule="coupled"), want)
    assert_same(verify(target, draft, zero, seed=1), want)
    greedy = row_distribution(pool, zero)
    assert torch.equal(sample(pool, greedy), pool.argmax(-1))
    assert torch.equal(sample(pool, greedy, position=0), pool.argmax(-1))
