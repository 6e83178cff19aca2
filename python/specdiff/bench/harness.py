"""Harness: runs methods alternately on the same prompts, checks their texts, computes figures.

A speed-up is tokens per second divided by plain decoding's for the same prompts in the same turn.
Its median and 20th and 80th percentile are over prompts and repetitions. A method whose texts fail
the check gets the reason instead of figures.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from rich.console import Console
from rich.progress import Progress

from ..drafters import weights_digest
from ..loop.sampling import Sampling
from ..loop.stats import STAGES, Stats
from ..loop.target import Target
from .checks import Check, follows_distribution, same_texts
from .machine import peak_memory
from .methods import PLAIN, THEIRS, Decode, Method, make

WARM_UP = 4  # tokens


class TimedRun(NamedTuple):
    """Result of decoding one batch of prompts once."""

    tokens: list[list[int]]
    seconds: float
    stats: Stats

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return sum(map(len, self.tokens)) / self.seconds


@dataclass
class Setting:
    """A decoding method and its runs so far."""

    name: str
    decode: Decode
    runs: list[TimedRun] = field(default_factory=list)

    def run(self, prompts: list[list[int]], tokens: int, seed: int, **options: Any) -> TimedRun:
        start = time.perf_counter()
        new, stats = self.decode(prompts, tokens, seed, **options)
        return TimedRun(new, time.perf_counter() - start, stats)


def take_turns(
    settings: Sequence[Setting],
    batches: Sequence[list[list[int]]],
    tokens: int,
    repetitions: int = 1,
    title: str = "measuring",
) -> None:
    """Decode every batch with every setting. Progress goes to stderr.

    The order rotates, so that a slow phase of the machine affects all settings.

    Args:
        settings: they collect the runs, batch by batch and repetition by repetition.
        batches: batches of prompts. Each batch has its own seed in each repetition.
        tokens: number of new tokens of each prompt.
    """
    for setting in settings:
        setting.run(batches[0], WARM_UP, 0)
    turns = range(repetitions * len(batches))
    with Progress(console=Console(stderr=True), transient=True) as progress:
        for seed in progress.track(turns, description=title):
            turn = seed % len(settings)
            for setting in [*settings[turn:], *settings[:turn]]:
                setting.runs.append(setting.run(batches[seed % len(batches)], tokens, seed))


def quantiles(values: Sequence[float]) -> dict[str, float]:
    low, middle, high = np.quantile(values, (0.2, 0.5, 0.8)).tolist()
    return {"median": middle, "p20": low, "p80": high}


def speedups(setting: Setting, plain: Setting) -> list[float]:
    """Speed-up of each run over plain decoding's run."""
    return [a.rate / b.rate for a, b in zip(setting.runs, plain.runs, strict=True)]


def pooled(runs: Sequence[TimedRun]) -> Stats:
    """Counts and times summed over all runs."""
    whole = Stats()
    for stats in (run.stats for run in runs):
        for name in ("target_forwards", "row_forwards", "tokens", "drafted", "accepted"):
            setattr(whole, name, getattr(whole, name) + getattr(stats, name))
        for name in ("examined_at", "accepted_at"):
            own, more = getattr(whole, name), getattr(stats, name)
            own += [0] * (len(more) - len(own))
            for i, count in enumerate(more):
                own[i] += count
        for stage, seconds in stats.seconds.items():
            whole.seconds[stage] = whole.seconds.get(stage, 0.0) + seconds
    return whole


def figures(setting: Setting, plain: Setting, staged: Sequence[TimedRun]) -> dict[str, Any]:
    """The published figures of a setting.

    Args:
        staged: runs with times of the stages. On a GPU these are extra runs in which the host
            synchronises after every round; on a CPU the setting's runs.
    """
    stats, looked = pooled(setting.runs), pooled(staged)
    result: dict[str, Any] = {
        "emitted": stats.tokens,
        "tokens_per_second": quantiles([run.rate for run in setting.runs]),
        "speedup": quantiles(speedups(setting, plain)),
        "tokens_per_forward": stats.tokens_per_forward,
        "alpha": None,
        "alpha_k": None,
        "acceptance": None,
        "ms_per_forward": None,
        "ceiling": None,
    }
    if stats.drafted:
        result["alpha"] = stats.accepted / stats.drafted
        # per draft, since every draft's first token is examined
        result["alpha_k"] = stats.accepted / stats.examined_at[0]
        result["acceptance"] = stats.acceptance
    if any(looked.seconds.values()):
        ms = {s: 1e3 * looked.seconds[s] / looked.target_forwards for s in STAGES[1:]}
        whole = sum(run.seconds for run in staged) - sum(looked.seconds.values())
        result["ms_per_forward"] = {**ms, "host": 1e3 * whole / looked.target_forwards}
    return result


class Condition(NamedTuple):
    """Conditions under which methods are compared."""

    task: str
    temperature: float
    batch: int
    prompts: list[list[int]]
    new_tokens: int

    @property
    def batches(self) -> list[list[list[int]]]:
        """Full batches; left-over prompts are dropped. Raises ValueError if there is no batch."""
        B = self.batch
        check_batch(B, len(self.prompts))
        return [self.prompts[i : i + B] for i in range(0, len(self.prompts) - B + 1, B)]


def check_batch(batch: int, prompts: int) -> None:
    if not 1 <= batch <= prompts:
        raise ValueError(f"--batch must be in [1, {prompts}], the number of prompts, got {batch}")


