"""Improvement: a gain is called sure only where it is, and an average is of one kind of drafter."""

from __future__ import annotations

import pytest
import torch

from specdiff.training.improvement import average, gain
from tests.tiny import tiny_network

IDS = torch.arange(1, 50, 2)


def test_a_gain_is_that_of_pairs():
    """Conversations differ by far more than the drafters do."""
    generator = torch.Generator().manual_seed(0)
    before = 1 + 2 * torch.rand(200, generator=generator)
    after = before + 0.02 + 0.05 * torch.randn(200, generator=generator)
    found = gain(before, after)
    assert found.tokens == pytest.approx(0.02, abs=0.01)
    assert found.standard_error == pytest.approx(0.05 / 200**0.5, rel=0.2)
    assert found.sure
    shuffled = after[torch.randperm(200, generator=generator)]
    assert not gain(before, shuffled).sure  # the mutant: unpaired


def test_chance_is_seldom_a_gain():
    generator = torch.Generator().manual_seed(1)
    found = [gain(*torch.randn(2, 50, generator=generator)) for _ in range(1000)]
    assert 0.005 < sum(each.sure for each in found) / 1000 < 0.05  # two standard errors: 2.3 %


def test_too_few_conversations():
    with pytest.raises(ValueError, match=r"2 conversations or more, got shapes \[1\] and \[1\]"):
        gain(torch.ones(1), torch.ones(1))
    with pytest.raises(ValueError, match=r"got shapes \[3\] and \[2\]"):
        gain(torch.ones(3), torch.ones(2))


def test_the_average_is_of_every_weight():
    first, second = (tiny_network("parallel", IDS, head_rank=5) for _ in range(2))
    with torch.no_grad():
        for parameter in second.parameters():
            parameter.add_(1)
    mean = average(first, second)
    assert mean.config == first.config and torch.equal(mean.draft_ids, IDS)
    for (name, value), one in zip(mean.named_parameters(), first.parameters(), strict=True):
        torch.testing.assert_close(value, one + 0.5, msg=name)


def test_only_drafters_alike_are_averaged():
    first = tiny_network("parallel", IDS)
    with pytest.raises(ValueError, match="must have the same configuration"):
        average(first, tiny_network("parallel", IDS, head_rank=5))
    with pytest.raises(ValueError, match="must have the same draft vocabulary"):
        average(first, tiny_network("parallel", IDS - 1))
