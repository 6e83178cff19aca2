"""`verify(..., check=True)`: records that are not those of their logits are refused, others not."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch

from specdiff_kernels import (
    RULES,
    DistributionError,
    Draft,
    Lenience,
    Reveal,
    RowDistribution,
    Status,
    Verified,
    check_status,
    denoise_step,
    row_distribution,
    sample,
    use_backend,
    verify,
)
from specdiff_kernels.backends import requested
from specdiff_kernels.ops import record_check

from .helpers import assert_same, recorded_draft
from .interpreter import is_slow, sized

B, K, V = 3, 4, 40
KEY = {"seed": 3, "round": 0}
NEVER = float("-inf")
TRUNCATIONS = [
    {},
    {"temperature": 0.0},
    {"temperature": 0.7, "top_k": 5},
    {"temperature": 1.3, "top_p": 0.8},
    {"min_p": 0.05},
    {"temperature": torch.tensor([0.0, 1.0, 2.0**-90]), "top_k": 9, "top_p": 0.9, "min_p": 0.01},
]
REVEALS = [
    Reveal.chunk(0, 2),
    Reveal.mdlm(0.5),
    Reveal.sedd(0.3),
    Reveal.first_hitting(),
    Reveal.lowest_entropy(2),
    Reveal.highest_confidence(2),
]


def a_pool(dtype: torch.dtype = torch.float32, width: int = V) -> torch.Tensor:
    pool = 3 * torch.randn(B * K, width)
    pool[torch.rand(pool.shape) < 0.2] = NEVER  # tokens that a mask has excluded
    return pool.to(dtype)


def one_step(draft: Draft | None = None, **sampling) -> Draft:
    """All tokens at once."""
    draft = Draft.masked(B, K, a_pool()) if draft is None else draft
    return denoise_step(draft, Reveal.all(), 0, **sampling, **KEY)


def one_by_one(**sampling) -> Draft:
    """As an autoregressive drafter."""
    logits, tokens = [a_pool()[:B] for _ in range(K)], []
    distributions = [row_distribution(rows, **sampling) for rows in logits]
    for i, (rows, distribution) in enumerate(zip(logits, distributions, strict=True)):
        tokens.append(sample(rows, distribution, **KEY, slot=i))
    return Draft.sequential(torch.stack(tokens, 1), logits, distributions)


def in_steps(reveal: Reveal, entangled: bool = False) -> Draft:
    draft = Draft.masked(B, K, a_pool(), entangled=entangled)
    for step in range(2):
        draft = denoise_step(draft, reveal, step, entropies=True, **KEY)
    return denoise_step(draft, Reveal.all(), 2, 0.9, **KEY)


def padded() -> Draft:
    """Rows beyond the draft's lengths hold anything."""
    draft = one_step()._replace(lengths=torch.tensor([0, 2, K]))
    behind = torch.arange(K) >= draft.lengths[:, None]
    draft.logits[draft.rows[behind]] = float("nan")
    return draft._replace(tokens=draft.tokens.masked_fill(behind, -1))


def partly_guessed() -> Draft:
    """A bare guess needs no row, nor has a row that nothing was drawn from to keep still."""
    draft = one_step()
    rows = draft.rows.index_fill(1, torch.tensor([1]), -1)
    draft.logits[draft.rows[:, 1]] = 7.0
    return draft._replace(rows=rows)


def reduced(dtype: torch.dtype) -> Draft:
    ids = torch.randperm(V)[:17].sort().values
    return one_step(Draft.masked(B, K, a_pool(dtype, 17), draft_ids=ids), temperature=0.9)


def honest() -> Iterator[Callable[[], Draft]]:
    for sampling in TRUNCATIONS:
        yield partial(one_step, **sampling)
        yield partial(one_by_one, **sampling)
    for reveal in REVEALS:
        yield partial(in_steps, reveal)
    yield partial(in_steps, Reveal.first_hitting(), entangled=True)
    for dtype in (torch.bfloat16, torch.float16):
        yield partial(reduced, dtype)
    yield lambda: one_step(Draft.masked(B, K, a_pool(width=V + 3)[:, :V]))  # columns left out
    yield lambda: one_step(Draft.masked(B, K, a_pool()), position=5)._replace(coupled=True)
    yield lambda: Draft.guesses(torch.ones(B, K, dtype=torch.int64))
    yield lambda: Draft.guesses(torch.ones(B, 0, dtype=torch.int64))
    yield padded
    yield partly_guessed


