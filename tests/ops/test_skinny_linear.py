"""A linear layer on a few rows: as exact as torch's, and no row depends on another."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from specdiff_kernels import PackedWeight, pack_weight, skinny_linear

from .conftest import ON_CPU, forced
from .products import NAN, SHAPES, inputs, rms

pytestmark = pytest.mark.usefixtures("implementation")


@pytest.fixture(params=ON_CPU)
def implementation(request):
    with forced(request.param):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_error_is_at_most_twice_that_of_torch(N, K, dtype):
    """Root mean square over all outputs, against fp64; one ulp of the result is allowed anyway."""
    x, weight, bias = inputs(9, N, K, dtype)
    exact = F.linear(x.double(), weight.double(), bias.double())
    allowed = 2 * rms(F.linear(x, weight.float(), bias) - exact) + 2.0**-23 * rms(exact)
    assert rms(skinny_linear(x, weight, bias) - exact) <= allowed


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_a_row_is_the_same_in_any_company(N, K, dtype):
    x, weight, bias = inputs(70, N, K, dtype)
    alone = torch.cat([skinny_linear(row[None], weight, bias) for row in x])
    for M in (*range(1, 34), 47, 64, 70):
        assert torch.equal(skinny_linear(x[:M], weight, bias), alone[:M]), M
        assert torch.equal(skinny_linear(x[-M:], weight, bias), alone[-M:]), M


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_a_packed_weight_gives_the_same_bits(N, K, dtype):
    x, weight, bias = inputs(37, N, K, dtype)
    packed = pack_weight(weight)
    assert packed.packs.dtype is dtype and packed.rows == N
    flat = packed.packs.transpose(1, 2).flatten(0, 1)
    assert torch.equal(flat[:N], weight) and not flat[N:].any()
    for M in (1, 2, 5, 13, 37):
        expected = skinny_linear(x[:M], weight, bias)
        assert torch.equal(skinny_linear(x[:M], packed, bias), expected), M
    as_bf16 = pack_weight(weight, torch.bfloat16)
    assert torch.equal(skinny_linear(x, as_bf16), skinny_linear(x, weight.bfloat16()))


def test_threads_do_not_matter(request):
    """To the bit; but in the reference, whose products are torch's. On some processors these are
    added up in another order with more threads: each sum of K products is then off by at most
    K u sum |x w|, u being half of fp32's epsilon."""
    x, weight, bias = inputs(5, 1000, 576)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = skinny_linear(x, weight, bias)
        torch.set_num_threads(3)
        more = skinny_linear(x, weight, bias)
    finally:
        torch.set_num_threads(before)
    if "reference" in request.node.name:
        terms = x.double().abs() @ weight.double().abs().T + bias.double().abs()
        bound = 577 * torch.finfo(torch.float32).eps * terms  # of both
        assert ((more.double() - one.double()).abs() <= bound).all()
    else:
        assert torch.equal(more, one)


@pytest.mark.parametrize("K", [1, 15, 16, 17, 40])
def test_views_between_sentinels(K):
    """Nothing outside the rows is read, and nothing outside the result is written."""
    x, weight, bias = inputs(7, 29, K)
    frame_x, frame_w = torch.full((9, K + 5), NAN), torch.full((31, K + 3), NAN)
    frame_x[1:8, 2 : K + 2], frame_w[1:30, 1 : K + 1] = x, weight
    expected = skinny_linear(x, weight, bias)
    frame = torch.full((9, 29), NAN)
    result = skinny_linear(
        frame_x[1:8, 2 : K + 2], frame_w[1:30, 1 : K + 1], bias, out=frame[1:8]
    )  # fmt: skip
    assert torch.equal(result, expected)
    assert frame[0].isnan().all() and frame[8].isnan().all()
    packs = pack_weight(weight).packs
    around = torch.full((4, K, 16), NAN)
    around[1:3] = packs
    packed = PackedWeight(around[1:3], 29)
    result = skinny_linear(frame_x[1:8, 2 : K + 2], packed, bias, out=frame[1:8])
    assert torch.equal(result, expected)
    assert frame[0].isnan().all() and frame[8].isnan().all()
    assert torch.equal(skinny_linear(x.T.contiguous().T, weight.T.contiguous().T, bias), expected)


def test_empty_and_without_bias():
    x, weight, _ = inputs(3, 5, 8)
    assert torch.equal(skinny_linear(x, weight), skinny_linear(x, weight, torch.zeros(5)))
    assert skinny_linear(x[:0], weight).shape == skinny_linear(x[:0], pack_weight(weight)).shape
    assert skinny_linear(x[:0], weight).shape == (0, 5)
    assert skinny_linear(x, pack_weight(weight[:0])).shape == (3, 0)
    bias = torch.arange(5.0)
    assert torch.equal(skinny_linear(x[:, :0], weight[:, :0], bias), bias.expand(3, 5))
    assert skinny_linear(x, weight[:0]).shape == (3, 0)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(8), torch.zeros(5, 8)), ValueError, r"^x: expected shape \[M, K\]"),
        ((torch.zeros(1, 8), torch.zeros(5, 9)), ValueError, r"^weight: expected shape \[N, K=8\]"),
        ((torch.zeros(1, 8).double(), torch.zeros(5, 8)), TypeError, "^x: expected dtype float32"),
        ((torch.zeros(1, 8), torch.zeros(5, 8).half()), TypeError, "^weight: expected dtype float"),
        ((torch.zeros(1, 8), torch.zeros(5, 8), torch.zeros(4)), ValueError, "^bias: expected sh"),
        (
            (torch.zeros(1, 8), PackedWeight(torch.zeros(1, 8, 16), 17)),
            ValueError,
            r"^weight.packs: expected shape \[packs=2, K=8, 16\]",
        ),
    ],
)
def test_bad_arguments_are_named(arguments, error, message):
    with pytest.raises(error, match=message):
        skinny_linear(*arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ((torch.zeros(8),), ValueError, r"^weight: expected shape \[N, K\]"),
        ((torch.zeros(5, 8).double(),), TypeError, "^weight: expected dtype float32, bfloat16"),
        ((torch.zeros(5, 8), torch.half), TypeError, "^dtype: expected torch.float32 or torch.bf"),
    ],
)
def test_what_cannot_be_packed_is_named(arguments, error, message):
    with pytest.raises(error, match=message):
        pack_weight(*arguments)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["x", "weight", "bias"])
def test_there_is_no_derivative(name, packed):
    arguments = dict(zip(("x", "weight", "bias"), inputs(2, 5, 8), strict=True))
    want = skinny_linear(**arguments)
    arguments[name].requires_grad_()
    if packed:
        packs, rows = pack_weight(arguments["weight"])
        arguments["weight"] = PackedWeight(packs.requires_grad_(name == "weight"), rows)
    message = f"^{name}: .* without gradient, got .*; use torch.nn.functional.linear, or torch.no_"
    with pytest.raises(ValueError, match=message):
        skinny_linear(**arguments)
    with torch.no_grad():
        assert torch.equal(skinny_linear(**arguments), want)


def test_a_bad_out_is_named():
    x, weight, _ = inputs(3, 8, 8)
    with pytest.raises(ValueError, match="out: expected memory of its own, got some of x's"):
        skinny_linear(x, weight, out=x)
    with pytest.raises(ValueError, match=r"^out: expected shape \[M=3, N=8\], got \[3, 9\]"):
        skinny_linear(x, weight, out=torch.zeros(3, 9))
