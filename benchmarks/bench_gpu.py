"""Times `verify` on a GPU against plain torch, flashinfer and transformers.

    python benchmarks/bench_gpu.py [--shapes 1x8x50257,32x8x128256] [--repetitions 200]

Logits are bf16, temperature is 1. The draft was made in one step, and all its distributions are
recorded. Runs cycle through DRAWS drafts and have different rounds, which averages over the
position of the first rejection. Each run starts with a cold L2 cache. The rows of a shape take
turns. A row is timed as a replayed CUDA graph, unless it waits for the device.

specdiff gets the draft's logits and distributions, as drafting leaves them. The others compute
probabilities from both models' logits, or from the target's only if q is given. They implement the
token rule only. transformers gets the draft's logits in fp32, as its assistant keeps them.

specdiff must equal the reference bit for bit, before and after timing, or nothing is reported. The
others must emit valid tokens, and their mean number of accepted tokens must match the exact
distribution. Otherwise they are left out, and the report says so.
"""

from __future__ import annotations

import datetime
import math
import re
import statistics
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from inputs import DRAWS, Shape, accepted_moments, make_logits, ratio
from machine import RESULTS
from peers import Outcome, Unusable, find, settled
from peers import Transformers as TransformersPeer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from specdiff.bench.machine import dashed, gpu, write
from specdiff_kernels import (
    Draft,
    Record,
    RowDistribution,
    Verified,
    available_backends,
    row_distribution,
    sample,
    verify,
)
from specdiff_kernels.inputs import Randomness, Sampling, VerifyInputs
from specdiff_kernels.reference.verify import verify as reference_verify

SHAPES = "1x8x50257,1x40x50257,32x8x128256,64x16x151936"
RULES = ("token", "block")
WARM_UP = 3
MIN_FLUSH = 1 << 28  # bytes; overwriting and reading them also hides the launch of the timed code
COPIED = 1 << 30  # bytes copied to measure the bandwidth
COPIES = 25
GATE_DEVIATIONS = 4.5  # probability of a false alarm: 7e-6
OURS_POISON, REFERENCE_POISON = -7, -9
LOGIT = 2  # bytes of a logit
EXAMINED = 8 + 4 + 8 + LOGIT + 28  # bytes of a drafted token, its tau, row, logit and distribution
SEQUENCE = 4 + 8 + 8  # bytes of a temperature, seed and round
REFERENCE = "reference, torch.compile"
REFERENCE_REASON = (
    "inductor takes over two minutes for K = 1 and over four for K = 2 (torch 2.13, one core); "
    "pass --compile-reference"
)
console = Console(width=max(130, Console().width))


def main(
    shapes: Annotated[str, typer.Option(help="comma-separated BxKxV")] = SHAPES,
    repetitions: Annotated[int, typer.Option(min=100, help="timed runs per row")] = 200,
    output: Annotated[
        Path | None, typer.Option(help="JSON file; default: a file in results/")
    ] = None,
    compile_reference: Annotated[
        bool, typer.Option("--compile-reference", help="also time it with torch.compile; very slow")
    ] = False,
) -> None:
    """Print medians of interleaved runs in microseconds, and relative to the memory-bound floor."""
    wanted = parse_shapes(shapes)
    setup = Setup.of(cuda_device())
    path = output or result_path(setup.hardware["name"], datetime.date.today())
    run(setup, wanted, repetitions, path, compile_reference)


def run(
    setup: Setup,
    shapes: Sequence[Shape],
    repetitions: int,
    path: Path,
    compile_reference: bool = False,
) -> None:
    """Measure and save."""
    with torch.no_grad():
        content = benchmark(setup, shapes, repetitions, compile_reference)
    given = ",".join(f"{shape.batch}x{shape.k}x{shape.vocab}" for shape in shapes)
    command = f"python benchmarks/bench_gpu.py --shapes {given} --repetitions {repetitions}"
    write(path, {"gpu": setup.hardware, "command": command, **content})
    console.print(f"saved {path}", soft_wrap=True)


def cuda_device() -> torch.device:
    if not torch.cuda.is_available():
        raise SystemExit("torch found no CUDA device: there is nothing to measure")
    return torch.device("cuda", torch.cuda.current_device())