def checked(draft: Draft, rule: str = "token", check: bool = True, **how) -> Verified:
    torch.manual_seed(1)
    target = torch.randn(draft.tokens.shape[0], draft.tokens.shape[1] + 1, V)
    key = {"seed": 3, "position": 5} if rule == "coupled" else KEY
    lenience = Lenience("ensemble", 0.5) if rule == "lenient" else None
    return verify(target, draft, rule=rule, lenience=lenience, check=check, **key, **how)


@pytest.mark.usefixtures("implementation")
def test_honest_drafts_pass():
    makers = list(honest())
    for i, make in enumerate(makers[:: sized(1, interpreted=8)]):
        torch.manual_seed(i)
        with use_backend("reference" if is_slow() else requested(None)):
            draft = make()
        rule = RULES[i % len(RULES)]
        have = checked(draft, rule)
        assert not have.status.any(), (i, rule)
        assert_same(have, checked(draft, rule, check=False))


# --- records that are not those of their logits ---

Change = Callable[[torch.Tensor, int], torch.Tensor]


def changed(change: Change) -> Callable[[Draft], Draft]:
    """The logits of token (1, 2) are changed in place."""

    def damage(draft: Draft) -> Draft:
        row = draft.logits[K + 2]
        row.copy_(change(row.clone(), int(draft.tokens[1, 2])))
        return draft

    return damage


def mistaken(**fields: float) -> Callable[[Draft], Draft]:
    """The record of token (1, 2) has other fields."""

    def damage(draft: Draft) -> Draft:
        for name, value in fields.items():
            getattr(draft.distribution, name)[K + 2] = value
        return draft

    return damage


def moved(draft: Draft, order: torch.Tensor) -> Draft:
    """Records of other rows."""
    return draft._replace(distribution=RowDistribution(*(f[order] for f in draft.distribution)))


def with_more(row: torch.Tensor, x: int) -> torch.Tensor:
    row[x] += 0.01
    return row


def with_less(row: torch.Tensor, x: int) -> torch.Tensor:
    """Another token is left out."""
    return row.index_fill(0, torch.tensor((x + 1) % V), NEVER)


def without(row: torch.Tensor, x: int) -> torch.Tensor:
    return row.index_fill(0, torch.tensor(x), NEVER)


def other_tokens(draft: Draft) -> Draft:
    return draft._replace(tokens=(draft.tokens + 1) % V)


RECORD, DRAFT = int(Status.RECORD), int(Status.DRAFT)
ROWS = torch.arange(B * K)
EXCHANGED = ROWS.view(B, K)[[0, 2, 1]].flatten()
GREEDY = {"temperature": 0.0}
ONE, BOTH, ALL = [0, RECORD, 0], [0, RECORD, RECORD], [RECORD] * 3
# how tokens are drawn, what is done to their draft, and the statuses that it gets
MISTAKES = {
    "one logit more": ({}, changed(with_more), ONE),
    "one logit gone": ({}, changed(with_less), ONE),
    "scaled": ({}, changed(lambda row, x: row / 0.9), ONE),
    "softmaxed": ({}, changed(lambda row, x: row.softmax(-1)), ONE),
    "broken": ({}, changed(lambda row, x: row * float("nan")), [0, DRAFT, 0]),
    "without its token": ({}, changed(without), [0, DRAFT, 0]),
    "greedy, permuted": (GREEDY, changed(lambda row, x: row.roll(1)), ONE),
    "greedy, scaled": (GREEDY, changed(lambda row, x: row / 0.9), ONE),
    "logits of two sequences exchanged": (
        {},
        lambda draft: draft._replace(logits=draft.logits[EXCHANGED]),
        BOTH,
    ),
    "records of two sequences exchanged": ({}, lambda draft: moved(draft, EXCHANGED), BOTH),
    "records of the rows before": ({}, lambda draft: moved(draft, ROWS.roll(1)), ALL),
    "another scale": ({}, mistaken(scale=1.5), ONE),
    "a scale that is none": ({}, mistaken(scale=-1.4), ONE),
    "another largest logit": ({}, mistaken(max=20.0), ONE),
    "another total": ({}, mistaken(total=2**45), ONE),
    "another threshold": ({"top_k": 5}, mistaken(threshold=0), ONE),
    "no weight": ({"top_k": 1}, other_tokens, [DRAFT] * 3),
    "greedy, no weight": (GREEDY, other_tokens, [DRAFT] * 3),
}


