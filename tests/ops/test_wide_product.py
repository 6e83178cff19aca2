"""A model's forward on vectors that this processor need not have."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from specdiff_kernels import cached_attention, pack_weight, skinny_linear
from specdiff_kernels.ops.decoder_layer import decoder_layer, row_norm

from . import attention, layers, test_cached_attention, test_decoder_layer
from .products import SHAPES, inputs, rms
from .wide import library, standing_in


@pytest.fixture(autouse=True)
def wide():
    with standing_in(library()):
        yield


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_products(N, K, dtype):
    """As exact as torch, and rows as alone, for every number of rows in registers and tail."""
    x, weight, bias = inputs(41, N, K, dtype)
    packed = pack_weight(weight)
    exact = F.linear(x.double(), weight.double(), bias.double())
    allowed = 2 * rms(F.linear(x, weight.float(), bias) - exact) + 2.0**-23 * rms(exact)
    assert rms(skinny_linear(x, packed, bias) - exact) <= allowed
    alone = torch.cat([skinny_linear(row[None], weight, bias) for row in x])
    for M in (*range(2, 15), 24, 25, 36, 37, 41):
        assert torch.equal(skinny_linear(x[:M], weight, bias), alone[:M]), M
        assert torch.equal(skinny_linear(x[:M], packed, bias), alone[:M]), M


@pytest.mark.parametrize("point", test_cached_attention.sampled(24), ids=str)
def test_attention_is_exact(point):
    test_cached_attention.assert_point_is_exact(point)


@pytest.mark.parametrize("options", test_cached_attention.OPTIONS)
@pytest.mark.parametrize("case", test_cached_attention.CASES)
def test_bits_of_attention(case, options):
    arguments = test_cached_attention.made(
        test_cached_attention.CASES[case], **test_cached_attention.OPTIONS[options]
    )
    assert attention.dependences(cached_attention, arguments) == set()
    assert torch.equal(*attention.over_threads(cached_attention, arguments))


@pytest.mark.parametrize("point", test_decoder_layer.sampled(30), ids=str)
def test_layers_are_exact(point):
    test_decoder_layer.assert_point_is_exact(point)


@pytest.mark.parametrize("case", test_decoder_layer.CASES)
def test_bits_of_layers(case):
    shape, Q, lengths = test_decoder_layer.CASES[case]
    tokens = layers.tokens_of(shape, Q, lengths)
    assert layers.dependences(decoder_layer, shape, tokens, tuple(layers.PAIRS)) == set()


@pytest.mark.parametrize("d", [1, 15, 16, 17, 64, 100, 1000])
@pytest.mark.parametrize(("kind", "offset"), test_decoder_layer.NORMS)
def test_norms(d, kind, offset):
    norm = test_decoder_layer.norm_of(kind, offset, d, bias=True)
    x = torch.randn(5, d, generator=torch.Generator().manual_seed(d)) * 3 + 1
    result, exact = row_norm(x, norm), layers.normed(x.double(), norm)
    allowed = 2 * rms(layers.normed(x, norm) - exact) + 2.0**-23 * rms(exact)
    assert rms(result - exact) <= allowed
    assert all(
        torch.equal(row_norm(row[None], norm)[0], y) for row, y in zip(x, result, strict=True)
    )