def parse_shapes(text: str) -> list[Shape]:
    """Parse shapes such as "1x8x50257,..."."""
    if not re.fullmatch(r"\d+x\d+x\d+(,\d+x\d+x\d+)*", text):
        raise typer.BadParameter(f"--shapes: expected comma-separated BxKxV, got {text!r}")
    return [Shape(*map(int, shape.split("x"))) for shape in text.split(",")]


def result_path(device_name: str, day: datetime.date) -> Path:
    return RESULTS / dashed(device_name) / f"{day.isoformat()}.json"


def benchmark(
    setup: Setup, shapes: Sequence[Shape], repetitions: int, compile_reference: bool
) -> dict[str, Any]:
    torch.manual_seed(0)
    cases = []
    for shape in shapes:
        cases.append(measure(shape, setup, repetitions, compile_reference))
        show(cases[-1])
    console.print(f"a copy of {COPIED / 1e9:.2f} GB reads and writes {setup.bandwidth:.0f} GB/s")
    return {"copy_gb_per_s": setup.bandwidth, "repetitions": repetitions, "cases": cases}


# --- inputs ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A shape's tensors. `load` writes another draft and round into them, in place."""

    shape: Shape
    target: Tensor  # bf16 [B, K + 1, V]
    draft_logits: Tensor  # bf16 [B, K, V]
    draft: Draft  # drawn from these logits
    draws: Tensor = field(repr=False)  # i64 [DRAWS, B, K]
    chances: Tensor = field(repr=False)  # f64 [DRAWS, B, K], min(1, p/q) at the tokens
    temperature: Tensor
    seed: Tensor
    round: Tensor
    zero: Tensor  # i64 [B]
    tokens32: Tensor  # the draft's tokens in i32, for contenders that need it

    @cached_property
    def q(self) -> Tensor:
        """f32 [B, K, V]"""
        return self.draft_logits.softmax(-1, dtype=torch.float32)

    def load(self, number: int) -> None:
        self.draft.tokens.copy_(self.draws[number % DRAWS])
        self.tokens32.copy_(self.draft.tokens)
        self.round.fill_(number)


def make_case(shape: Shape, device: torch.device) -> Case:
    """Make a case. Logits are from `make_logits`; distribution and tokens are from the reference,
    one sequence at a time. The result is reproducible on one kind of device."""
    B, K, V = shape
    logits = make_logits(shape, torch.Generator(device).manual_seed(0))
    target, drafted = (x.bfloat16() for x in logits)
    del logits
    seed = torch.arange(B, device=device)
    temperature = torch.ones(B, device=device)
    distributions, draws, ratios = [], [], []
    for b in range(B):
        distributions.append(
            row_distribution(drafted[b], temperature[b].expand(K), backend="reference")
        )
        draws.append(draw(drafted[b], distributions[b], seed[b]))
        ratios.append(ratio(target[b, :K], drafted[b], draws[b]))
    rows = torch.arange(B * K, device=device).view(B, K)
    distribution = RowDistribution(
        *(torch.cat(fields) for fields in zip(*distributions, strict=True))
    )
    tokens = torch.zeros_like(rows)
    draft = Draft(tokens, tokens.int(), rows, drafted.view(B * K, V), distribution)
    chances = torch.stack(ratios, 1).clamp(max=1)
    zero = torch.zeros_like(seed)
    return Case(
        shape, target, drafted, draft, torch.stack(draws, 1), chances,
        temperature, seed, zero.clone(), zero, tokens.int(),
    )  # fmt: skip


def draw(logits: Tensor, distribution: RowDistribution, seed: Tensor) -> Tensor:
    """Draw DRAWS drafts of one sequence. [K, V], [K], [] -> i64 [DRAWS, K]"""
    slot = torch.arange(len(logits), device=logits.device)
    key = {"seed": seed.expand(len(logits)), "slot": slot, "backend": "reference"}
    rounds = (torch.full_like(slot, number) for number in range(DRAWS))
    return torch.stack([sample(logits, distribution, round=round, **key) for round in rounds])


# --- rows ------------------------------------------------------------------------------------


class Row(ABC):
    """An implementation that verifies a case. Calls of it are timed."""

    rule = "token"

    @abstractmethod
    def __call__(self) -> Any: ...

    @abstractmethod
    def outcome(self, result: Any) -> Outcome: ...


