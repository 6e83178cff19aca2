"""Does a verifier leave the target's distribution as it was? A test for anybody's, ours included.

    from specdiff_kernels.testing import check_verifier

    def verify(draft: Drafted) -> Outcome: ...        # calls your own code

    print(check_verifier(verify))

A draft of two tokens over a vocabulary of three is verified some ten thousand times in worlds whose
every outcome can be counted by hand. What comes back is compared with the exact distribution by
Pearson's chi-squared: the text (lossless, whatever the rule), and the pair of accepted count and
tokens (the rule of Leviathan et al., Chen et al.). `MUTANTS` are verifiers with one known mistake
each, and `power` says how often a number of draws finds them. Noise of few bits shows only in the
worlds with a long tail. `check_drafter` compares a drafter's tokens with the distributions that it
records.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from . import tails
from .answers import integers, outcome_of, require_some
from .comparison import Finding, Report, compare
from .drafters import check_drafter
from .mutants import MUTANTS, Outcome, Verifier, fp32_gumbel, token_rule
from .worlds import CASES, NEVER, Case, Distribution, Drafted, K, Sampler, Text, V

__all__ = [
    "CASES",
    "MUTANTS",
    "Case",
    "Drafted",
    "Finding",
    "Outcome",
    "Report",
    "Sampler",
    "Verifier",
    "check_drafter",
    "check_sampler",
    "check_verifier",
    "fp32_gumbel",
    "power",
    "token_rule",
    "zero_uniforms",
]


def softmax_sample(logits: Tensor) -> Tensor:
    """One token of each row's softmax. [N, V] -> [N]"""
    return torch.multinomial(logits.softmax(-1), 1)[:, 0]


def check_verifier(
    verify: Verifier,
    sample: Sampler = softmax_sample,
    *,
    draws: int = 20_000,
    batch: int | None = None,
    rule: str | None = "token",
    alarm: float = 1e-6,
    cases: Sequence[Case] = CASES,
    tail: int = 0,
) -> Report:
    """Compare a verifier's outcomes with their exact distributions.

    Args:
        verify: called with drafts of `batch` rows, makes its own random choices.
        sample: draws the drafts; pass your own where it shares a generator with `verify`, since
            noise that both use biases the text.
        draws: drafts verified in each case.
        batch: rows of a call; None: all. A verifier of one sequence at a time wants 1.
        rule: "token" to hold accepted counts to that rule as well, None for the text alone, which
            is what another lossless rule is to be held to.
        alarm: a p value below it is a failure, which an exact verifier meets about once in
            1 / alarm comparisons.
        cases: the worlds. `CASES[:3]` for a verifier that is never given drafts in another order
            than from left to right, and so does not ask for `Drafted.recorded`.

    Returns:
        For each case a finding "text": the emitted tokens, continued by the target to K + 1, follow
        the target's distribution (Leviathan et al. 2023, Appendix A.1). With a rule also one
        "outcome". Last "u = 0": with every uniform number 0, no impossible token is emitted. That
        means nothing for a verifier with a generator of its own that does not look at
        `Drafted.zero`. In worlds with a long tail "tail", "low ids" and "high ids", of the token
        that replaces a drafted one and of the token behind a whole draft.

    Raises:
        ValueError, TypeError: an outcome that is none: a count outside 0 .. K, a token outside
            0 .. V - 1, numbers that are no integers; a rule that is not known; no draws.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> check_verifier(token_rule).passed, check_verifier(MUTANTS["u = 0"]).passed
        (True, False)
    """
    if rule not in ("token", None):
        raise ValueError(f"rule: expected 'token' or None, got {rule!r}")
    require_some("draws", draws)
    if batch is not None:
        require_some("batch", batch)
    findings = []
    for case in cases:
        draft, outcome = _outcomes(case, verify, sample, draws, batch)
        texts = _completed(case, draft, outcome)
        findings.append(compare(case.name, "text", texts, case.text_distribution()))
        if rule is not None:
            outcomes = [
                (a, *text[: a + 1])
                for a, text in zip(outcome.accepted.tolist(), texts, strict=True)
            ]
            findings.append(compare(case.name, "outcome", outcomes, case.outcome_distribution()))
        if (forced := _forced_zero(case, verify, batch)) is not None:
            findings.append(forced)
    if tail:
        require_some("tail", tail)
        findings += tails.verifier_findings(verify, tail, batch)
    return Report(tuple(findings), draws, alarm)


