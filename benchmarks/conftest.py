"""Collects the figures of a run, prints them as tables and saves them as JSON."""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

sys.path.insert(0, str(Path(__file__).parent))  # for the modules in this folder

import pytest
import torch
from inputs import ACCEPTANCE, SHAPES
from machine import RESULTS, save
from op_cases import BACKENDS, CASES
from peers import CONTENDERS
from rich.console import Console
from rich.table import Table

GROUPS = ("verify", "draft + verify")  # groups of bench_verify.py
OURS = "specdiff cpp"
OWN = (OURS, "specdiff reference")


@dataclass
class OpRecord:
    shape: Any
    group: str
    name: str
    seconds: float  # per call: median over rounds, averaged over the draws
    extra: dict[str, float] = field(default_factory=dict)


@dataclass
class Report(ABC):
    """The measurements of a run. It holds only timings whose results passed the check."""

    file: ClassVar[str]
    records: list[OpRecord] = field(default_factory=list)
    bandwidth: dict[Any, Any] = field(default_factory=dict)
    unusable: dict[tuple[str, Any], str] = field(default_factory=dict)  # (name, shape): reason

    def cases(self) -> list[tuple[Any, str, dict[str, OpRecord]]]:
        """(shape, group, records by name), in the order of measurement within each group."""
        cases: dict[tuple[Any, str], dict[str, OpRecord]] = {}
        for group in dict.fromkeys(record.group for record in self.records):
            for record in self.records:
                if record.group == group:
                    cases.setdefault((record.shape, group), {})[record.name] = record
        return [(shape, group, found) for (shape, group), found in cases.items()]

    def not_measured(self) -> list[str]:
        """One line per reason."""
        groups: dict[tuple[str, str], list[str]] = {}
        for (name, what), reason in self.unusable.items():
            groups.setdefault((name, reason), []).append(str(what))
        return [f"not measured: {name} ({', '.join(sorted(whats))}): {reason}"
                for (name, reason), whats in sorted(groups.items())]  # fmt: skip

    @abstractmethod
    def complete(self) -> bool:
        """Whether everything measurable was measured."""

    @abstractmethod
    def table(self) -> Table: ...

    @abstractmethod
    def as_json(self) -> dict[str, Any]: ...

    def save(self, folder: Path = RESULTS) -> Path:
        return save(self.file, self.as_json(), folder=folder)


class VerifyReport(Report):
    """specdiff and other packages, from bench_verify.py."""

    file = "verify"

    def complete(self) -> bool:
        measured = {(record.name, record.shape, record.group) for record in self.records}
        return all(
            (kind.name, shape, group) in measured or (kind.name, shape) in self.unusable
            for kind, shape, group in product(CONTENDERS, SHAPES, GROUPS)
        )

    def table(self) -> Table:
        names = list(dict.fromkeys(record.name for record in self.records))
        title = f"ms a call, one thread, fp32 logits, sum min(p, q) = {ACCEPTANCE:.2f} on average"
        result = Table(title=title)
        result.add_column("shape", no_wrap=True)
        result.add_column("timed")
        for name in (*names, "fastest other / ours", "GB/s of least bytes", "sum's GB/s"):
            result.add_column(name, justify="right")
        for shape, group, found in self.cases():
            times = [milliseconds(found.get(name)) for name in names]
            rate = found[OURS].extra["least_gb_per_s"] if OURS in found else None
            light = self.bandwidth.get(shape, {}).get("sum_gb_per_s")
            rates = ["-" if x is None else f"{x:.1f}" for x in (rate, light)]
            result.add_row(str(shape), group, *times, ratio_text(found), *rates)
        return result

    def as_json(self) -> dict[str, Any]:
        cases = []
        for shape, group, found in self.cases():
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
            "bandwidth": [{"shape": s._asdict(), **rates} for s, rates in self.bandwidth.items()],
            "not_measured": [
                {"name": name, "shape": shape._asdict(), "reason": reason}
                for (name, shape), reason in self.unusable.items()
            ],
        }


