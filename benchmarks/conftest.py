"""Collects the figures of a run, prints them as ratios and keeps them as JSON."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))  # the modules beside this one, also for scripts

import pytest
from inputs import ACCEPTANCE, SHAPES, Shape
from machine import save
from peers import CONTENDERS
from rich.console import Console
from rich.table import Table

OURS = "specdiff cpp"
OWN = (OURS, "specdiff reference")


@dataclass
class Record:
    shape: Shape
    group: str
    name: str
    seconds: float  # median over rounds of the mean over the draws of a round
    extra: dict[str, float] = field(default_factory=dict)


@dataclass
class Report:
    """What was measured. Only timings whose correctness gate was green are in it."""

    records: list[Record] = field(default_factory=list)
    bandwidth: dict[Shape, dict[str, float]] = field(default_factory=dict)
    unusable: dict[tuple[str, Shape], str] = field(default_factory=dict)

    def cases(self) -> list[tuple[Shape, str, dict[str, Record]]]:
        """(shape, group, contenders by name), in the order of measurement."""
        cases: dict[tuple[Shape, str], dict[str, Record]] = {}
        for group in ("verify", "draft + verify"):
            for record in self.records:
                if record.group == group:
                    cases.setdefault((record.shape, group), {})[record.name] = record
        return [(shape, group, found) for (shape, group), found in cases.items()]


REPORT = pytest.StashKey[Report]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[REPORT] = Report()


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Report:
    return pytestconfig.stash[REPORT]


def pytest_terminal_summary(exitstatus: int, config: pytest.Config) -> None:
    report = config.stash[REPORT]
    if not report.records:
        return
    console = Console(width=max(150, Console().width))
    console.print(table(report))
    for name, shape, reason in sorted((n, str(s), r) for (n, s), r in report.unusable.items()):
        console.print(f"not measured: {name} at {shape}: {reason}", style="dim", highlight=False)
    measured = {(record.name, record.shape) for record in report.records}
    complete = len(measured) + len(report.unusable) == len(SHAPES) * len(CONTENDERS)
    if exitstatus == 0 and complete:
        console.print(f"saved {save('verify', as_json(report))}", soft_wrap=True)


def table(report: Report) -> Table:
    names = list(dict.fromkeys(record.name for record in report.records))
    title = f"ms a call, one thread, fp32 logits, sum min(p, q) = {ACCEPTANCE:.2f} on average"
    result = Table(title=title)
    result.add_column("shape", no_wrap=True)
    result.add_column("timed")
    for name in names:
        result.add_column(name, justify="right")
    result.add_column("fastest other / ours", justify="right")
    result.add_column("GB/s of least bytes", justify="right")
    result.add_column("sum's GB/s", justify="right")
    for shape, group, found in report.cases():
        times = [f"{1e3 * found[n].seconds:.3f}" if n in found else "-" for n in names]
        rate = found[OURS].extra["least_gb_per_s"] if OURS in found else None
        light = report.bandwidth.get(shape, {}).get("sum_gb_per_s")
        rates = ["-" if x is None else f"{x:.1f}" for x in (rate, light)]
        result.add_row(str(shape), group, *times, ratio_text(found), *rates)
    return result


def fastest_other(found: dict[str, Record]) -> Record | None:
    others = [record for name, record in found.items() if name not in OWN]
    return min(others, key=lambda record: record.seconds, default=None)


def ratio_text(found: dict[str, Record]) -> str:
    other = fastest_other(found)
    if other is None or OURS not in found:
        return "-"
    return f"{other.seconds / found[OURS].seconds:.1f}x ({other.name})"


def as_json(report: Report) -> dict[str, object]:
    cases = []
    for shape, group, found in report.cases():
        other = fastest_other(found)
        measured = other is not None and OURS in found
        cases.append({
            "shape": shape._asdict(),
            "timed": group,
            "ms": {name: 1e3 * record.seconds for name, record in found.items()},
            "fastest_other": other.name if other else None,
            "ratio": other.seconds / found[OURS].seconds if measured else None,
            "bytes": found[OURS].extra if OURS in found else None,
        })  # fmt: skip
    return {
        "command": "make bench",
        "acceptance": ACCEPTANCE,
        "cases": cases,
        "bandwidth": [{"shape": s._asdict(), **rates} for s, rates in report.bandwidth.items()],
        "not_measured": [
            {"name": name, "shape": shape._asdict(), "reason": reason}
            for (name, shape), reason in report.unusable.items()
        ],
    }
