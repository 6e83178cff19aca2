"""The distribution-conformance kit: its oracle, what it passes, and what it finds."""

from __future__ import annotations

from collections import defaultdict

import pytest
import torch

import specdiff_kernels as sk
from specdiff_kernels.testing import (
    CASES,
    MUTANTS,
    Drafted,
    Outcome,
    check_sampler,
    check_verifier,
    fp32_gumbel,
    power,
    token_rule,
    zero_uniforms,
)
from specdiff_kernels.testing.comparison import compare, compare_count, pooled
from specdiff_kernels.testing.worlds import NEVER


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def continued(case, distribution):
    """Chances of whole texts: outcomes, each continued by the target."""
    texts, chances = case.text_distribution(), defaultdict(float)
    for (accepted, *text), chance in distribution.items():
        begun = {t: p for t, p in texts.items() if t[: accepted + 1] == tuple(text) and p > 0}
        for whole, p in begun.items():
            chances[whole] += chance * p / sum(begun.values())
    return [chances[text] for text in texts]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_two_exact_distributions_agree(case):
    """The token rule is lossless, to 1e-12."""
    distribution = case.outcome_distribution()
    assert sum(distribution.values()) == pytest.approx(1, abs=1e-12)
    assert continued(case, distribution) == pytest.approx(
        list(case.text_distribution().values()), abs=1e-12
    )


def test_every_record_of_an_out_of_order_draft_would_bias_the_distribution():
    case = CASES[-1]
    assert case.recorded() == [True, False]
    distribution = continued(case, case._replace(steps=(0, 0)).outcome_distribution())
    gaps = [
        abs(a - b) for a, b in zip(distribution, case.text_distribution().values(), strict=True)
    ]
    assert max(gaps) > 1e-2


def test_the_control_passes():
    assert check_verifier(token_rule).passed


@pytest.mark.parametrize("batch", [1, 7])
def test_calls_may_be_small(batch):
    report = check_verifier(token_rule, draws=60, batch=batch)
    assert report.passed and report.draws == 60


@pytest.mark.parametrize("name", MUTANTS)
def test_mutants_fail(name):
    report = check_verifier(MUTANTS[name])
    assert not report.passed and "FAILED" in str(report)
    if name == "recorded q on an out-of-order draft":
        assert {f.case for f in report.failures()} == {"right to left"}
    if name == "non-strict accept":  # once in 2^24 draws, but for the forced 0
        assert {f.what for f in report.failures()} == {"u = 0"}


def test_power_is_a_share_of_repetitions():
    found = power({"right": token_rule, "wrong": MUTANTS["u = 0"]}, draws=1000, repetitions=2)
    assert found == {"right": 0.0, "wrong": 1.0}


def test_noise_shared_by_draft_and_verifier_is_found():
    """The last token is the inverse of u, and so is what replaces it, by the same u."""
    state = {}

    def inverse(weights):
        u = state["u"] * weights.sum(-1)
        return (weights.cumsum(-1) <= u[:, None]).sum(-1).clamp_max(2)

    def sample(logits):
        state["u"] = torch.rand(len(logits), dtype=torch.float64)
        return inverse(logits.double().softmax(-1))

    def verify(draft: Drafted) -> Outcome:
        accepted, token = token_rule(draft)
        p, q = draft.target_logits.double().softmax(-1), draft.draft_logits.double().softmax(-1)
        again = inverse((p[:, 1] - q[:, 1]).clamp_min(0))
        return Outcome(accepted, torch.where(accepted == 1, again, token))

    cases = CASES[:2]
    assert check_verifier(token_rule, sample, cases=cases).passed
    assert check_verifier(verify, sample, cases=cases).failures("text")


class Ours:
    """`row_distribution`, `sample` and `verify`, each call in a round of its own."""

    def __init__(self, rule: str, backend: str) -> None:
        self.rule, self.backend, self.round = rule, backend, 0

    def seeds(self, N):
        self.round += 1
        return {"seed": torch.arange(N), "round": torch.full((N,), self.round)}

    def sample(self, logits):
        distribution = sk.row_distribution(logits, backend=self.backend)
        return sk.sample(
            logits,
            distribution,
            **self.seeds(len(logits)),
            slot=torch.zeros(len(logits), dtype=torch.int64),
            backend=self.backend,
        )

    def verify(self, draft: Drafted) -> Outcome:
        N, K, V = draft.draft_logits.shape
        own = draft.draft_logits if draft.draft_logits.stride(0) else draft.draft_logits[:1]
        pool = own.reshape(-1, V)
        distribution = sk.row_distribution(pool, backend=self.backend)
        rows, tau = torch.arange(len(pool)).view(-1, K).expand(N, K), draft.steps.expand(N, K)
        zeros = {"words": torch.zeros(N, K + 1, dtype=torch.int64)}
        noise = zeros if draft.zero else self.seeds(N)
        result = sk.verify(
            draft.target_logits, sk.Draft(draft.tokens, tau, rows, pool, distribution),
            rule=self.rule, backend=self.backend, **noise,
        )  # fmt: skip
        sk.check_status(result.status)
        token = result.emitted.gather(1, result.accepted[:, None].long())[:, 0]
        return Outcome(result.accepted, token)


