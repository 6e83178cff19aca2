"""Which recorded distributions count: what is chosen, what is refused and why, and what `verify`
does."""

from __future__ import annotations

import itertools

import pytest
import torch

from specdiff_kernels import RECORDS, RULES, Draft, Record, choose_record, row_distribution, verify

from .helpers import LAST_WORD, assert_same, one_hot_draft
from .interpreter import sized

JUDGING = ("token", "block")  # the rules that look at q

# --- the choice ---

STEP = "names no final_step"
VALUES = "sampled values decided"
KEPT = "tokens kept after a rejection"
FORGOTTEN = "exact only if the drafter keeps"
TIED = {  # rules under which kept tokens cannot be judged by their records
    "block": "the block rule lets later tokens decide on earlier ones",
    "lenient": "the lenient rule ties what is kept to what was emitted",
}

# value_dependent, final_step, entangled -> what the token rule and those of TIED choose, and why
# "final", "running-max" and "entangled" would bias the output; "one-hot" never does
TABLE = {
    (False, None, False): ("running-max", "running-max", STEP, None, FORGOTTEN),
    (False, 3, False): ("running-max", "running-max", None, None, FORGOTTEN),
    (False, None, True): ("entangled", "one-hot", STEP, KEPT, None),
    (False, 3, True): ("entangled", "final", None, KEPT, None),
    (True, None, False): ("one-hot", "one-hot", STEP, VALUES, FORGOTTEN),
    (True, 3, False): ("final", "final", None, VALUES, FORGOTTEN),
    (True, None, True): ("one-hot", "one-hot", STEP, VALUES, VALUES),
    (True, 3, True): ("final", "final", None, VALUES, VALUES),
}


def strongest(kind: tuple, rule: str) -> str:
    token, tied, *_ = TABLE[kind]
    return {"token": token, "block": tied, "lenient": tied}.get(rule, "one-hot")


def reason(kind: tuple, rule: str, record: str) -> str | None:
    """A fragment of why a record is refused; None if it is legal."""
    _, _, final, running_max, entangled = TABLE[kind]
    if rule in TIED and record == "entangled" and entangled is None:
        return TIED[rule]
    return {"final": final, "running-max": running_max, "entangled": entangled}.get(record)


def fields(kind: tuple) -> dict:
    return dict(zip(("value_dependent", "final_step", "entangled"), kind, strict=True))


def draft_of(*kind) -> Draft:
    return one_hot_draft(torch.zeros(0, 0, dtype=torch.int64), **fields(kind))


CASES = list(itertools.product(TABLE, ("token", "block", "greedy", "lenient"), RECORDS))
LEGAL = [case for case in CASES if reason(*case) is None]
REFUSED = [case for case in CASES if reason(*case) is not None]


def test_the_table_is_complete():
    assert set(TABLE) == set(itertools.product((False, True), (None, 3), (False, True)))
    assert {rule for _, rule, _ in CASES} | {"coupled"} == set(RULES)
    assert set(RECORDS) == {"one-hot", "final", "running-max", "entangled"}


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", TABLE, ids=str)
def test_the_strongest_legal_record_is_the_default(kind, rule):
    assert choose_record(draft_of(*kind), rule, None) is RECORDS[strongest(kind, rule)]


@pytest.mark.parametrize(("kind", "rule", "record"), LEGAL, ids=str)
def test_a_legal_record_is_what_comes_out(kind, rule, record):
    assert choose_record(draft_of(*kind), rule, record) is RECORDS[record]


@pytest.mark.parametrize(("kind", "rule", "record"), REFUSED, ids=str)
def test_a_refusal_says_why_and_what_to_use(kind, rule, record):
    message = f"'{record}' would bias the output: .*{reason(kind, rule, record)}"
    with pytest.raises(ValueError, match=f"{message}.*; use '{strongest(kind, rule)}'$"):
        choose_record(draft_of(*kind), rule, record)


@pytest.mark.parametrize("kind", TABLE, ids=str)
@pytest.mark.parametrize("record", RECORDS)
def test_the_coupled_rule_takes_no_record(kind, record):
    with pytest.raises(ValueError, match=f"compares tokens and uses no q, got '{record}'"):
        choose_record(draft_of(*kind), "coupled", record)


