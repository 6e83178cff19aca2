"""Times every public op on every backend, on the GPU if torch finds one, else on the CPU.

    python -m pytest -s benchmarks/bench_ops.py

On a CPU it uses one thread. op_cases.py has the inputs and the least bytes that an op must move.
The floor is the time in which the same threads read as many bytes from memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import OpRecord, OpsReport
from op_cases import BACKENDS, CASES, Case

from specdiff_kernels import BackendError, available_backends

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
SECONDS = 1.0  # for each timing, unless a pass over the draws takes longer
MAX_PASSES = 200
READ = 1 << 30  # bytes summed to measure the bandwidth


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0].op}, {case[1]}")
def case(request: pytest.FixtureRequest) -> Case:
    torch.set_num_threads(1)
    kind, shape = request.param
    return kind(shape, DEVICE)


@pytest.mark.parametrize("backend", BACKENDS)
def test_speed(
    request: pytest.FixtureRequest, case: Case, backend: str, benchmark: Any, ops_report: OpsReport
) -> None:
    shape = str(request.node.callspec.params["case"][1])
    benchmark.group = f"{case.op}, {shape}"
    try:
        check_available(backend)
        check(case, backend)
    except BackendError as reason:
        ops_report.unusable[backend, case.op] = str(reason)
        pytest.skip(str(reason))
    calls = Calls(case, backend)
    passes = calls.affordable()
    benchmark.pedantic(run, setup=calls, rounds=passes * case.draws)
    check(case, backend)

    times = benchmark.stats.stats.data  # cycles through the draws
    by_draw = [statistics.median(times[draw :: case.draws]) for draw in range(case.draws)]
    least = {"least_mb": case.least_bytes() / 1e6}
    benchmark.extra_info.update(least)
    record = OpRecord(shape, case.op, backend, statistics.mean(by_draw), least)
    ops_report.records.append(record)


def test_bandwidth(benchmark: Any, ops_report: OpsReport) -> None:
    """Memory bandwidth: torch sums numbers on the same threads as the ops."""
    benchmark.group = "bandwidth"
    torch.set_num_threads(1)
    data = torch.ones(READ // 4, device=DEVICE)
    benchmark.pedantic(run, args=(data.sum,), rounds=15, warmup_rounds=1)
    ops_report.device = DEVICE
    ops_report.bandwidth["sum_gb_per_s"] = READ / benchmark.stats.stats.median / 1e9
    benchmark.extra_info.update(ops_report.bandwidth)


class Calls:
    """Provides pytest-benchmark with the next call, as arguments of `run`."""

    def __init__(self, case: Case, backend: str) -> None:
        self.case = case
        self.backend = backend
        self.number = 0

    def __call__(self) -> tuple[tuple[Callable[[], Any]], dict[str, Any]]:
        call = self.case.load(self.number, self.backend)
        self.number += 1
        synchronize()
        return (call,), {}

    def affordable(self) -> int:
        """Number of passes over the draws that fit the time limit."""
        arguments, _ = self()
        start = time.perf_counter()
        run(*arguments)
        once = self.case.draws * (time.perf_counter() - start)
        return max(3 if once < SECONDS else 1, min(MAX_PASSES, round(SECONDS / once)))


def run(call: Callable[[], Any]) -> None:
    call()
    synchronize()


def synchronize() -> None:
    if DEVICE.type == "cuda":
        torch.cuda.synchronize()


def check(case: Case, backend: str) -> None:
    fault = case.fault(backend)
    assert fault is None, fault


def check_available(backend: str) -> None:
    """Raise BackendError if the backend runs no op on this device, or only for tests."""
    if reason := available_backends(DEVICE.type)[backend]:
        raise BackendError(reason)
    if backend == "triton" and DEVICE.type == "cpu":
        raise BackendError("Triton's interpreter is for tests; its times are meaningless")