def check_sampler(
    sample: Sampler, *, draws: int = 100_000, alarm: float = 1e-6, tail: int = 0
) -> Report:
    """Compare the tokens of a sampler with the softmax of their logits.

    Args:
        sample: f32 logits [N, V] -> tokens [N], one of each row, by random choices of its own.
        draws: tokens of each row of logits; they come as N equal rows.
        alarm: as in `check_verifier`.
        tail: draws from a row of 131,072 logits, one of them 18 above all others; the others
            together have a chance of 0.2%. It comes 16 times in a call, in one memory. 16,384 draws
            find noise of 24 bits, such as `fp32_gumbel`'s, in 99 of 100 checks. 0: no such row.

    Returns:
        A finding "token" for each of five rows: random, peaked, with impossible tokens, far from 0,
        and of a single token. With a long tail three more, by the exact binomial test: how often it
        comes ("tail"), and with ids below and above the likely token ("low ids", "high ids").

    Raises:
        ValueError, TypeError: a token outside 0 .. V - 1 or that is no integer; no draws.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> check_sampler(lambda logits: logits.argmax(-1)).passed
        False
    """
    require_some("draws", draws)
    noise = torch.Generator().manual_seed(5)
    rows = {
        "random": torch.randn(7, generator=noise),
        "peaked": 4 * torch.randn(7, generator=noise),
        "impossible tokens": torch.tensor([0.5, NEVER, 0.0, NEVER, -1.0]),
        "far from 0": torch.tensor([9000.0, 9001.0, 8999.5]),
        "one token": torch.zeros(1),
    }
    findings = []
    for name, row in rows.items():
        tokens = sample(row.expand(draws, -1).contiguous())
        tokens = integers(tokens, "token", draws, len(row) - 1)
        distribution: Distribution = {
            (v,): p for v, p in enumerate(row.double().softmax(-1).tolist())
        }
        findings.append(compare(name, "token", [(t,) for t in tokens.tolist()], distribution))
    if tail:
        require_some("tail", tail)
        findings += tails.sampler_findings(sample, tail)
    return Report(tuple(findings), draws, alarm)


def power(
    verifiers: Mapping[str, Verifier] | None = None,
    *,
    draws: int = 20_000,
    repetitions: int = 10,
    alarm: float = 1e-6,
) -> dict[str, float]:
    """How often `check_verifier` finds each verifier's mistake; by default those of `MUTANTS`.

    Args:
        verifiers: by name; each is held to the token rule in every world.
        draws, alarm: as in `check_verifier`.
        repetitions: of the whole check.

    Returns:
        For each name the share of repetitions that failed.

    Raises:
        ValueError: no draws or repetitions.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> power({"u = 0": MUTANTS["u = 0"]}, draws=2000, repetitions=3)
        {'u = 0': 1.0}
    """
    require_some("draws", draws)
    require_some("repetitions", repetitions)
    return {
        name: sum(
            not check_verifier(verify, draws=draws, alarm=alarm).passed for _ in range(repetitions)
        )
        / repetitions
        for name, verify in (MUTANTS if verifiers is None else verifiers).items()
    }


@contextlib.contextmanager
def zero_uniforms() -> Iterator[None]:
    """While it lasts, uniform numbers that torch draws from Python are 0, as one in 2^24 is."""

    def zeros(*args: Any, **options: Any) -> Tensor:
        options.pop("generator", None)
        return torch.zeros(*args, **options)

    def zeros_like(tensor: Tensor, **options: Any) -> Tensor:
        options.pop("generator", None)
        return torch.zeros_like(tensor, **options)

    def fill(tensor: Tensor, low: float = 0.0, high: float = 1.0, **_: Any) -> Tensor:
        return tensor.fill_(low)

    with (
        mock.patch.object(torch, "rand", zeros),
        mock.patch.object(torch, "rand_like", zeros_like),
        mock.patch.object(Tensor, "uniform_", fill),
    ):
        yield


def _outcomes(
    case: Case, verify: Verifier, sample: Sampler, draws: int, batch: int | None
) -> tuple[Drafted, Outcome]:
    """So many drafts, and what became of them."""
    size = batch or draws
    drafted, results = [], []
    for start in range(0, draws, size):
        drafted.append(case.draw(min(size, draws - start), sample))
        results.append(outcome_of(verify, drafted[-1], V))
    tokens = torch.cat([part.tokens for part in drafted])
    return case.drafted(tokens), Outcome(*(torch.cat(f) for f in zip(*results, strict=True)))


def _completed(case: Case, draft: Drafted, outcome: Outcome) -> list[Text]:
    """The emitted tokens of each row, continued by the target to K + 1."""
    accepted, token = outcome
    text = torch.cat((draft.tokens, token[:, None]), 1)
    text.scatter_(1, accepted[:, None], token[:, None])
    for i in range(1, K + 1):
        behind = softmax_sample(case.rows(text[:, :K])[1][:, i])
        text[:, i] = torch.where(accepted < i, behind, text[:, i])
    return [tuple(row) for row in text.tolist()]


def _forced_zero(case: Case, verify: Verifier, batch: int | None) -> Finding | None:
    """Every draft with a token that the target cannot emit, verified with u = 0."""
    texts, impossible = [], []
    for text, _, _, p in case.drafts():
        if any(p[i, token] == 0 for i, token in enumerate(text)):
            texts.append(text)
            impossible.append(p == 0)
    if not texts:
        return None
    drafts = case.drafted(torch.tensor(texts))._replace(zero=True)
    with zero_uniforms():
        parts = [outcome_of(verify, part, V) for part in drafts.split(batch or len(texts))]
    accepted, token = (torch.cat(field) for field in zip(*parts, strict=True))
    emitted = torch.cat((drafts.tokens, token[:, None]), 1)
    emitted.scatter_(1, accepted[:, None], token[:, None])
    never = torch.stack(impossible).gather(2, emitted[..., None])[..., 0]  # [N, K + 1]
    wrong = (never & (torch.arange(K + 1) <= accepted[:, None])).any(1).double().mean().item()
    return Finding(case.name, "u = 0", 0.0 if wrong else 1.0, wrong)
