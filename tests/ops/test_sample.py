"""One token per row: exact boundaries of the inverse CDF, keys, faults."""

from __future__ import annotations

import pytest
import torch

from specdiff_kernels import Purpose, row_distribution, sample
from specdiff_kernels.reference.numerics import weights
from tests.enumeration import first_word

from .helpers import LAST_WORD, i64

pytestmark = pytest.mark.usefixtures("implementation")


def test_boundaries_are_the_cumulative_weights():
    """The first word that draws a token >= v is ceil(2^64 C(v) / Z), with C the weights before."""
    torch.manual_seed(0)
    logits = torch.randn(1, 6) * 2
    distribution = row_distribution(logits)
    Z = int(distribution.total)
    cumulative = weights(logits, distribution)[0].cumsum(-1).tolist()
    for v in range(1, 6):

        def reaches(words, v=v):
            n = len(words)
            return sample(logits.expand(n, -1), repeat(distribution, n), words=words) >= v

        boundary = first_word(reaches, 1)[0]
        assert boundary == -(-(cumulative[v - 1] << 64) // Z)


def repeat(distribution, n):
    return type(distribution)(*(field.expand(n).contiguous() for field in distribution))


@pytest.mark.parametrize("V", [1, 31, 1025, 50257])
def test_extreme_words_and_weightless_ends(V):
    logits = torch.full((2, V + 4), float("-inf"))
    logits[:, 2 : V + 2] = 0
    distribution = row_distribution(logits)
    assert sample(logits, distribution, words=i64(0, LAST_WORD)).tolist() == [2, V + 1]


def test_failed_rows_draw_minus_one():
    logits = torch.tensor([[float("nan"), 0.0], [0.0, -1.0]])
    assert sample(logits, row_distribution(logits), words=i64(0, 0)).tolist() == [-1, 0]


def test_draft_ids():
    logits = torch.zeros(2, 3)
    ids = i64(5, 8, 40)
    distribution = row_distribution(logits)
    assert sample(logits, distribution, words=i64(0, LAST_WORD), draft_ids=ids).tolist() == [
        5, 40,
    ]  # fmt: skip


def test_every_part_of_the_key_counts():
    """Rows that differ in one part of the key alone draw differently; equal keys draw alike."""
    logits = torch.zeros(6, 50257)
    distribution = row_distribution(logits)
    seed, round, slot = i64(1, 1, 2, 1, 1, 1 + 2**40), i64(0, 0, 0, 3, 0, 0), i64(0, 0, 0, 0, 4, 0)
    tokens = sample(logits, distribution, seed=seed, round=round, slot=slot).tolist()
    assert tokens[0] == tokens[1]
    assert len(set(tokens)) == 5
    other = sample(logits, distribution, seed=seed, round=round, slot=slot, purpose=Purpose.BONUS)
    assert other.tolist()[0] != tokens[0]


def test_needs_randomness():
    logits = torch.zeros(2, 3)
    with pytest.raises(
        ValueError, match=r"^seed: expected an integer, or a tensor \[2\] int64, got None"
    ):
        sample(logits, row_distribution(logits))
    with pytest.raises(ValueError, match=r"^words: expected shape \[2\], got \[3\]"):
        sample(logits, row_distribution(logits), words=i64(1, 2, 3))
    with pytest.raises(
        ValueError, match=r"^seed: expected an integer .*tensor \[2\] .*got \[1, 2\]"
    ):
        sample(logits, row_distribution(logits), words=i64(1, 2), seed=[1, 2])


def test_a_bad_out_is_named():
    logits = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"^out: expected shape \[N=2\], got \[3\]"):
        sample(logits, row_distribution(logits), words=i64(0, 0), out=i64(0, 0, 0))