class Measured(Protocol):
    """A target to measure: `Models` or `specdiff.bench.paper.Shape`."""

    target: Target
    device: torch.device

    @property
    def label(self) -> str:
        """Name in the results."""


def compare(
    models: Measured,
    condition: Condition,
    methods: Sequence[Method],
    *,
    repetitions: int = 1,
    make: Callable[[Method, Any, Sampling, int], Decode] = make,
) -> list[dict[str, Any]]:
    """Measure methods under one condition. Returns one case a method, plain decoding first.

    Args:
        methods: methods to measure. Plain decoding is added if missing.
        make: prepares a method. If it raises ValueError, the method is reported as refused.

    Raises:
        ValueError: plain decoding is impossible, or there are fewer prompts than the batch size.

    Example:
        >>> condition = Condition("chat", 0.0, 1, prompts("chat", models.tokenizer, 4), 32)
        >>> compare(models, condition, [parse("prompt-lookup,k=4")])
    """
    sampling = Sampling(condition.temperature)
    methods = [Method(PLAIN), *(method for method in methods if method != Method(PLAIN))]
    settings: dict[Method, Setting] = {}
    refused: dict[Method, str] = {}
    peaks: dict[Method, float | None] = {}
    for method in methods:
        try:
            setting = Setting(method.label, make(method, models, sampling, condition.batch))
            setting.run(condition.batches[0], WARM_UP, 0)  # loads the weights into memory
            with peak_memory(models.device) as peak:
                setting.run(condition.batches[0], condition.new_tokens, 0)
        except ValueError as error:
            if method == methods[0]:
                raise
            refused[method] = str(error)
        else:
            settings[method], peaks[method] = setting, peak.megabytes
    what = f"{condition.task}, temperature {condition.temperature:g}, batch {condition.batch}"
    ready = list(settings.values())
    take_turns(ready, condition.batches, condition.new_tokens, repetitions, what)
    plain = settings[methods[0]]
    cases = []
    for method in methods:
        case = named(models, condition, method)
        if method in settings:
            setting = settings[method]
            exact = method.name not in THEIRS and models.target.inconsistency is None
            check = checked(models.target, condition, setting, plain, exact=exact)
            refused.update({} if check.passed else {method: str(check.reason)})
            case |= figures(setting, plain, staged(setting, condition, models.device))
            case |= {"peak_mb": peaks[method], "check": asdict(check)}
        cases.append({**case, **dict.fromkeys(FIGURES)} if method in refused else case)
        cases[-1].setdefault("check", None)
        cases[-1]["refused"] = refused.get(method)
    if (why := refused.get(methods[0])) is not None:  # then there is no baseline
        for case in cases[1:]:
            case |= {**dict.fromkeys(FIGURES), "refused": case["refused"] or f"plain: {why}"}
    for case in cases:
        if case["ms_per_forward"] and cases[0]["ms_per_forward"]:
            case["ceiling"] = ceiling(case, cases[0])
    return cases


FIGURES = (  # figures of a case, None if it was refused
    "emitted", "tokens_per_second", "speedup", "tokens_per_forward", "alpha", "alpha_k",
    "acceptance", "ms_per_forward", "peak_mb", "ceiling",
)  # fmt: skip


def named(models: Measured, condition: Condition, method: Method) -> dict[str, Any]:
    """The fields that identify a case."""
    lengths = [len(prompt) for batch in condition.batches for prompt in batch]
    return {
        "target": models.label,
        "task": condition.task,
        "method": method.label,
        "k": method.k,
        "steps": method.steps,
        "rule": method.rule_for(Sampling(condition.temperature)),
        "weights": weights_digest(method.name),
        "temperature": condition.temperature,
        "batch": condition.batch,
        "context": round(sum(lengths) / len(lengths)),
        "prompts": len(lengths),
        "new_tokens": condition.new_tokens,
    }


def checked(
    target: Target, condition: Condition, setting: Setting, plain: Setting, *, exact: bool
) -> Check:
    """Check all texts of a setting. exact: see `same_texts`"""
    sampling = Sampling(condition.temperature)
    batches = condition.batches
    repeated = len(setting.runs) // len(batches)
    prompts = [prompt for batch in batches * repeated for prompt in batch]
    texts = [text for run in setting.runs for text in run.tokens]
    if sampling.greedy:
        expected = [text for run in plain.runs for text in run.tokens]
        return same_texts(target, prompts, texts, expected, exact=exact)
    return follows_distribution(target, prompts, texts, sampling)


def staged(setting: Setting, condition: Condition, device: torch.device) -> list[TimedRun]:
    """Runs with times of the stages: on a GPU extra runs, synchronised after every round."""
    if device.type == "cpu" or not any(setting.runs[0].stats.seconds.values()):
        return setting.runs
    return [
        setting.run(batch, condition.new_tokens, seed, look_every=1, capture=False)
        for seed, batch in enumerate(condition.batches)
    ]


def ceiling(case: dict[str, Any], plain: dict[str, Any]) -> dict[str, float]:
    """E(K) / (c(T, K) + v(K)): the speed-up if a round took only its drafting and its forward.

    Tokens and costs are means over all prompts. The speed-up of a case can be above it: that is a
    median, and reading the prompt, which takes both the same time, moves it towards 1.
    """
    ms = case["ms_per_forward"]
    forwards = (ms["draft"] + ms["target"]) / plain["ms_per_forward"]["target"]
    return {"speedup": case["tokens_per_forward"] / plain["tokens_per_forward"] / forwards}