class Ours(Row):
    """specdiff with one backend and rule. Every call writes the same output tensors."""

    def __init__(self, case: Case, backend: str, rule: str) -> None:
        B, K, _ = case.shape
        self.case = case
        self.backend = backend
        self.rule = rule
        counts = torch.empty_like(case.seed)
        emitted = counts.new_empty(B, K + 1)
        self.out = Verified(counts, emitted, counts.int(), counts.double())

    def __call__(self) -> Verified:
        return verify(
            self.case.target,
            self.case.draft,
            self.case.temperature,
            rule=self.rule,
            seed=self.case.seed,
            round=self.case.round,
            backend=self.backend,
            out=self.out,
        )

    def outcome(self, result: Verified) -> Outcome:
        return settled(result)


class CompiledReference(Ours):
    """The reference under torch.compile. It must give the reference's bits, too."""

    def __init__(self, case: Case) -> None:
        super().__init__(case, "reference", "token")
        self.function = torch.compile(reference_verify, fullgraph=True, dynamic=False)

    def __call__(self) -> Verified:
        case = self.case
        inputs = VerifyInputs(
            case.target, case.draft, "token", Record.RUNNING_MAX, None,
            Sampling(case.temperature, None, None, None),
            Randomness(None, case.seed, case.round, None),
        )  # fmt: skip
        self.function(inputs, out=self.out)
        return self.out


def plain_verify(target: Tensor, draft: Tensor, tokens: Tensor, given: bool) -> Any:
    """Verification as a careful user would write it, without synchronisation: softmax of both,
    acceptance, and a race of exponential clocks over the residual. If `given`, `draft` is q instead
    of logits.

    [B, K + 1, V], [B, K, V], [B, K] -> accepted [B], the token after the accepted ones [B]
    """
    K = tokens.shape[1]
    p = target.softmax(-1, dtype=torch.float32)
    q = draft if given else draft.softmax(-1, dtype=torch.float32)
    drafted = tokens[..., None]
    p_x, q_x = p[:, :K].gather(2, drafted)[..., 0], q.gather(2, drafted)[..., 0]
    accepted = (torch.rand_like(p_x) * q_x < p_x).long().cumprod(1).sum(1)
    batch = torch.arange(len(tokens), device=tokens.device)
    p_last, q_last = p[batch, accepted], q[batch, accepted.clamp(max=K - 1)]
    residual = torch.where((accepted < K)[:, None], (p_last - q_last).clamp(min=0), p_last)
    clocks = torch.empty_like(residual).exponential_()
    return accepted, (residual / clocks).argmax(-1)


class PlainTorch(Row):
    def __init__(self, case: Case, given: bool = False, compiled: bool = False) -> None:
        self.case = case
        self.given = given
        self.q = case.q if given else case.draft_logits
        self.function: Callable[..., Any] = plain_verify
        if compiled:
            self.function = torch.compile(plain_verify, fullgraph=True, dynamic=False)

    def __call__(self) -> tuple[Tensor, Tensor]:
        return self.function(self.case.target, self.q, self.case.draft.tokens, self.given)

    def outcome(self, result: tuple[Tensor, Tensor]) -> Outcome:
        accepted, last = result
        return Outcome(accepted.tolist(), last.tolist())


class FlashInfer(Row):
    """flashinfer.sampling.chain_speculative_sampling on probabilities from torch.softmax, which
    reads bf16 directly. Seeds are tensors, as its documentation requires for CUDA graphs."""

    def __init__(self, case: Case, given: bool = False) -> None:
        self.case = case
        self.given = given
        self.function = find("flashinfer.sampling", "chain_speculative_sampling")

    def __call__(self) -> tuple[Tensor, Tensor, Tensor]:
        case = self.case
        p = case.target.softmax(-1, dtype=torch.float32)
        q = case.q if self.given else case.draft_logits.softmax(-1, dtype=torch.float32)
        return self.function(q, case.tokens32, p, seed=case.round, offset=case.zero)

    def outcome(self, result: tuple[Tensor, Tensor, Tensor]) -> Outcome:
        tokens, _, accepted = result
        last = tokens.gather(1, accepted.long()[:, None])[:, 0]
        return Outcome(accepted.tolist(), last.tolist())


