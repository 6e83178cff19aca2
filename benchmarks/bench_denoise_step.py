"""Times a round of SpecDiff without its two networks: denoise_step and verify against plain torch.

    python benchmarks/bench_denoise_step.py

T reverse steps of SEDD's analytic sampler (2310.16834, log-linear noise) reveal K drafted tokens.
The last step reveals all remaining masks. The token rule (2211.17192) verifies the draft. One
thread, one sequence, fp32 logits, temperature 1. The head's outputs at each step are made
beforehand, for all positions or for the masked ones, as the contender needs; making them is not
timed, but writing them into the pool is. Plain torch uses every recorded q, as published code does.
For T > 1 this accepts more tokens than specdiff's default and biases the output
(docs/losslessness.md).
"""

from __future__ import annotations

import math
import statistics
import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from inputs import Inputs, Shape, accepted_moments, make_inputs
from machine import save
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from specdiff.drafters.noise import LogLinear, times
from specdiff.drafters.schedule import schedule
from specdiff.drafters.sedd import fill
from specdiff_kernels import Draft, Verified, check_status, denoise_step, verify

VOCAB = 50257
CASES = ((8, 1), (8, 4), (40, 1), (40, 4))  # K, T
NOISE = LogLinear()
STEP_NOISE = 0.3  # standard deviation that each step after the first adds to every logit
MEAN_NOISE = 0.05  # standard deviation of log m over the rows
SECONDS = 15.0  # for the timed rounds of a case
MIN_ROUNDS, MAX_ROUNDS = 20, 200
BIT_ROUNDS = 2  # rounds in which cpp is compared with the reference
BEFORE, TIMED, AFTER = 0, 1000, 2000  # first round checked before, timed, checked after
GATE_DEVIATIONS = 4.5  # probability of a false alarm: 7e-6
OVERHEAD_VOCAB = 64  # a vocabulary of negligible cost, to time the calls