@pytest.mark.parametrize(
    ("rule", "record", "message"),
    [
        (
            "tokens",
            None,
            "rule: expected one of token, block, greedy, coupled, lenient, got 'tokens'",
        ),
        ("token", "max", "record: expected one of one-hot, final, running-max, entangled, got"),
        ("coupled", "max", "record: expected one of"),
        ("greedy", "RUNNING_MAX", "record: expected one of"),
    ],
)
def test_unknown_names(rule, record, message):
    with pytest.raises(ValueError, match=message):
        choose_record(draft_of(False, 3, False), rule, record)


# --- what verify does with it ---

K, V, LAST = 4, 6, 3
on_every_backend = pytest.mark.usefixtures("implementation")


def a_round(**how) -> tuple[torch.Tensor, Draft, dict]:
    """Target logits, a ragged draft of random steps with some positions unrecorded, and words."""
    torch.manual_seed(0)
    B = sized(48, interpreted=14)
    target, pool = torch.randn(B, K + 1, V), torch.randn(B * K, V)
    rows = torch.arange(B * K).view(B, K)
    draft = Draft(
        tokens=torch.randint(V, (B, K)),
        tau=torch.randint(-1, LAST + 2, (B, K)).int(),
        rows=rows.where(torch.rand(B, K) < 0.9, -1),
        logits=pool,
        distribution=row_distribution(pool),
        lengths=torch.randint(2, K + 1, (B,)),
        **how,
    )
    return target, draft, {"words": torch.randint(-(2**63), 2**63 - 1, (B, K + 1))}


def judged_at(draft: Draft, counts: torch.Tensor) -> Draft:
    """A one-step draft, whose records all count, recorded where `counts` alone."""
    return draft._replace(
        tau=torch.zeros_like(draft.tau),
        rows=draft.rows.where(counts, -1),
        value_dependent=False,
        entangled=False,
    )


def by_definition(draft: Draft, record: str) -> torch.Tensor:
    """Where a record counts, written out."""
    tau = draft.tau.tolist()
    counts = {
        "one-hot": lambda row, i: False,
        "final": lambda row, i: row[i] == LAST,
        "running-max": lambda row, i: all(row[i] >= earlier for earlier in row[:i]),
        "entangled": lambda row, i: True,
    }[record]
    return torch.tensor([[counts(row, i) for i in range(K)] for row in tau])


@on_every_backend
@pytest.mark.parametrize(
    ("rule", "record"),
    [case for case in itertools.product(JUDGING, RECORDS) if case != ("block", "entangled")],
)
def test_a_record_counts_where_it_is_defined_to(rule, record):
    target, draft, random = a_round(final_step=LAST, entangled=record == "entangled")
    by_hand = judged_at(draft, by_definition(draft, record))
    want = verify(target, by_hand, rule=rule, record="running-max", **random)
    assert_same(verify(target, draft, rule=rule, record=record, **random), want)
    for other in set(RECORDS) - {record}:  # it matters which
        changed = judged_at(draft, by_definition(draft, other))
        result = verify(target, changed, rule=rule, **random)
        assert not torch.equal(result.accepted, want.accepted)


@on_every_backend
@pytest.mark.parametrize("rule", JUDGING)
@pytest.mark.parametrize("kind", TABLE, ids=str)
def test_verify_takes_the_strongest_unless_told(kind, rule):
    target, draft, random = a_round(**fields(kind))
    record = strongest(kind, rule)
    want = verify(target, judged_at(draft, by_definition(draft, record)), rule=rule, **random)
    assert_same(verify(target, draft, rule=rule, **random), want)


