"""Row distribution: agreement with softmax, truncation as in transformers, faults."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest
import torch
from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from specdiff_kernels import (
    DistributionError,
    Draft,
    Lenience,
    RowDistribution,
    Status,
    check_status,
    row_distribution,
    verify,
)
from specdiff_kernels.backends import interprets_triton
from specdiff_kernels.reference.numerics import weights

from .helpers import assert_same

NAN, INF = float("nan"), float("inf")
pytestmark = pytest.mark.usefixtures("implementation")


def probabilities(logits, distribution):
    return weights(logits, distribution).double() / distribution.total[:, None].double()


@pytest.mark.parametrize("V", [1, 31, 1024, 1025, 50257, 50258, 151936])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_softmax(V, dtype):
    """Total variation to fp64 softmax: 1.83e-7 for a weight, and the roundings of log2(e) /
    temperature, 2^-23.5 of exponents below 32."""
    torch.manual_seed(V)
    logits = (torch.randn(3, V) * 4).to(dtype)
    distribution = row_distribution(logits, 0.7)
    distance = probabilities(logits, distribution) - (logits.double() / 0.7).softmax(-1)
    assert distance.abs().sum(-1).max() / 2 < 1.83e-7 + 32 * 2.0**-23.5
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


def test_min_p_is_relative_to_the_largest_weight():
    """Of its own row: what lies between half and a quarter of it is cut off by a min_p of 1/2."""
    for top in (0.0, 0.1, 1.0, 1.5, -3.3, 77.7):
        chances = torch.tensor([1.0, 0.51, 0.49, 0.26, 0.24])
        logits = (top + chances.log())[None]
        for min_p, kept in ((0.25, 4), (0.5, 2), (1.0, 1)):
            e = weights(logits, row_distribution(logits, min_p=min_p))[0]
            assert (e > 0).tolist() == [i < kept for i in range(5)]


def test_the_largest_logit_is_never_cut_off():
    """Not even where a smaller one has a weight that is larger by a unit in the last place."""
    torch.manual_seed(3)
    top = -0.34 * torch.rand(20_000)
    pairs = torch.stack((top.nextafter(torch.tensor(-1.0)), top), 1)
    whole = weights(pairs, row_distribution(pairs, backend="reference"))
    pairs = pairs[whole[:, 0] > whole[:, 1]][:5]
    assert len(pairs) == 5
    for options in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        distribution = row_distribution(pairs, **options)
        assert (weights(pairs, distribution)[:, 1] > 0).all()
        assert_same(distribution, row_distribution(pairs, **options, backend="reference"))


FAR = 2.0**20  # |max / temperature log2(e)| beyond which exponents count from the maximum


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [2.0**-95, 1e-6, 0.07, 1.0, 2.0**20, 2.0**95])
def test_weights_at_the_edges(dtype, temperature, implementation):
    """All ops agree with the reference: -inf, zeros of both signs, subnormal numbers, maxima where
    the exponents begin to count from them, one token and ties."""
    top = torch.finfo(dtype).max
    edge = FAR * 0.6931472 * temperature  # of the maximum, in the units of logits
    rows = [[0.0, -0.0, -INF, -1.0], [-top, -INF, -top, -top / 2], [top, top, top / 2, -top],
            [5.9e-8, 1e-40, -1e-40, 0.0], [-1e-40, -2e-40, -INF, -1.0]]  # fmt: skip
    for scale in (1 - 1e-6, 1.0, 1 + 1e-6, -1 + 1e-6, -1.0, -1 - 1e-6):
        if abs(at := edge * scale) < top:
            rows.append([at, at * (1 - 2e-7), at - 10 * temperature, at - 20 * temperature])
            rows[-1] = [min(x, at) for x in rows[-1]]
    logits = torch.tensor(rows).repeat(1, 33).to(dtype)  # more than a vector unit takes at once
    if implementation == "triton" and interprets_triton() and dtype == torch.bfloat16:
        # its interpreter reads subnormal numbers of this type as 0, unlike a GPU
        smallest = torch.finfo(dtype).tiny
        logits = torch.where(logits.abs() < smallest, 0.0, logits)
    for options in ({}, {"top_k": 2}, {"top_p": 0.6}, {"min_p": 0.3}):
        have = row_distribution(logits, temperature, **options)
        want = row_distribution(logits, temperature, **options, backend="reference")
        assert_same(have, want)
        assert (have.status == Status.OK).all()
    for row in logits:
        alone = row_distribution(row[:1][None], temperature)
        e = weights(row[:1][None], alone)
        assert alone.total == e.sum() and 2**42 <= e <= 2**44


@pytest.mark.parametrize("cut", [{}, {"min_p": 0.01}])
@pytest.mark.parametrize("rule", ["token", "block", "lenient"])
def test_a_record_of_other_logits_is_read_alike(rule, cut):
    """Logits above the record's maximum count as that, NaN and -inf as nothing."""
    torch.manual_seed(5)
    B, V = 6, 300
    logits = torch.randn(B, V)
    zero = torch.zeros(B, 1, dtype=torch.int64)
    distribution = row_distribution(logits, 0.8, **cut)
    draft = Draft(zero + 3, zero.int(), torch.arange(B)[:, None], logits, distribution)
    target = torch.randn(B, 2, V)
    logits *= 3
    logits[:, 3] = 1.0  # the drafted token keeps a weight
    logits[:, 0], logits[:, 1], logits[:, 2] = INF, -INF, NAN
    e = weights(logits, distribution)
    assert (e[:, 0] == weights(distribution.max[:, None], distribution)[:, 0]).all()
    assert (e[:, 1:3] == 0).all()
    options = {"rule": rule}
    if rule == "lenient":
        options["lenience"] = Lenience("ensemble", 0.5)
    rejected = 0
    for _ in range(8):
        words = torch.randint(-(2**63), 2**63 - 1, (B, 2))
        want = verify(target, draft, **options, words=words, backend="reference")
        assert_same(verify(target, draft, **options, words=words), want)
        rejected += int((want.accepted == 0).sum())
    assert rejected > 0


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
        ({"top_k": np.int64(3), "min_p": np.float32(0.5)}, {"top_k": 3, "min_p": 0.5}),
        ({"temperature": True}, {"temperature": 1}),
        ({"top_k": 2**63 - 1, "top_p": 2.0**-149}, {"top_k": 0, "top_p": 2.0**-148}),
    ):  # fmt: skip
        assert_same(row_distribution(logits, **have), row_distribution(logits, **want))


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": 3.0}, "top_k"),
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
