"""The drafts that everyone makes, by their constructors."""

from __future__ import annotations

import pytest
import torch

from specdiff_kernels import Draft, row_distribution, sample, verify

from .helpers import assert_same, i64

B, K, V = 3, 4, 50


def test_a_draft_of_guesses():
    draft = Draft.guesses(i64(5, 6)[None], lengths=i64(1))
    assert draft.tokens.tolist() == [[5, 6]] and draft.lengths.tolist() == [1]
    assert draft.tau.tolist() == [[0, 0]] and draft.tau.dtype == torch.int32
    assert draft.rows.tolist() == [[-1, -1]]
    assert draft.logits is None and draft.distribution is None


@pytest.mark.parametrize("stacked", [False, True])
def test_a_draft_of_tokens_one_after_another(stacked):
    """It is judged as the same draft with its own rows, by hand."""
    torch.manual_seed(1)
    logits = [torch.randn(B, V) for _ in range(K)]
    distributions = [row_distribution(rows, 0.8) for rows in logits]
    drawn = [sample(x, d, seed=1, round=0, slot=i)
             for i, (x, d) in enumerate(zip(logits, distributions, strict=True))]  # fmt: skip
    tokens = torch.stack(drawn, 1)
    given = torch.stack(logits, 1) if stacked else logits
    draft = Draft.sequential(tokens, given, distributions, lengths=i64(4, 2, 3))
    for b in range(B):
        for i in range(K):
            row = int(draft.rows[b, i])
            assert torch.equal(draft.logits[row], logits[i][b])
            for field, each in zip(draft.distribution, distributions[i], strict=True):
                assert torch.equal(field[row], each[b])
    assert draft.tau.tolist() == [[0, 1, 2, 3]] * B and draft.coupled is False
    pool = torch.cat(logits)  # row i B + b
    by_hand = draft._replace(
        rows=torch.arange(K * B).view(K, B).T, logits=pool, distribution=row_distribution(pool, 0.8)
    )
    target = torch.randn(B, K + 1, V)
    want = verify(target, by_hand, seed=1, round=0)
    assert_same(verify(target, draft, seed=1, round=0), want)
    assert want.accepted.sum() > 0


def test_no_tokens_one_after_another():
    tokens = torch.zeros(2, 0, dtype=torch.int64)
    draft = Draft.sequential(tokens, [], [])
    assert verify(torch.zeros(2, 1, 5), draft, seed=1, round=0).accepted.tolist() == [0, 0]