@pytest.mark.parametrize("backend", ["reference", "cpp"])
@pytest.mark.parametrize("rule", ["token", "block"])
def test_our_ops_conform(rule, backend):
    if reason := sk.available_backends()[backend]:
        pytest.skip(reason)
    ours = Ours(rule, backend)
    held_to = "token" if rule == "token" else None
    tail = 1024 if backend == "cpp" else 0
    assert check_verifier(ours.verify, ours.sample, rule=held_to, tail=tail).passed
    assert check_sampler(ours.sample, tail=8 * tail).passed


def test_the_block_rule_is_no_token_rule():
    """It accepts more, which the distribution of outcomes sees and the distribution of the text
    does not."""
    ours = Ours("block", "reference")
    report = check_verifier(ours.verify, ours.sample)
    assert report.failures("outcome") and not report.failures("text")


TAIL = {"cases": (), "tail": 16_384}


def shared(logits):
    """An exact sampler of equal rows."""
    return logits[0].double().softmax(-1).multinomial(len(logits), replacement=True)


def one_token(sample):
    """A verifier for drafts whose tokens all have to be rejected, or accepted."""

    def verify(draft: Drafted) -> Outcome:
        stands = draft.target_logits[0, 0, draft.tokens[0, 0]] > NEVER
        accepted = torch.full((len(draft.tokens),), 2 * stands)
        return Outcome(accepted, sample(draft.target_logits[:, 2 * stands]))

    return verify


def test_short_noise_is_found_by_the_long_tail():
    kinds = ("tail", "low ids", "high ids")
    short = check_sampler(fp32_gumbel, draws=1, tail=16_384)
    assert {f.case for f in short.failures("tail")} == {"long tail"}
    assert check_sampler(shared, draws=1, tail=2000).passed
    short = check_verifier(one_token(fp32_gumbel), **TAIL)
    assert {f.case for f in short.failures("tail")} == {"tail, replaced", "tail, behind"}
    right = check_verifier(one_token(shared), cases=(), tail=2000)
    assert right.passed and [f.what for f in right.findings] == [*kinds, *kinds]


@pytest.mark.parametrize("accepted", [0, 1, 2])
def test_drafts_of_the_long_tail_stand_or_fall(accepted):
    """A token that has to stand may be emitted in place of itself; one that has to fall may not."""

    def always(draft: Drafted) -> Outcome:
        _, token = one_token(shared)(draft)
        at = torch.full_like(token, accepted)
        token = draft.tokens[:, 0] if 0 < accepted < 2 else token
        return Outcome(at, token)

    report = check_verifier(always, cases=(), tail=100)
    wrong = {0: {"tail, behind"}, 1: {"tail, replaced"}, 2: {"tail, replaced"}}[accepted]
    assert {f.case for f in report.failures()} == wrong


def test_fp32_cumulated_probabilities_are_found_by_the_long_tail():
    """Behind the likely token they no longer grow."""

    def sample(logits):
        cumulated = logits[0].softmax(-1).cumsum(0)
        cumulated[logits[0].argmax() :] = 1.0
        return torch.searchsorted(cumulated, torch.rand(len(logits)), right=True)

    report = check_sampler(sample, draws=1, tail=16_384)
    assert report.failures("high ids") and not report.failures("low ids")


def test_the_largest_of_many_numbers_is_drawn_at_once():
    """As with a number each, here of so few bits that it shows at once."""
    row = torch.tensor([0.0, -1.0, -1.0, -1.0, -0.5, -0.5])
    distribution = {(v,): p for v, p in enumerate(row.double().softmax(-1).tolist())}
    tokens = fp32_gumbel(row.expand(50_000, 6)).tolist()
    assert compare("case", "token", [(t,) for t in tokens], distribution).p_value > 1e-6


