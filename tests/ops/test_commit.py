"""Lengths after a round: padding, stop tokens, limits, finished rows."""

from __future__ import annotations

import pytest
import torch

from specdiff_kernels import Committed, commit

from .helpers import i64

pytestmark = pytest.mark.usefixtures("implementation")


def committed(*args, **kwargs):
    return [field.tolist() for field in commit(*args, **kwargs)]


def test_padding_ends_a_row():
    emitted = torch.tensor([[3, 4, -1], [5, -1, -1], [-1, -1, -1], [6, 7, 8]])
    assert committed(i64(10, 20, 30, 40), emitted) == [
        [12, 21, 30, 43], [2, 1, 0, 3], [False, False, False, False],
    ]  # fmt: skip


def test_stop_tokens_inside_the_span():
    emitted = torch.tensor([[3, 2, 9, 2], [2, 1, 1, -1], [1, 9, -1, -1], [1, 1, 1, 1]])
    assert committed(i64(0, 0, 0, 0), emitted, stop_tokens=i64(2, 9)) == [
        [2, 1, 2, 4], [2, 1, 2, 4], [True, True, True, False],
    ]  # fmt: skip


def test_limit_cuts_before_a_stop_token_behind_it():
    emitted = torch.tensor([[1, 1, 2], [1, 1, 2], [1, 1, 1]])
    result = committed(i64(5, 5, 9), emitted, stop_tokens=i64(2), limit=i64(7, 8, 9))
    assert result == [[7, 8, 9], [2, 3, 0], [True, True, True]]


def test_finished_rows_keep_nothing():
    emitted = torch.tensor([[1, 1], [1, 1]])
    finished = torch.tensor([True, False])
    assert committed(i64(4, 4), emitted, finished=finished) == [[4, 6], [0, 2], [True, False]]


def test_out_may_alias_the_inputs():
    lengths, finished = i64(4, 4), torch.tensor([True, False])
    out = Committed(lengths, torch.empty_like(lengths), finished)
    emitted = torch.tensor([[1, 1], [7, 1]])
    assert commit(lengths, emitted, stop_tokens=i64(7), finished=finished, out=out) is out
    assert [field.tolist() for field in out] == [[4, 5], [0, 1], [True, True]]


def test_bad_shapes_are_named():
    with pytest.raises(ValueError, match=r"^lengths: expected shape \[1\], got \[2\]"):
        commit(i64(1, 2), torch.zeros(1, 1, dtype=torch.int64))
