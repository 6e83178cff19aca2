"""How much Python runs around a kernel."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specdiff_kernels import Draft, verify

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(Path(__file__).parents[2] / "benchmarks")
    from bench_call import a_call, functions

MOST = 62  # of the 137 that a call went through when each field was checked and packed by its own


def test_a_call_of_verify_is_few_python_functions():
    seen = functions(a_call())
    assert seen.total() <= MOST, seen


def test_ids_are_looked_at_again_when_somebody_wrote_to_them():
    target, pool = torch.zeros(1, 2, 4), torch.zeros(1, 3)
    ids, token = torch.tensor([0, 1, 3]), torch.tensor([[1]])
    draft = Draft(token, token.int(), torch.full((1, 1), -1), pool, draft_ids=ids)
    draft = draft._replace(distribution=Draft.masked(1, 1, pool).distribution)
    key = {"seed": torch.zeros(1).long(), "round": torch.zeros(1).long()}
    for _ in range(2):
        assert verify(target, draft, **key).status.tolist() == [0]
    with pytest.raises(ValueError, match=r"draft.draft_ids: .* increasing ids in \[0, 3\)"):
        verify(target[..., :3], draft, **key)
    for wrong in (0, 2**40):
        ids[1] = wrong
        with pytest.raises(ValueError, match="draft_ids: expected strictly increasing ids"):
            verify(target, draft, **key)
    ids[1] = 2
    assert verify(target, draft, **key).status.tolist() == [0]
    with torch.inference_mode():  # tensors that do not count writes
        other = draft._replace(draft_ids=torch.tensor([0, 1, 3]))
        verify(target, other, **key)
        other.draft_ids[1] = 0
        with pytest.raises(ValueError, match="draft_ids: expected strictly increasing ids"):
            verify(target, other, **key)