def main() -> None:
    """Print medians of interleaved rounds, in ms."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.inference_mode():
        cases = [measure(k, t) for k, t in CASES]
        bandwidth = sum_bandwidth()
    show(cases, bandwidth)
    command = "python benchmarks/bench_denoise_step.py"
    content = {"command": command, "sum_gb_per_s": bandwidth, "cases": cases}
    Console().print(f"saved {save('denoise_step', content)}")


# --- inputs ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    k: int
    steps: int
    inputs: Inputs
    outputs: list[Tensor]  # the head's at each step: f32 [K, V + 1], the mask last

    @property
    def target(self) -> Tensor:
        return self.inputs.target_logits  # [1, K + 1, V]


def make_case(k: int, steps: int, vocab: int) -> Case:
    """A case with outputs l whose (1/V) sum_v exp(l_v) is about 1, as after training."""
    generator = torch.Generator().manual_seed(1)
    inputs = make_inputs(Shape(1, k, vocab))
    outputs = []
    for step in range(steps):
        rows = inputs.draft_logits[0]
        if step > 0:
            rows = rows + STEP_NOISE * torch.randn(rows.shape, generator=generator)
        log_mean = rows.logsumexp(1, keepdim=True) - math.log(vocab)
        error = MEAN_NOISE * torch.randn(k, 1, generator=generator)
        mask = torch.randn(k, 1, generator=generator)
        outputs.append(torch.cat([rows - log_mean + error, mask], 1))
    return Case(k, steps, inputs, outputs)


class Stopwatch:
    """Adds the seconds since the last lap to a name. The name "network" is not counted."""

    def __init__(self) -> None:
        self.laps: defaultdict[str, float] = defaultdict(float)
        self.last = time.perf_counter()

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] += now - self.last
        self.last = now

    def counted(self) -> dict[str, float]:
        laps = {name: seconds for name, seconds in self.laps.items() if name != "network"}
        return {"round": sum(laps.values()), **laps}


class Round(NamedTuple):
    tokens: Tensor  # i64 [K], drafted
    accepted: int
    last: int  # the token after the accepted ones
    seconds: dict[str, float]  # "round" and its parts
    rows_read: int = 0  # rows of logits that verify reads, at least


# --- contenders ------------------------------------------------------------------------------


class SpecDiff:
    """Calls the ops as `specdiff.SEDD` does: the head computes masked positions only."""

    name = "specdiff"
    checked = 400  # rounds checked before the timed ones, and after them

    def __init__(self, case: Case, backend: str = "cpp") -> None:
        self.case = case
        self.backend = backend
        self.reveals = schedule("analytic", case.steps, case.k, NOISE)

    def __call__(self, number: int) -> Round:
        watch = Stopwatch()
        draft, result = self.run(number, watch)
        seconds = watch.counted()
        check_status(result.status)
        accepted = int(result.accepted)
        rows_read = 1 + accepted + residual_row(draft, accepted)
        last = int(result.emitted[0, accepted])
        return Round(draft.tokens[0], accepted, last, seconds, rows_read)

    def run(self, number: int, watch: Stopwatch) -> tuple[Draft, Verified]:
        K, vocab = self.case.k, self.case.target.shape[2]
        seed, round = torch.zeros(1, dtype=torch.int64), torch.tensor([number])
        pool = self.case.target.new_empty(K, vocab + 1)
        draft = Draft.masked(1, K, pool[:, :vocab])
        for step, reveal in enumerate(self.reveals):
            masked = draft.tokens[0] < 0
            if not masked.any():
                break
            watch.lap("copy")
            output = self.case.outputs[step][masked]
            watch.lap("network")
            fill(pool, masked, output)
            watch.lap("copy")
            draft = denoise_step(draft, reveal, step, seed=seed, round=round, backend=self.backend)
            watch.lap("denoise")
        assert draft.distribution is not None
        check_status(draft.distribution.status)
        result = verify(self.case.target, draft, seed=seed, round=round, backend=self.backend)
        watch.lap("verify")
        return draft, result


def residual_row(draft: Draft, accepted: int) -> int:
    """1 if verify had to read a row of the draft, because a recorded token was rejected."""
    tau = draft.tau[0, : accepted + 1]
    return int(accepted < draft.tau.shape[1] and bool(tau[-1] == tau.max()))


class PlainTorch:
    """SEDD's public sampler and speculative sampling, in torch for one sequence.

    A step scores all K positions; the distribution of a revealed token is a point mass. Tokens are
    drawn by a race of exponential clocks, which equals the Gumbel maximum with one logarithm fewer.
    SEDD's code draws the noise in the score's dtype. In fp32 this biases the distribution slightly
    (2409.02908), so careful code draws it in fp64.
    """

    checked = 12

    def __init__(self, case: Case, dtype: torch.dtype) -> None:
        self.case = case
        self.dtype = dtype
        self.name = f"plain torch, {'fp64' if dtype == torch.float64 else 'fp32'} noise"

    def __call__(self, number: int) -> Round:
        torch.manual_seed(number)
        watch = Stopwatch()
        tokens, log_scores = self.draft(watch)
        accepted, last = self.verify(tokens, log_scores)
        watch.lap("verify")
        return Round(tokens, accepted, last, watch.counted())

    def draft(self, watch: Stopwatch) -> tuple[Tensor, Tensor]:
        """Tokens [K] and the log scores [K, V + 1] that each was drawn from."""
        K, mask = self.case.k, self.case.target.shape[2]
        tokens = torch.full((K,), mask)
        steps = times(self.case.steps)
        for step, (t, s) in enumerate(steps):
            final = step == len(steps) - 1
            now = NOISE.sigma(t)
            watch.lap("denoise")
            log_score = network(self.case.outputs[step], tokens, now)
            watch.lap("network")
            distribution = reverse_distribution(
                log_score.exp(), tokens, now if final else now - NOISE.sigma(s)
            )
            drawn = sample_categorical(distribution[:, :-1] if final else distribution, self.dtype)
            if step == 0:
                kept = log_score
            else:
                new = ((tokens == mask) & (drawn != mask)).nonzero()[:, 0]
                kept.index_copy_(0, new, log_score.index_select(0, new))
            tokens = drawn
            watch.lap("denoise")
        return tokens, kept

    def verify(self, tokens: Tensor, log_scores: Tensor) -> tuple[int, int]:
        K = len(tokens)
        log_scores[:, -1] = -torch.inf  # the mask is never emitted
        p = self.case.target[0].softmax(-1)
        q = log_scores.softmax(-1)
        drafted = tokens[:, None]
        ratio = p[:K].gather(1, drafted) / q.gather(1, drafted)
        accepted = int((torch.rand(K, 1) < ratio).long().cumprod(0).sum())
        distribution = p[accepted]
        if accepted < K:
            residual = (distribution - q[accepted, :-1]).clamp_(min=0)
            distribution = residual / residual.sum()
        return accepted, int(torch.multinomial(distribution, 1))


Contender = SpecDiff | PlainTorch


def network(output: Tensor, tokens: Tensor, sigma: float) -> Tensor:
    """SEDD's outputs scaled by sigma: log p(v) / p(current token), 0 for the current token."""
    log_score = output - math.log((output.shape[1] - 1) * math.expm1(sigma))
    return log_score.scatter_(1, tokens[:, None], 0.0)