@on_every_backend
@pytest.mark.parametrize("rule", JUDGING)
@pytest.mark.parametrize("record", ["one-hot", "final"])
def test_rows_that_do_not_count_are_not_read(rule, record):
    """A row number out of range is no fault there, and neither is a distribution without the
    token."""
    target, draft, random = a_round(final_step=LAST)
    want = verify(target, draft, rule=rule, record=record, **random)
    assert not want.status.any()
    counts = by_definition(draft, record)
    lost = draft._replace(rows=draft.rows.where(counts, 10**6))
    assert_same(verify(target, lost, rule=rule, record=record, **random), want)
    pool, rows = draft.logits.clone(), draft.rows[~counts & (draft.rows >= 0)]
    pool[rows, draft.tokens.flatten()[rows]] = -torch.inf  # position b K + i has row b K + i
    weightless = draft._replace(logits=pool, distribution=row_distribution(pool))
    assert_same(verify(target, weightless, rule=rule, record=record, **random), want)
    assert verify(target, lost, rule=rule, record="running-max", **random).status.any()


@on_every_backend
def test_the_greedy_rule_and_the_coupled_rule_ignore_records():
    target, draft, random = a_round(final_step=LAST)
    draft.tokens[:, :2] = target[:, :2].argmax(-1)  # so that something is accepted
    bare = one_hot_draft(draft.tokens, lengths=draft.lengths)
    want = verify(target, bare, rule="greedy", **random)
    assert want.accepted.any()
    for record in (None, "one-hot", "final", "running-max"):
        assert_same(verify(target, draft, rule="greedy", record=record, **random), want)
    kept = draft._replace(entangled=True)
    assert_same(verify(target, kept, rule="greedy", record="entangled", **random), want)
    noise = {"words": torch.randint(-(2**63), 2**63 - 1, (len(target), K + 1, V))}
    want = verify(target, bare, rule="coupled", **noise)
    for changed in (draft, kept, draft._replace(rows=draft.rows + 10**6)):
        assert_same(verify(target, changed, rule="coupled", **noise), want)


@pytest.mark.parametrize("rule", JUDGING)
def test_verify_refuses_too(rule):
    target, draft, random = a_round(value_dependent=True)
    for record, why in (("final", STEP), ("running-max", VALUES), ("entangled", FORGOTTEN)):
        with pytest.raises(ValueError, match=why):
            verify(target, draft, rule=rule, record=record, **random)


@on_every_backend
def test_an_earlier_step_behind_a_later_one_is_judged_as_one_hot():
    """tau = 1, 0, 1, 2: with q = p and the largest u, only a bare guess can be rejected."""
    torch.manual_seed(1)
    target = torch.randn(1, 5, V)
    pool = target[0, :4].clone()
    tau = torch.tensor([[1, 0, 1, 2]]).int()
    tokens, rows = torch.tensor([[1, 2, 3, 4]]), torch.arange(4)[None]
    draft = Draft(tokens, tau, rows, pool, row_distribution(pool), final_step=2)
    words = torch.full((1, 5), LAST_WORD)

    def accepted(at: int, record: str) -> int:
        """How many of the tokens from `at` on are accepted."""
        cut = draft._replace(tokens=tokens[:, at:], tau=tau[:, at:], rows=rows[:, at:])
        return verify(target[:, at:], cut, record=record, words=words[:, at:]).accepted.item()

    assert [accepted(at, "running-max") for at in range(4)] == [1, 3, 2, 1]
    assert [accepted(at, "final") for at in range(4)] == [0, 0, 0, 1]
    assert [accepted(at, "one-hot") for at in range(4)] == [0, 0, 0, 0]
    kept = draft._replace(entangled=True)
    assert verify(target, kept, record="entangled", words=words).accepted.item() == 4


def test_coupled_drafts_are_bare_guesses_to_the_other_rules():
    """Their noise is that of their positions, which earlier rounds have seen."""
    draft = Draft.masked(1, 2, torch.zeros(2, 5))._replace(coupled=True, final_step=0)
    for rule in ("token", "block", "greedy", "coupled"):
        assert choose_record(draft, rule, None) is Record.ONE_HOT
    for record in ("running-max", "final"):
        with pytest.raises(ValueError, match=r"noise that is never drawn anew.* use 'one-hot'"):
            choose_record(draft, "token", record)
    key = {name: torch.zeros(1, dtype=torch.int64) for name in ("seed", "round", "position")}
    with pytest.raises(ValueError, match="position: only the coupled rule takes one"):
        verify(torch.zeros(1, 3, 5), draft, **key)
