"""Which records of a draft may be used: the one place that decides it.

A recorded distribution q_i may judge x_i only if x_i still follows q_i given all that was decided
before it is examined. docs/losslessness.md has the argument and the enumeration for each of these.
"""

from __future__ import annotations

from enum import IntEnum

from .checks import kind_of
from .types import Draft

RULES = ("token", "block", "greedy", "coupled", "lenient")


class Record(IntEnum):
    """Where q counts as recorded; everywhere else the token is one-hot."""

    ONE_HOT = 0  # nowhere
    FINAL = 1  # where tau is the last scheduled step
    RUNNING_MAX = 2  # where no earlier position has a later tau
    ENTANGLED = 3  # everywhere


STRONGEST_FIRST = (Record.ENTANGLED, Record.RUNNING_MAX, Record.FINAL, Record.ONE_HOT)
RECORDS = {
    "one-hot": Record.ONE_HOT,
    "final": Record.FINAL,
    "running-max": Record.RUNNING_MAX,
    "entangled": Record.ENTANGLED,
}


def choose_record(draft: Draft, rule: str, record: str | None) -> Record:
    """How `verify` uses a draft's records under a rule.

    Args:
        draft: its `value_dependent`, `final_step`, `entangled` and `coupled` say how it came about.
        rule: one of RULES.
        record: one of RECORDS; None: the strongest that is legal.

    Raises:
        TypeError: no Draft.
        ValueError: an unknown name, or a combination whose output would not follow the target's
            distribution; the message says why.

    Example:
        >>> draft = Draft.masked(1, 4, torch.zeros(4, 9))._replace(value_dependent=True)
        >>> choose_record(draft, "token", None).name
        'ONE_HOT'
        >>> choose_record(draft._replace(final_step=3), "token", None).name
        'FINAL'
    """
    check_names(rule, record)
    if not isinstance(draft, Draft):
        raise TypeError(f"draft: expected a Draft, got {kind_of(draft)}")
    chosen = Record.ONE_HOT if rule in ("greedy", "coupled") else strongest(draft, rule)
    if record is None:
        return chosen
    reason = reason_against(RECORDS[record], draft, rule)
    if reason is not None:
        name = {value: key for key, value in RECORDS.items()}[chosen]
        raise ValueError(f"record: {record!r} would bias the output: {reason}; use {name!r}")
    return RECORDS[record]


def check_names(rule: str, record: str | None) -> None:
    """Raise ValueError unless some draft can be judged by this rule and record."""
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(RULES)}, got {rule!r}")
    if record is not None and record not in tuple(RECORDS):
        raise ValueError(f"record: expected one of {', '.join(RECORDS)}, got {record!r}")
    if rule == "coupled" and record is not None:
        raise ValueError(
            f"record: the coupled rule compares tokens and uses no q, got {record!r}; leave it"
        )


def strongest(draft: Draft, rule: str) -> Record:
    for record in STRONGEST_FIRST:
        if reason_against(record, draft, rule) is None:
            break
    return record


def reason_against(record: Record, draft: Draft, rule: str) -> str | None:
    """Why these records must not be used; None if they may."""
    if record is not Record.ONE_HOT and draft.coupled:
        return (
            "its tokens were drawn with noise that is never drawn anew, so that earlier rounds "
            "have seen it; the coupled rule is made for such drafts"
        )
    if record is Record.FINAL and draft.final_step is None:
        return "the draft names no final_step, so no position was sampled in the last scheduled one"
    if record is Record.RUNNING_MAX:
        if draft.value_dependent:
            return (
                "sampled values decided which positions were revealed, so that a value which is "
                "still there no longer follows the distribution it was drawn from"
            )
        if draft.entangled:
            return (
                "the draft holds tokens kept after a rejection, which follow their recorded "
                "distribution only if every draft is verified with q everywhere"
            )
    if record is Record.ENTANGLED:
        if not draft.entangled:
            return (
                "q everywhere is exact only if the drafter keeps, after a rejection, each later "
                "token that an examined one was conditioned on (Draft.entangled)"
            )
        if draft.value_dependent:
            return "sampled values decided which positions were revealed"
        if rule == "block":
            return (
                "the block rule lets later tokens decide on earlier ones, which ties what is kept "
                "to what was emitted"
            )
        if rule == "lenient":
            return (
                "the lenient rule ties what is kept to what was emitted, and would say that it "
                "spends less than it does"
            )
    return None