class OpsReport(Report):
    """Every op on every backend, from bench_ops.py."""

    file = "ops"
    device = torch.device("cpu")

    def complete(self) -> bool:
        measured = {(record.group, record.shape, record.name) for record in self.records}
        return bool(self.bandwidth) and all(
            (kind.op, str(shape), backend) in measured or (backend, kind.op) in self.unusable
            for (kind, shape), backend in product(CASES, BACKENDS)
        )

    def floor_share(self, record: OpRecord) -> float:
        """Share of the measured time that reading the least bytes would take."""
        read = 1e3 * self.bandwidth["sum_gb_per_s"]  # MB/s
        return record.extra["least_mb"] / read / record.seconds

    def table(self) -> Table:
        names = [name for name in BACKENDS if any(record.name == name for record in self.records)]
        read = self.bandwidth.get("sum_gb_per_s")
        title = "ms a call, and the time for its least bytes as a share of it"
        result = Table(title=f"{title} (torch reads {read:.1f} GB/s)" if read else title)
        result.add_column("op")
        result.add_column("shape", no_wrap=True)
        for name in (*names, "least MB", *(f"{name}: floor" for name in names)):
            result.add_column(name, justify="right")
        for shape, op, found in self.cases():
            times = [milliseconds(found.get(name)) for name in names]
            least = next(iter(found.values())).extra["least_mb"]
            shares = [f"{self.floor_share(found[name]):.1%}" if read and name in found else "-"
                      for name in names]  # fmt: skip
            result.add_row(op, shape, *times, f"{least:.3g}", *shares)
        return result

    def as_json(self) -> dict[str, Any]:
        cases = [
            {
                "op": op,
                "shape": shape,
                "backend": record.name,
                "ms": 1e3 * record.seconds,
                "least_mb": record.extra["least_mb"],
                "floor_share": self.floor_share(record),
            }
            for shape, op, found in self.cases()
            for record in found.values()
        ]
        return {
            "command": "python -m pytest -s benchmarks/bench_ops.py",
            "cases": cases,
            "bandwidth": self.bandwidth,
            "not_measured": [
                {"op": op, "backend": backend, "reason": reason}
                for (backend, op), reason in self.unusable.items()
            ],
        }

    def save(self, folder: Path = RESULTS) -> Path:
        return save(self.file, self.as_json(), self.device, folder)


REPORTS = pytest.StashKey[dict[type[Report], Report]]()


def pytest_configure(config: pytest.Config) -> None:
    config.stash[REPORTS] = {kind: kind() for kind in (VerifyReport, OpsReport)}


@pytest.fixture(scope="session")
def report(pytestconfig: pytest.Config) -> Report:
    return pytestconfig.stash[REPORTS][VerifyReport]


@pytest.fixture(scope="session")
def ops_report(pytestconfig: pytest.Config) -> Report:
    return pytestconfig.stash[REPORTS][OpsReport]


def pytest_terminal_summary(exitstatus: int, config: pytest.Config) -> None:
    console = Console(width=max(150, Console().width))
    for report in config.stash[REPORTS].values():
        if not report.records:
            continue
        console.print(report.table())
        for line in report.not_measured():
            console.print(line, style="dim", highlight=False)
        if exitstatus == 0 and report.complete():
            console.print(f"saved {report.save()}", soft_wrap=True)


def milliseconds(record: OpRecord | None) -> str:
    return f"{1e3 * record.seconds:.3f}" if record else "-"


def fastest_other(found: dict[str, OpRecord]) -> OpRecord | None:
    others = [record for name, record in found.items() if name not in OWN]
    return min(others, key=lambda record: record.seconds, default=None)


def ratio_text(found: dict[str, OpRecord]) -> str:
    other = fastest_other(found)
    if other is None or OURS not in found:
        return "-"
    return f"{other.seconds / found[OURS].seconds:.1f}x ({other.name})"
