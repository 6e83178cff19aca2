"""Arguments of the loop: prompts, counts and keywords, and the errors that answer mistakes."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Sequence
from functools import wraps
from numbers import Integral
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

from torch import Tensor

if TYPE_CHECKING:
    from .target import Target

Prompts = Tensor | Sequence[int] | Sequence[Sequence[int]]
P = ParamSpec("P")
R = TypeVar("R")

ELSEWHERE = {  # keywords of other packages, and what stands for them here
    "do_sample": "sampling=Sampling(temperature=1.0); without it decoding is greedy",
    "temperature": "sampling=Sampling(temperature=...)",
    "top_k": "sampling=Sampling(temperature=..., top_k=...)",
    "top_p": "sampling=Sampling(temperature=..., top_p=...)",
    "min_p": "sampling=Sampling(temperature=..., min_p=...)",
    "max_length": "max_new_tokens=..., which does not count the prompt",
    "max_tokens": "max_new_tokens=...",
    "eos_token_id": "stop_tokens=[...]",
    "stop": "stop_strings=[...]",
    "assistant_model": "drafter=specdiff.drafters.Autoregressive(model)",
    "num_assistant_tokens": "k=...",
    "num_speculative_tokens": "k=...",
    "prompt_lookup_num_tokens": "drafter=specdiff.drafters.PromptLookup() and k=...",
}


def answered(function: Callable[P, R]) -> Callable[P, R]:
    """Have a function say what it takes, if it is given a keyword that it does not have."""
    parameters = inspect.signature(function).parameters
    known = [name for name, one in parameters.items() if one.kind is not one.POSITIONAL_ONLY]

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        for name in kwargs:
            if name not in known:
                said = way_out(name, [one for one in known if one != "self"])
                raise TypeError(f"{function.__qualname__}() has no {name!r}: {said}")
        return function(*args, **kwargs)

    return call


def way_out(name: str, known: Sequence[str]) -> str:
    """What to pass in place of a keyword that a function does not have."""
    there = ELSEWHERE.get(name)
    if there is not None and there.split("=")[0] in known:
        return f"pass {there}"
    if close := difflib.get_close_matches(name, known, n=1):
        return f"did you mean {close[0]!r}?"
    return f"it takes {', '.join(known)}"


def whole_number(name: str, given: Any, least: int, most: int | None = None, why: str = "") -> int:
    """A number from `least` to `most`, as an int.

    Args:
        why: stands in messages behind what was expected, such as ", the target's context".

    Raises:
        TypeError, ValueError: it is none, or lies outside.
    """
    if not isinstance(given, Integral) or isinstance(given, bool):
        raise TypeError(f"{name} must be an integer, got {given!r}")
    number = int(given)
    if number < least or (most is not None and number > most):
        wanted = f"at least {least}" if most is None else f"in [{least}, {most}]"
        raise ValueError(f"{name} must be {wanted}{why}, got {number}")
    return number


def as_rows(prompts: Prompts) -> list[list[int]]:
    """One prompt or a batch of them, as tensors or sequences of ids -> lists of ints.

    Raises:
        TypeError: something else.
    """
    rows: Any = prompts.tolist() if isinstance(prompts, Tensor) else prompts
    text = isinstance(rows, str)
    if text or (isinstance(rows, Sequence) and any(isinstance(row, str) for row in rows)):
        raise TypeError(
            f"prompts must be token ids, got text, {prompts!r}: encode it, as by "
            "target.tokenizer(text).input_ids"
        )
    try:
        if len(rows) and isinstance(rows[0], Integral):
            rows = [rows]
        return [[ids_only(token) for token in row] for row in rows]
    except (TypeError, KeyError, IndexError) as error:
        shape = f" of shape {list(prompts.shape)}" if isinstance(prompts, Tensor) else ""
        raise TypeError(
            "prompts must be token ids, one prompt or a batch of prompts, got "
            f"{type(prompts).__name__}{shape} ({error}); of a tokenizer's output, pass `input_ids`"
        ) from error


def ids_only(token: Any) -> int:
    if not isinstance(token, Integral):
        raise TypeError(f"{token!r} is no token id")
    return int(token)


def check_prompts(target: Target, prompts: list[list[int]], max_new_tokens: Any) -> None:
    """Raise unless the target can read these prompts and add a token to each."""
    whole_number("max_new_tokens", max_new_tokens, 1)
    if not prompts:
        raise ValueError("prompts must hold at least one prompt, got none")
    for b, row in enumerate(prompts):
        if not row:
            raise ValueError(f"prompt {b} is empty: give it at least one token, such as the bos")
        if min(row) < 0 or max(row) >= target.vocab_size:
            raise ValueError(
                f"prompt {b} has ids from {min(row)} to {max(row)}, outside the target's "
                f"vocabulary [0, {target.vocab_size}): was it made with another tokenizer?"
            )
        if len(row) >= target.context_limit:
            raise ValueError(
                f"prompt {b} has {len(row)} tokens and leaves no room in the target's context of "
                f"{target.context_limit}: shorten it"
            )


def per_prompt(name: str, given: Any, kinds: tuple[type, ...], n: int) -> list[Any]:
    """A value for each of n prompts: the same one, or a sequence of n."""
    several = isinstance(given, Sequence) and not isinstance(given, (str, *kinds))
    each = list(given) if several else [given] * n
    if len(each) != n:
        raise ValueError(
            f"{name} must be one value or one for each of {n} prompts, got {len(each)}"
        )
    for one in each:
        if not isinstance(one, kinds):
            expected = " or ".join(kind.__name__ for kind in kinds)
            raise TypeError(f"{name} must be of type {expected}, or a sequence, got {one!r}")
    return each


def token_ids(name: str, given: Any) -> tuple[int, ...]:
    """Token ids that end a text."""
    if isinstance(given, Tensor):
        given = given.tolist()
    if isinstance(given, (str, Integral)) or not all(isinstance(one, Integral) for one in given):
        raise TypeError(f"{name} must be a sequence of token ids, such as [2], got {given!r}")
    return tuple(int(one) for one in given)


def strings(name: str, given: str | Sequence[str] | None) -> list[str]:
    """One string, several or none, as a list."""
    found = [given] if isinstance(given, str) else list(given or ())
    if not all(isinstance(string, str) and string for string in found):
        raise ValueError(f"{name} must be strings that are not empty, got {given!r}")
    return found
