"""Times drafting and verifying K tokens: one thread, fp32 logits, temperature 1.

Each shape has two groups. In "verify" the tokens and the draft's distribution are given, in the
form that the contender's function takes. "draft + verify" starts from both models' logits. Each
round of a timing runs through the same DRAWS drafts, which averages over the position of the first
rejection.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import GROUPS, OpRecord, Report
from inputs import DRAWS, SHAPES, Inputs, accepted_moments, make_inputs
from peers import CONTENDERS, Contender, Cpp, Reference, Unusable

SECONDS = 2.0  # for each timing, unless one call takes longer
GATE_DEVIATIONS = 4.5  # probability of a false alarm: 7e-6
GATE_BATCH = 4  # sequences compared with the reference


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def inputs(request: pytest.FixtureRequest) -> Inputs:
    torch.set_num_threads(1)
    torch.manual_seed(0)
    return make_inputs(request.param)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("kind", CONTENDERS, ids=lambda kind: kind.name)
def test_speed(
    inputs: Inputs, group: str, kind: type[Contender], benchmark: Any, report: Report
) -> None:
    benchmark.group = f"{inputs.shape}: {group}"
    try:
        contender = kind(inputs.shape)
    except Unusable as reason:
        report.unusable[kind.name, inputs.shape] = str(reason)
        pytest.skip(str(reason))
    check_bits(contender, inputs)
    calls = Calls(contender, inputs, group)
    start = time.perf_counter()
    calls()
    once = time.perf_counter() - start
    iterations = DRAWS if once * DRAWS < SECONDS else 1
    rounds = max(3 if once < SECONDS else 1, min(200, round(SECONDS / (once * iterations))))
    benchmark.pedantic(calls, iterations=iterations, rounds=rounds)
    calls.check()
    check_bits(contender, inputs)

    seconds = benchmark.stats.stats.median
    record = OpRecord(inputs.shape, group, contender.name, seconds)
    if isinstance(contender, Cpp):
        record.extra.update(bytes_model(inputs, group, seconds))
    benchmark.extra_info.update(record.extra)
    report.records.append(record)


def test_bandwidth(inputs: Inputs, benchmark: Any, report: Report) -> None:
    """Upper bounds: torch sums and copies the target's logits on the same thread."""
    benchmark.group = f"{inputs.shape}: bandwidth"
    logits = inputs.target_logits
    copy = torch.empty_like(logits)
    benchmark.pedantic(logits.sum, iterations=5, rounds=20, warmup_rounds=1)
    size = logits.numel() * logits.element_size()
    copied = median_time(lambda: copy.copy_(logits))
    report.bandwidth[inputs.shape] = {
        "sum_gb_per_s": size / benchmark.stats.stats.median / 1e9,
        "copy_gb_per_s": 2 * size / copied / 1e9,
    }
    benchmark.extra_info.update(report.bandwidth[inputs.shape])


class Calls:
    """The timed calls. All results are kept, and `check` checks them."""

    def __init__(self, contender: Contender, inputs: Inputs, group: str) -> None:
        self.contender = contender
        self.inputs = inputs
        self.given = contender.distribution(inputs.draft_logits) if group == "verify" else None
        self.results: list[Any] = []

    def __call__(self) -> None:
        number = len(self.results)
        if self.given is not None:
            tokens, distribution = self.inputs.tokens[number % DRAWS], self.given
        else:
            tokens, distribution = self.contender.draft(self.inputs.draft_logits, number)
        self.results.append(
            self.contender.verify(self.inputs.target_logits, tokens, distribution, number)
        )

    def check(self) -> None:
        """Check the mean number of accepted tokens over all calls against its exact value."""
        B, K, V = self.inputs.shape
        outcomes = [self.contender.outcome(result) for result in self.results]
        accepted = torch.tensor([outcome.accepted for outcome in outcomes])  # [calls, B]
        last = torch.tensor([outcome.last for outcome in outcomes])
        assert accepted.shape == last.shape == (len(outcomes), B)
        assert ((accepted >= 0) & (accepted <= K) & (last >= 0) & (last < V)).all()

        draws = torch.arange(len(outcomes)) % DRAWS
        given = self.given is not None
        chances = self.inputs.chances[draws] if given else self.inputs.acceptance.expand(
            len(outcomes), B, K
        )  # fmt: skip
        mean, variance = accepted_moments(chances)
        allowed = GATE_DEVIATIONS * variance.sum().sqrt() / accepted.numel()
        error = accepted.double().mean() - mean.mean()
        assert error.abs() < allowed, (
            f"{self.contender.name} accepted {accepted.double().mean():.3f} tokens a round; "
            f"by the exact distribution it is {mean.mean():.3f} +- {allowed:.3f}"
        )


def check_bits(contender: Contender, inputs: Inputs) -> None:
    """Check that cpp drafts and verifies like the reference, bit for bit."""
    if not isinstance(contender, Cpp):
        return
    B = min(inputs.shape.batch, GATE_BATCH)
    shape = inputs.shape._replace(batch=B)
    target, drafted = inputs.target_logits[:B], inputs.draft_logits[:B]
    cpp, reference = Cpp(shape), Reference(shape)
    for number in range(GATE_BATCH // B):
        tokens, distribution = cpp.draft(drafted, number)
        expected_tokens, expected_distribution = reference.draft(drafted, number)
        result = cpp.verify(target, tokens, distribution, number)
        expected = reference.verify(target, tokens, expected_distribution, number)
        ours = (tokens, *distribution[1], *result)
        wanted = (expected_tokens, *expected_distribution[1], *expected)
        same = all(torch.equal(a, b) for a, b in zip(ours, wanted, strict=True))
        assert same, f"cpp and reference differ at {shape}"


def bytes_model(inputs: Inputs, group: str, seconds: float) -> dict[str, float]:
    """Least bytes of logits that an exact verifier must read, given its mean stopping position.

    A row's normaliser requires the whole row. So a verifier reads the target's rows of the accepted
    tokens and one more, and the draft's row at a rejection. Sampling reads all rows of the draft.
    `all_rows_mb` is for a verifier that reads all rows of both models.
    """
    B, K, V = inputs.shape
    row = 4 * V
    accepted = accepted_moments(inputs.acceptance)[0].mean().item()
    rejected = 1 - inputs.acceptance.prod(-1).mean().item()
    drafted = K if group != "verify" else 0
    least = B * row * (1 + accepted + rejected + drafted)
    return {
        "expected_accepted": accepted,
        "least_mb": least / 1e6,
        "all_rows_mb": B * row * (2 * K + 1) / 1e6,
        "least_gb_per_s": least / seconds / 1e9,
    }


def median_time(function: Callable[[], object], rounds: int = 20) -> float:
    times = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return sorted(times)[rounds // 2]
