"""Which lenience may be asked for: the one place that decides it."""

from __future__ import annotations

from numbers import Real

from torch import Tensor

from .types import KINDS, Lenience


def check_lenience(rule: str, lenience: Lenience | None) -> None:
    """Raise unless the rule is "lenient" and a lenience is given, or neither is so.

    Args:
        rule: one of RULES.
        lenience: a tensor's entries are checked by the op, through each row's status.

    Raises:
        ValueError, TypeError: the message names both.

    Example:
        >>> check_lenience("lenient", Lenience("ensemble", 0.9))
    """
    if lenience is None:
        if rule == "lenient":
            raise ValueError(
                "lenience: rule 'lenient' needs one, got None; pass lenience=Lenience(kind, "
                "amount), or rule='token' for the target's own distribution"
            )
        return
    if rule != "lenient":
        raise ValueError(
            f"lenience: only rule 'lenient' takes one, got {lenience!r} under rule {rule!r}; leave "
            "it, or pass rule='lenient'"
        )
    if not isinstance(lenience, Lenience):
        raise TypeError(f"lenience: expected a Lenience, got {type(lenience).__name__}")
    if lenience.kind not in tuple(KINDS):
        raise ValueError(
            f"lenience.kind: expected one of {', '.join(KINDS)}, got {lenience.kind!r}"
        )
    allowed, test = KINDS[lenience.kind]
    amount = lenience.amount
    if not isinstance(amount, Tensor) and not (isinstance(amount, Real) and test(amount)):
        raise ValueError(
            f"lenience.amount: expected {allowed} for {lenience.kind!r}, got {amount!r}"
        )