class Transformers(Row):
    """transformers' function, with the conversion to fp32 that `generate` does before it."""

    def __init__(self, case: Case) -> None:
        self.peer = TransformersPeer(case.shape)
        self.case = case
        self.drafted = case.draft_logits.float()

    def __call__(self) -> Any:
        target = self.case.target.float()
        return self.peer.verify(target, self.case.draft.tokens, self.drafted, 0)

    def outcome(self, result: Any) -> Outcome:
        return self.peer.outcome(result)


OTHERS: dict[str, Callable[[Case], Row]] = {
    "torch": PlainTorch,
    "torch, q given": partial(PlainTorch, given=True),
    "torch.compile": partial(PlainTorch, compiled=True),
    "torch.compile, q given": partial(PlainTorch, given=True, compiled=True),
    "flashinfer": FlashInfer,
    "flashinfer, q given": partial(FlashInfer, given=True),
    "transformers": Transformers,
}


# --- timing ----------------------------------------------------------------------------------


class Clock:
    """Times one run with a cold and clean L2 cache: nothing must be written back during the run."""

    def __init__(self, device: torch.device, least: int = MIN_FLUSH) -> None:
        """least: bytes that are overwritten before a run."""
        cache = torch.cuda.get_device_properties(device).L2_cache_size
        size = max(2 * cache, least)
        self.buffer = torch.empty(size // 4, dtype=torch.float32, device=device)

    def __call__(self, run: Callable[[], Any]) -> tuple[float, Any]:
        """Microseconds on the device, and the run's result."""
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        self.buffer.fill_(1.0)
        self.buffer.sum()
        start.record()
        result = run()
        end.record()
        end.synchronize()
        return 1e3 * start.elapsed_time(end), result


def copy_bandwidth(clock: Clock, device: torch.device, size: int = COPIED) -> float:
    """GB/s of a large copy on the device, bytes read plus bytes written: an upper bound."""
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    times = [clock(lambda: target.copy_(source))[0] for _ in range(WARM_UP + COPIES)]
    return 2 * size / (1e3 * statistics.median(times[WARM_UP:]))


@dataclass
class Timed:
    """A row ready to be timed, and its measurements."""

    name: str
    row: Row
    run: Callable[[], Any]
    how: str  # "graph" or "stream"
    why_stream: str = ""
    us: list[float] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)