def a_draft(**sampling) -> Draft:
    torch.manual_seed(2)
    pool = 2 * torch.randn(B * K, V)
    distribution = row_distribution(pool, **sampling, backend="reference")
    tokens = sample(pool, distribution, **KEY, backend="reference")
    return recorded_draft(tokens.view(B, K), pool, distribution)


@pytest.mark.usefixtures("implementation")
def test_mistakes_are_found():
    for name in list(MISTAKES)[:: sized(1, interpreted=9)]:
        find(*MISTAKES[name])


def find(sampling: dict, damage: Callable[[Draft], Draft], want: list[int]) -> None:
    draft = damage(a_draft(**sampling))
    have, good = checked(draft), torch.tensor(want) == 0
    assert have.status.tolist() == want
    for mine, unchecked in zip(have, checked(draft, check=False), strict=True):
        assert torch.equal(mine[good], unchecked[good])  # other sequences are as they were
    assert not have.accepted[~good].any() and not have.bias[~good].any()
    assert (have.emitted[~good] == -1).all()


def test_they_are_found_under_every_rule_and_in_memory_that_is_given():
    draft = changed(with_more)(a_draft())
    for rule in RULES:
        out = Verified(torch.ones(B).long(), torch.ones(B, K + 1).long(), torch.ones(B).int(),
                       torch.ones(B).double())  # fmt: skip
        assert checked(draft, rule, out=out) is out
        assert_same(out, checked(draft, rule))
        assert out.status.tolist() == ONE and checked(draft, rule, check=False).status.sum() == 0
        assert out.accepted[1] == out.bias[1] == 0 and (out.emitted[1] == -1).all()


def test_the_reason_is_told():
    message = "sequence 1 has no distribution: the distribution recorded for a drafted token is not"
    with pytest.raises(DistributionError, match=message):
        check_status(checked(changed(with_more)(a_draft())).status, "sequence")


def test_no_single_draft_shows_that_its_record_is_of_other_draws():
    """Each of these is the record of some draw: `check_drafter` compares many with their tokens."""
    draft = a_draft()
    for other in (
        draft._replace(distribution=row_distribution(draft.logits, 0.9)),
        draft._replace(rows=draft.rows.roll(1, 1)),
        changed(lambda row, x: row.roll(1))(draft),
    ):
        assert not checked(other).status.any()


@pytest.mark.parametrize("value, want", [("1", ONE), ("0", [0, 0, 0]), ("", [0, 0, 0])])
def test_all_calls_are_checked_on_request(value, want, monkeypatch):
    draft = changed(with_more)(a_draft())
    monkeypatch.setenv("SPECDIFF_CHECK", value)
    try:
        importlib.reload(record_check)
        assert checked(draft, check=False).status.tolist() == want
    finally:
        monkeypatch.undo()
        importlib.reload(record_check)
    assert not checked(draft, check=False).status.any()


def test_compiled_code_checks_too():
    torch._dynamo.reset()
    compiled = torch.compile(verify, fullgraph=True, backend="eager")
    have = compiled(torch.zeros(B, K + 1, V), changed(with_more)(a_draft()), check=True, **KEY)
    assert have.status.tolist() == ONE