def reverse_distribution(score: Tensor, tokens: Tensor, dsigma: float) -> Tensor:
    """Staggered score times transposed transition, in place. score [K, V + 1], tokens [K]"""
    alpha = math.exp(-dsigma)
    extra = (1 - 1 / alpha) * score.sum(1)
    score /= alpha
    score[:, -1] += extra
    move = (tokens == score.shape[1] - 1) * (1 - alpha)
    stay = alpha * score.gather(1, tokens[:, None])
    return score.mul_(move[:, None]).scatter_add_(1, tokens[:, None], stay)


def sample_categorical(distribution: Tensor, dtype: torch.dtype) -> Tensor:
    """Draw one token per row. [K, N] -> i64 [K]"""
    clocks = torch.rand(distribution.shape, dtype=dtype).add_(1e-10).log_().neg_().add_(1e-10)
    return torch.div(distribution, clocks, out=clocks).argmax(-1)


# --- measuring and checking ------------------------------------------------------------------


def measure(k: int, steps: int) -> dict[str, Any]:
    """One entry of the results: times, ratios and accepted tokens."""
    case = make_case(k, steps, VOCAB)
    plain = [PlainTorch(case, dtype) for dtype in (torch.float64, torch.float32)]
    contenders: list[Contender] = [SpecDiff(case), *plain]
    check(case, contenders, BEFORE)
    start = time.perf_counter()
    for contender in contenders:
        contender(0)
    once = time.perf_counter() - start
    count = min(MAX_ROUNDS, max(MIN_ROUNDS, round(SECONDS / once)))
    rounds: dict[str, list[Round]] = {contender.name: [] for contender in contenders}
    for number in track(range(TIMED, TIMED + count), f"K={k} T={steps}", transient=True):
        for contender in contenders:
            rounds[contender.name].append(contender(number))
    for name, done in rounds.items():
        check_rounds(name, case, done)
    check(case, contenders, AFTER)
    entries = {name: summary(done) for name, done in rounds.items()}
    ours = entries[SpecDiff.name]
    for entry in entries.values():
        entry["times_specdiff"] = entry["round"]["median"] / ours["round"]["median"]
    ours["calls"] = call_overhead(k, steps, count)
    ours |= bytes_model(case, rounds[SpecDiff.name])
    return {"k": k, "steps": steps, "vocab": VOCAB, "rounds": count, "contenders": entries}


def check(case: Case, contenders: list[Contender], first: int) -> None:
    for number in range(first, first + BIT_ROUNDS):
        check_bits(case, number)
    for contender in contenders:
        numbers = range(first, first + contender.checked)
        check_rounds(contender.name, case, [contender(number) for number in numbers])


def check_bits(case: Case, number: int) -> None:
    """Check that cpp drafts and verifies like the reference, bit for bit."""
    results = []
    for backend in ("cpp", "reference"):
        draft, verified = SpecDiff(case, backend).run(number, Stopwatch())
        assert draft.distribution is not None
        results.append((draft.tokens, draft.tau, draft.rows, *draft.distribution, *verified))
    same = all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    require(same, f"cpp and reference differ at K={case.k} T={case.steps}")


def check_rounds(name: str, case: Case, rounds: list[Round]) -> None:
    """Check that every position has a token and, for T = 1, the mean number of accepted tokens.

    For T > 1 there is no formula: later steps have other distributions, and not all records count.
    """
    tokens = torch.stack([done.tokens for done in rounds])
    last = torch.tensor([done.last for done in rounds])
    accepted = torch.tensor([done.accepted for done in rounds])
    vocab = case.target.shape[2]
    for drawn in (tokens, last):
        require(bool(((drawn >= 0) & (drawn < vocab)).all()), f"{name}: no valid token")
    require(bool(((accepted >= 0) & (accepted <= case.k)).all()), f"{name}: accepted beyond K")
    if case.steps > 1:
        return
    mean, variance = (x.item() for x in accepted_moments(case.inputs.acceptance[0]))
    allowed = GATE_DEVIATIONS * math.sqrt(variance / len(rounds))
    found = accepted.double().mean().item()
    require(
        abs(found - mean) < allowed,
        f"{name} accepted {found:.3f} tokens a round; "
        f"by the exact distribution {mean:.3f} +- {allowed:.3f}",
    )