def make_ready(name: str, row: Row) -> Timed:
    """Compile and warm up the row, and capture it unless it waits for the device."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(WARM_UP):
            row()
    torch.cuda.current_stream().wait_stream(side)
    if reason := reason_against_capture(row):
        return Timed(name, row, row, "stream", reason)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, stream=side):
            result = row()
    except RuntimeError as error:  # streams and generators are left in capture mode
        raise SystemExit(f"{name}: could not be captured in a CUDA graph: {error}") from error

    def run() -> Any:
        graph.replay()
        return result

    return Timed(name, row, run, "graph")


def reason_against_capture(row: Row) -> str:
    """Why a row waits for the device; empty if it does not."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        row()
    except RuntimeError as error:
        return first_line(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    return ""


@dataclass(frozen=True)
class Setup:
    """A device and the tools to time rows on it."""

    device: torch.device
    hardware: dict[str, Any]  # its description
    clock: Callable[[Callable[[], Any]], tuple[float, Any]]
    bandwidth: float  # of a copy, GB/s
    backends: dict[str, str | None]  # why each backend cannot run there, or None
    make_ready: Callable[[str, Row], Timed] = make_ready
    others: Mapping[str, Callable[[Case], Row]] = field(default_factory=lambda: OTHERS)

    @classmethod
    def of(cls, device: torch.device) -> Setup:
        """A GPU's."""
        clock = Clock(device)
        bandwidth = copy_bandwidth(clock, device)
        return cls(device, gpu(device), clock, bandwidth, available_backends(device.type))


def prepare(
    case: Case, setup: Setup, compile_reference: bool
) -> tuple[list[Timed], dict[str, str]]:
    """All available rows, and the reasons why the others are missing."""
    timed, missing, make_ready = [], {}, setup.make_ready
    if compile_reference:
        timed.append(make_ready(REFERENCE, CompiledReference(case)))
    else:
        missing[REFERENCE] = REFERENCE_REASON
    for backend, reason in setup.backends.items():
        if reason is not None:
            missing[backend] = reason
        elif backend != "reference":
            for rule in RULES:
                timed.append(make_ready(f"{backend}, {rule}", Ours(case, backend, rule)))
    for name, make in setup.others.items():
        try:
            timed.append(make_ready(name, make(case)))
        except Unusable as reason:
            missing[name] = str(reason)
        except Exception as error:  # other packages may raise anything
            missing[name] = f"{type(error).__name__}: {first_line(error)}"
    return timed, missing


def first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def measure(
    shape: Shape, setup: Setup, repetitions: int, compile_reference: bool
) -> dict[str, Any]:
    """One entry of the results."""
    torch.compiler.reset()  # else later shapes hit the recompilation limit
    case = make_case(shape, setup.device)
    timed, missing = prepare(case, setup, compile_reference)
    timed = passing(case, timed, 0, missing)
    end = DRAWS + repetitions
    for number in track(range(DRAWS, end), str(shape), console=console, transient=True):
        for one in timed:
            case.load(number)
            us, result = setup.clock(one.run)
            one.us.append(us)
            one.outcomes.append(one.row.outcome(result))
    timed = passing(case, timed, end, missing)
    return {
        "shape": shape._asdict(),
        "rows": summaries(timed, shape, setup.bandwidth),
        "not_measured": [{"name": name, "reason": reason} for name, reason in missing.items()],
    }


# --- gates -----------------------------------------------------------------------------------


def passing(case: Case, timed: list[Timed], first: int, missing: dict[str, str]) -> list[Timed]:
    """The rows that are correct on DRAWS rounds from `first` on, and on the earlier timed rounds.

    A wrong row of specdiff ends the program. A wrong row of others goes to `missing`.
    """
    passed = []
    for one in timed:
        reason = None
        if isinstance(one.row, Ours):
            check_bits(case, one.name, one.row, one.run, range(first, first + DRAWS))
        else:
            fresh = [run_once(case, one, first + i) for i in range(DRAWS)]
            reason = fault(case, one.outcomes, fresh, first)
        if reason is None:
            passed.append(one)
        else:
            missing[one.name] = reason
    return passed


def check_bits(
    case: Case, name: str, row: Ours, run: Callable[[], Any], numbers: Sequence[int]
) -> None:
    """Check that timed rows give the reference's bits, with outputs poisoned beforehand."""
    reference = Ours(case, "reference", row.rule)
    for number in numbers:
        case.load(number)
        for tensor in row.out:
            tensor.fill_(OURS_POISON)
        for tensor in reference.out:
            tensor.fill_(REFERENCE_POISON)
        run()
        reference()
        for what, got, wanted in zip(Verified._fields, row.out, reference.out, strict=True):
            if not torch.equal(got, wanted):
                raise SystemExit(
                    f"{name}: `{what}` differs from the reference at {case.shape}, round {number}; "
                    "nothing is reported"
                )


def run_once(case: Case, one: Timed, number: int) -> Outcome:
    case.load(number)
    return one.row.outcome(one.run())


def fault(case: Case, timed: list[Outcome], fresh: list[Outcome], first: int) -> str | None:
    """The fault in the outcomes of timed rounds and of rounds from `first` on, or None.

    The mean is checked only if there are timed rounds, since a few rounds are not enough.
    """
    outcomes = timed + fresh
    accepted = torch.tensor([outcome.accepted for outcome in outcomes])  # [rounds, B]
    last = torch.tensor([outcome.last for outcome in outcomes])
    _, K, V = case.shape
    if bool(((accepted < 0) | (accepted > K)).any()):
        return f"it accepted fewer than 0 or more than {K} tokens"
    if bool(((last < 0) | (last >= V)).any()):
        return f"it emitted a token outside 0..{V - 1}"
    if not timed:
        return None
    numbers = torch.arange(first - len(timed), first + len(fresh))
    mean, variance = accepted_moments(case.chances[numbers.to(case.chances.device) % DRAWS])
    allowed = GATE_DEVIATIONS * variance.sum().sqrt().item() / accepted.numel()
    found, exact = accepted.double().mean().item(), mean.mean().item()
    if abs(found - exact) <= allowed:
        return None
    return (
        f"it accepted {found:.3f} tokens a round; by the exact distribution {exact:.3f} "
        f"+- {allowed:.3f}"
    )


# --- figures ---------------------------------------------------------------------------------


def bytes_model(shape: Shape, accepted: Sequence[int], rule: str) -> tuple[int, int]:
    """Least bytes moved for this outcome, and the same if all target rows are read. accepted: [B]

    Token rule: target rows up to the one that ends the round, and the draft's row at a rejection.
    Block rule: a prefix's probability needs the rows of all its tokens. Draft rows of longer
    prefixes may also be needed and are not counted. Random words are computed from seed and round.
    """
    B, K, V = shape
    row = LOGIT * V
    rejected = sum(count < K for count in accepted)
    examined = sum(min(count + 1, K) for count in accepted) if rule == "token" else B * K
    small = EXAMINED * examined + B * (SEQUENCE + 8 + 8 * (K + 1) + 4)
    target_rows = examined + B - rejected  # after K accepted tokens, one more row
    least = row * (target_rows + rejected) + small
    return least, row * (B * (K + 1) + rejected) + small


def spread(values: Sequence[float]) -> dict[str, float]:
    p20, _, _, p80 = statistics.quantiles(values, n=5)
    return {"median": statistics.median(values), "p20": p20, "p80": p80}


def summaries(timed: list[Timed], shape: Shape, bandwidth: float) -> list[dict[str, Any]]:
    """One entry per row. `times_ours` is relative to specdiff's fastest row with the same rule."""
    entries = [summary(one, shape, bandwidth) for one in timed]
    ours: dict[str, float] = {}
    for one, entry in zip(timed, entries, strict=True):
        if type(one.row) is Ours:
            rule, us = one.row.rule, entry["us"]["median"]
            ours[rule] = min(us, ours.get(rule, math.inf))
    for entry in entries:
        fastest = ours.get(entry["rule"])
        entry["times_ours"] = entry["us"]["median"] / fastest if fastest else None
    return entries


def summary(one: Timed, shape: Shape, bandwidth: float) -> dict[str, Any]:
    """Times, and their ratios to the floors for the accepted tokens; bandwidth in GB/s."""
    rule = one.row.rule
    models = [bytes_model(shape, outcome.accepted, rule) for outcome in one.outcomes]
    entry: dict[str, Any] = {
        "name": one.name,
        "rule": rule,
        "timed": one.how,
        "why_stream": one.why_stream,
        "us": spread(one.us),
        "accepted": statistics.mean(n for outcome in one.outcomes for n in outcome.accepted),
    }
    for name, sizes in zip(("least", "all_rows"), zip(*models, strict=True), strict=True):
        floors = [size / (1e3 * bandwidth) for size in sizes]  # us
        ratios = [us / floor for us, floor in zip(one.us, floors, strict=True)]
        entry[name] = {
            "mb": statistics.mean(sizes) / 1e6,
            "floor_us": statistics.mean(floors),
            "times_floor": statistics.median(ratios),
        }
    return entry


def show(case: dict[str, Any]) -> None:
    table = Table(title=str(Shape(**case["shape"])))
    table.add_column("")
    table.add_column("timed")
    for heading in ("us (p20 to p80)", "x ours", "accepted", "least MB", "floor us", "x floor"):
        table.add_column(heading, justify="right")
    table.add_column("x floor of all target rows", justify="right")
    for row in case["rows"]:
        us, least = row["us"], row["least"]
        table.add_row(
            row["name"],
            row["timed"],
            f"{us['median']:.1f} ({us['p20']:.1f} to {us['p80']:.1f})",
            "-" if row["times_ours"] is None else f"{row['times_ours']:.2f}",
            f"{row['accepted']:.2f}",
            f"{least['mb']:.2f}",
            f"{least['floor_us']:.2f}",
            f"{least['times_floor']:.1f}",
            f"{row['all_rows']['times_floor']:.1f}",
        )
    console.print(table)
    for row in case["rows"]:
        if row["why_stream"]:
            reason = f"{row['name']}: no graph: {row['why_stream']}"
            console.print(reason, style="dim", markup=False)
    for one in case["not_measured"]:
        console.print(f"not measured: {one['name']}: {one['reason']}", style="dim", markup=False)


if __name__ == "__main__":
    typer.run(main)
