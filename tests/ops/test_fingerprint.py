"""The fingerprint of a weight: backends agree, and its places are such that changes meet them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from specdiff_kernels.backends import function_of
from specdiff_kernels.reference.fingerprint import PLACES, RUN, fingerprint, runs, watch

native = function_of("cpp", "fingerprint")
native_watch = function_of("cpp", "watch")
WIDTHS = (192, 320, 576, 768, 960, 1024, 1536, 2048, 2304, 3072, 4096, 8192, 11008, 14336)
WIDTHS += (32000, 49152, 50257, 128256, 151936)
WEIGHTS = {
    "rows": torch.randn(40, 33),
    "columns": torch.randn(40, 33).t(),
    "a view": torch.randn(40, 99)[3:, 1::2],
    "few": torch.randn(3, 5),
    "one": torch.randn(1, 1),
    "one column": torch.randn(50, 1),
    "expanded": torch.randn(1, 30).expand(20, 30),
    "no rows": torch.randn(0, 4),
    "no columns": torch.randn(4, 0),
    "no numbers": torch.full((20, 20), torch.nan),
    "a parameter": torch.nn.Parameter(torch.randn(20, 20)),
}


@pytest.mark.parametrize("weight", WEIGHTS.values(), ids=WEIGHTS)
def test_backends_agree(weight):
    assert native(weight) == fingerprint(weight) == native(weight)


@pytest.mark.parametrize("count", [0, 1, 2, len(WEIGHTS)])
def test_one_number_for_several(count):
    """That of the fingerprints one after another, whichever backend makes it."""
    weights = list(WEIGHTS.values())[:count]
    number = native_watch(weights)
    assert number() == watch(weights)() == number()
    expected = 0
    for weight in weights:
        expected = (expected * 0x9E3779B97F4A7C15 + native(weight)) % 2**64
    assert number() == expected


def test_a_change_of_any_weight_changes_their_number():
    weights = [torch.randn(20, 30), torch.randn(40, 33).t(), torch.randn(1, 1)]
    numbers = [make(weights) for make in (native_watch, watch)]
    before = [number() for number in numbers]
    for weight in weights:
        kept = weight.clone()
        weight.neg_()
        after = [number() for number in numbers]
        assert after[0] == after[1] != before[0]
        weight.copy_(kept)
        assert [number() for number in numbers] == before
    assert native_watch(weights[::-1])() != before[0]


def test_of_where_it_lies_and_how():
    square, same = torch.zeros(8, 8), torch.zeros(8, 8)
    views = (square, same, square[:4], square[:, :4], square.t(), square.view(4, 16), square[::2])
    assert len({native(view) for view in views}) == len(views)


@pytest.mark.parametrize("shape", [(40, 33), (3, 5), (576, 576), (1, 20)], ids=str)
@pytest.mark.parametrize("transposed", [False, True])
def test_every_value_of_the_runs_counts_and_no_other(shape, transposed):
    weight = torch.randn(shape)
    places = {(row, k) for row, columns in runs(*shape) for k in range(*columns.indices(shape[1]))}
    assert len(places) == min(weight.numel(), PLACES * min(RUN, shape[1])) or shape[0] < PLACES
    seen = weight.t() if transposed else weight
    before = native(seen)
    for row, k in places:
        value = weight[row, k].clone()
        weight[row, k] = -value
        assert native(seen) != before
        weight[row, k] = value
    assert native(seen) == before
    elsewhere = torch.ones(shape, dtype=torch.bool)
    elsewhere[tuple(torch.tensor(sorted(places)).T)] = False
    weight[elsewhere] = torch.nan
    assert native(seen) == before


def test_a_block_of_an_eighth_of_a_weight_holds_a_run():
    """The largest that holds none lies between two of the runs' rows, and two of their columns."""
    N = K = 2**20
    at = [(row, columns.start) for row, columns in runs(N, K)]
    edges = [-1, *sorted(row for row, _ in at), N]
    for i, above in enumerate(edges):
        for below in edges[i + 1 :]:
            inside = sorted([-1, *(k for row, k in at if above < row < below), K])
            widest = max(b - a - 1 for a, b in pairwise(inside))
            assert (below - above - 1) * widest < N * K / 8


@pytest.mark.parametrize("every", [2, 3, 4])
def test_every_few_rows_hold_a_run(every):
    for N in WIDTHS:
        assert {row % every for row, _ in runs(N, 576)} == set(range(every)), N