def require(condition: bool, what: str) -> None:
    if not condition:
        raise SystemExit(what)


def summary(rounds: list[Round]) -> dict[str, Any]:
    """Median, p20 and p80 in ms, of a round and each of its parts."""
    entry: dict[str, Any] = {}
    for part in rounds[0].seconds:
        values = [1e3 * done.seconds[part] for done in rounds]
        p20, _, _, p80 = statistics.quantiles(values, n=5)
        entry[part] = {"median": statistics.median(values), "p20": p20, "p80": p80}
    entry["accepted"] = statistics.mean(done.accepted for done in rounds)
    return entry


def call_overhead(k: int, steps: int, count: int) -> float:
    """ms of specdiff's round with a vocabulary of negligible cost."""
    contender = SpecDiff(make_case(k, steps, OVERHEAD_VOCAB))
    return 1e3 * statistics.median(contender(number).seconds["round"] for number in range(count))


def bytes_model(case: Case, rounds: list[Round]) -> dict[str, float]:
    """Least bytes of logits that a round must read: each masked row once per step, and for verify.

    The number of masked rows is the schedule's expectation for these outputs. verify's rows are a
    mean over the rounds: the target's rows that it examined, and the draft's row if a recorded
    token was rejected.
    """
    masked = torch.ones(case.k, dtype=torch.float64)
    drafted = 0.0
    reveals = schedule("analytic", case.steps, case.k, NOISE)
    for output, reveal in zip(case.outputs, reveals, strict=True):
        drafted += masked.sum().item()
        mean = output[:, :-1].double().exp().mean(1)
        masked *= 1 - (reveal.rate * mean).clamp(max=1)
    verified = statistics.mean(done.rows_read for done in rounds)
    least = 4 * (case.target.shape[2]) * (drafted + verified)
    seconds = statistics.median(done.seconds["round"] for done in rounds)
    return {
        "masked_rows": drafted,
        "verified_rows": verified,
        "least_mb": least / 1e6,
        "least_gb_per_s": least / seconds / 1e9,
    }


def sum_bandwidth() -> float:
    """GB/s of torch summing a target's logits on the same thread, an upper bound of the speed."""
    logits = torch.randn(41, VOCAB)
    seconds = []
    for _ in range(30):
        start = time.perf_counter()
        logits.sum()
        seconds.append(time.perf_counter() - start)
    return 4 * logits.numel() / statistics.median(seconds) / 1e9


def show(cases: list[dict[str, Any]], bandwidth: float) -> None:
    table = Table(title=f"A round without networks, V={VOCAB}, one thread: ms, median (p20 to p80)")
    columns = ("ms", "x ours", "copy", "denoise", "verify", "accepted")
    table.add_column("")
    for column in columns:
        table.add_column(column, justify="right")
    for case in cases:
        table.add_section()
        table.add_row(f"[bold]K={case['k']} T={case['steps']}[/bold]", f"{case['rounds']} rounds")
        for name, entry in case["contenders"].items():
            whole = entry["round"]
            parts = [entry.get(part) for part in columns[2:5]]
            table.add_row(
                name,
                f"{short(whole['median'])} ({short(whole['p20'])} to {short(whole['p80'])})",
                f"{entry['times_specdiff']:.2f}",
                *(short(part["median"]) if part else "" for part in parts),
                f"{entry['accepted']:.2f}",
            )
    Console(width=100).print(table)
    for case in cases:
        ours = case["contenders"][SpecDiff.name]
        Console(width=100).print(
            f"K={case['k']} T={case['steps']}: calls {ours['calls']:.2f} ms (V={OVERHEAD_VOCAB}); "
            f"least {ours['least_mb']:.1f} MB = {ours['least_gb_per_s']:.1f} GB/s"
        )
    Console(width=100).print(f"torch sums logits at {bandwidth:.1f} GB/s")


def short(ms: float) -> str:
    return f"{ms:.2f}" if ms < 10 else f"{ms:.1f}"


if __name__ == "__main__":
    main()
