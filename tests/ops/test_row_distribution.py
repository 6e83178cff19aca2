"""Row distribution: agreement with softmax, truncation as in transformers, faults."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from specdiff_kernels import (
    DistributionError,
    RowDistribution,
    Status,
    check_status,
    row_distribution,
)
from specdiff_kernels.reference.numerics import weights

from .helpers import assert_same

NAN, INF = float("nan"), float("inf")
pytestmark = pytest.mark.usefixtures("implementation")


def probabilities(logits, distribution):
    return weights(logits, distribution).double() / distribution.total[:, None].double()


@pytest.mark.parametrize("V", [1, 31, 1024, 1025, 50257, 50258, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_softmax(V, dtype):
    """Total variation to fp64 softmax: the polynomial's 1.7e-7, and the rounding of t in fp32,
    at most 2 ulp of 32, each times ln 2 or less."""
    torch.manual_seed(V)
    logits = (torch.randn(3, V) * 4).to(dtype)
    distribution = row_distribution(logits, 0.7)
    distance = probabilities(logits, distribution) - (logits.double() / 0.7).softmax(-1)
    assert distance.abs().sum(-1).max() / 2 < 1.7e-7 + 2 * 32 * 2.0**-24
    assert (weights(logits, distribution).sum(-1) == distribution.total).all()


@pytest.mark.parametrize(
    ("parameters", "warper"),
    [
        ({"top_k": 7}, TopKLogitsWarper(7)),
        ({"top_p": 0.8}, TopPLogitsWarper(0.8)),
        ({"min_p": 0.05}, MinPLogitsWarper(0.05)),
    ],
)
def test_truncation_keeps_what_transformers_keeps(parameters, warper):
    torch.manual_seed(0)
    logits = torch.randn(64, 300) * 3
    kept = weights(logits, row_distribution(logits, **parameters)) > 0
    assert torch.equal(kept, warper(None, logits.clone()) > -INF)


def test_truncations_compose_in_order():
    torch.manual_seed(1)
    logits = torch.randn(64, 300) * 2
    distribution = row_distribution(logits, 1.3, top_k=20, top_p=0.7, min_p=0.02)
    scores = logits / 1.3
    for warper in (TopKLogitsWarper(20), TopPLogitsWarper(0.7), MinPLogitsWarper(0.02)):
        scores = warper(None, scores)
    assert torch.equal(weights(logits, distribution) > 0, scores > -INF)
    assert (weights(logits, distribution).sum(-1) == distribution.total).all()


def test_ties_at_the_threshold_are_kept():
    logits = torch.tensor([[1.0, 3.0, 3.0, 3.0, 0.0]])
    assert (weights(logits, row_distribution(logits, top_k=2)) > 0).tolist() == [
        [False, True, True, True, False]
    ]


def test_greedy_is_the_lowest_index_argmax():
    logits = torch.tensor([[0.0, 2.0, 2.0], [-0.0, 0.0, -1.0]])
    distribution = row_distribution(logits, 0.0, top_k=1, top_p=0.1)
    assert distribution.scale.tolist() == [0, 0]
    assert distribution.threshold.tolist() == [1, 0]
    assert weights(logits, distribution).argmax(-1).tolist() == [1, 0]


def test_per_row_parameters():
    logits = torch.randn(3, 50).repeat(2, 1)[:3]
    temperature = torch.tensor([0.5, 0.0, 2.0])
    together = row_distribution(logits, temperature)
    for i, t in enumerate(temperature.tolist()):
        alone = row_distribution(logits[i : i + 1], t)
        assert [field[i].item() for field in together] == [field.item() for field in alone]


@pytest.mark.parametrize(
    ("row", "status"),
    [
        ([0.0, NAN], Status.NAN),
        ([0.0, -NAN], Status.NAN),
        ([INF, NAN], Status.NAN),
        ([0.0, INF], Status.POS_INF),
        ([-INF, -INF], Status.EMPTY),
        ([-INF, 0.0], Status.OK),
    ],
)
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_faults(row, status, temperature):
    distribution = row_distribution(torch.tensor([[0.0, 1.0], row]), temperature)
    assert distribution.status.tolist() == [Status.OK, status]
    if status:
        assert distribution.total[1] == 0
        with pytest.raises(DistributionError, match="row 1 has no distribution"):
            check_status(distribution.status)


@pytest.mark.parametrize(
    "parameters",
    [
        {"temperature": torch.tensor([-1.0])},
        {"temperature": torch.tensor([NAN])},
        {"temperature": torch.tensor([1e-40])},
        {"top_k": torch.tensor([-1])},
        {"top_p": torch.tensor([0.0])},
        {"top_p": torch.tensor([1.5])},
        {"min_p": torch.tensor([-0.1])},
    ],
)
def test_bad_entries_of_parameter_tensors(parameters):
    assert row_distribution(torch.zeros(1, 4), **parameters).status.item() == Status.PARAMETER


def test_numbers_of_other_types_are_numbers():
    torch.manual_seed(4)
    logits = torch.randn(2, 50)
    for have, want in (
        ({"temperature": Fraction(3, 4), "top_p": Fraction(7, 8), "min_p": Fraction(1, 64)},
         {"temperature": 0.75, "top_p": 0.875, "min_p": 1 / 64}),
        ({"top_k": Fraction(6, 2), "min_p": np.float32(0.5)}, {"top_k": 3, "min_p": 0.5}),
        ({"top_k": np.int64(3), "temperature": True}, {"top_k": 3.0, "temperature": 1}),
        ({"top_k": 2**63 - 1, "top_p": 2.0**-149}, {"top_k": 0, "top_p": 2.0**-148}),
    ):  # fmt: skip
        assert_same(row_distribution(logits, **have), row_distribution(logits, **want))


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": 2**63}, "top_k"),
        ({"top_k": 2**70}, "top_k"),
        ({"top_k": INF}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1e-50}, "top_p"),
        ({"min_p": 2.0}, "min_p"),
        ({"top_p": torch.tensor([0.5, 0.5])}, "top_p"),
    ],
)
def test_bad_arguments_are_named(parameters, name):
    with pytest.raises(ValueError, match=f"^{name}: expected"):
        row_distribution(torch.zeros(1, 4), **parameters)
    with pytest.raises(TypeError, match=r"^logits: expected dtype .* got float64"):
        row_distribution(torch.zeros(1, 4, dtype=torch.float64))
    with pytest.raises(ValueError, match="vocabulary of 1 to 524287"):
        row_distribution(torch.zeros(1, 0))


def test_largest_vocabulary_does_not_overflow():
    logits = torch.zeros(1, 2**19 - 1)
    assert row_distribution(logits).total.item() == (2**19 - 1) << 44


def test_views_between_sentinels_and_out():
    torch.manual_seed(2)
    logits = torch.randn(3, 100)
    frame = torch.full((5, 131), NAN)
    frame[1:4, 17:117] = logits
    expected = row_distribution(logits, top_p=0.9)
    out = RowDistribution(*(torch.full_like(field, 77) for field in expected))
    assert row_distribution(frame[1:4, 17:117], top_p=0.9, out=out) is out
    for a, b in zip(out, expected, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(
        row_distribution(logits.t().contiguous().t()).total, row_distribution(logits).total
    )