def test_the_binomial_test_is_exact():
    for count, want in ((0, 2 / 1024), (1, 22 / 1024), (5, 1.0), (10, 2 / 1024)):
        found = compare_count("case", "tail", count, 10, 0.5)
        assert found.p_value == pytest.approx(want, rel=1e-12)
        assert found.distance == pytest.approx(abs(count / 10 - 0.5))
    assert compare_count("case", "tail", 0, 0, 0.1)[2:] == (1.0, 0.1)
    assert compare_count("case", "tail", 3, 100_000, 0.0).p_value == 0


def test_samplers():
    assert check_sampler(lambda logits: torch.multinomial(logits.softmax(-1), 1)[:, 0]).passed
    for wrong in (
        lambda logits: logits.argmax(-1),
        lambda logits: torch.multinomial((logits / 1.05).softmax(-1), 1)[:, 0],
        lambda logits: torch.multinomial(logits.softmax(-1) + 1e-4, 1)[:, 0],
    ):
        assert not check_sampler(wrong).passed


@pytest.mark.parametrize(
    ("outcome", "message"),
    [
        (lambda zeros: (zeros, zeros + 3), r"^token: expected numbers in 0 .. 2, got 3 .. 3"),
        (lambda zeros: (zeros - 1, zeros), r"^accepted: expected numbers in 0 .. 2, got -1 .. -1"),
        (lambda zeros: (zeros, zeros[:, None]), r"^token: expected shape \[100\], got \[100, 1\]"),
        (lambda zeros: (zeros.float(), zeros), r"^accepted: expected integers, got float32; conv"),
        (lambda zeros: (zeros, zeros.bool()), r"^token: expected integers, got bool; convert with"),
    ],
)
def test_outcomes_that_are_none_are_named(outcome, message):
    with pytest.raises((ValueError, TypeError), match=message):
        check_verifier(lambda draft: Outcome(*outcome(draft.tokens[:, 0] * 0)), draws=100)
    with pytest.raises(ValueError, match=r"^rule: expected 'token' or None, got 'block'"):
        check_verifier(token_rule, rule="block")


def test_tokens_that_are_no_integers_are_named():
    with pytest.raises(TypeError, match=r"^token: expected integers, got float32; convert with"):
        check_sampler(lambda logits: logits.argmax(-1).float(), draws=10)


@pytest.mark.parametrize("count", [0, -1, 2.5, None])
def test_counts_below_one_are_named(count):
    message = f"expected an integer >= 1, got {count}"
    if count is not None:
        with pytest.raises(ValueError, match=f"^batch: {message}"):
            check_verifier(token_rule, batch=count)
    for check in (
        lambda: check_verifier(token_rule, draws=count),
        lambda: check_sampler(lambda logits: logits.argmax(-1), draws=count),
        lambda: power({}, draws=count),
    ):
        with pytest.raises(ValueError, match=f"^draws: {message}"):
            check()
    with pytest.raises(ValueError, match=f"^repetitions: {message}"):
        power({"right": token_rule}, draws=10, repetitions=count)


class Elsewhere(torch.Tensor):
    """As if on a GPU: nothing can be done with it here but to bring it back."""

    @classmethod
    def __torch_function__(cls, function, types, args=(), kwargs=None):
        assert function is torch.Tensor.cpu, function
        return args[0].as_subclass(torch.Tensor)


def test_outcomes_may_lie_on_another_device():
    def there(*tensors):
        with torch._C.DisableTorchFunctionSubclass():
            return [x.as_subclass(Elsewhere) for x in tensors]

    assert check_verifier(lambda draft: Outcome(*there(*token_rule(draft))), draws=500).passed
    assert check_sampler(lambda x: there(x.softmax(-1).multinomial(1)[:, 0])[0], draws=500).passed


def test_rare_outcomes_share_a_cell():
    """One outcome of a chance of 1e-6 is no proof of anything."""
    cells = [(1e-6, 1), (3.0, 2), (40.0, 41), (2.5, 3), (60.0, 58)]
    assert pooled(cells) == [(pytest.approx(5.5), 6), (40.0, 41), (60.0, 58)]
    assert pooled([(50.0, 49), (1.0, 2)]) == [(51.0, 51)]
    assert pooled([(1.0, 1)]) == []
    distribution = {(0,): 0.5, (1,): 0.5 - 1e-6, (2,): 1e-6}
    seen = [(0,)] * 500 + [(1,)] * 499 + [(2,)]
    assert compare("case", "text", seen, distribution).p_value > 0.5
    assert compare("case", "text", [*seen, (3,)], distribution).p_value == 0


def test_zero_uniforms_end():
    with zero_uniforms():
        drawn = [torch.rand(2), torch.rand_like(torch.ones(2)), torch.ones(2).uniform_()]
    assert all((x == 0).all() for x in drawn)
    assert torch.rand(2).sum() > 0
