"""Measures what a call of `verify` costs beside its kernel: Python functions, and their time; and
what a check of its records costs.

    python benchmarks/bench_call.py

At the smallest shape, backend cpp. Functions are counted by `sys.setprofile`. The time is that of
calls whose kernel is left out; it is the least of several runs, as others share the machine.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable
from timeit import repeat
from typing import Any
from unittest import mock

import torch

from specdiff_kernels import _C, Draft, Reveal, denoise_step, verify

B, K, V = 1, 8, 49152
CALLS, RUNS = 1000, 15


def a_call(check: bool = False) -> Callable[[], Any]:
    """`verify` of a draft whose distributions are recorded."""
    torch.manual_seed(0)
    target, pool = torch.randn(B, K + 1, V), torch.randn(B * K, V)
    zero = torch.zeros(B, dtype=torch.int64)
    key = {"seed": zero, "round": zero}
    draft = denoise_step(Draft.masked(B, K, pool), Reveal.all(), 0, **key)
    return lambda: verify(target, draft, **key, check=check, backend="cpp")


def functions(call: Callable[[], Any]) -> Counter[str]:
    """How often each Python function is called, but for `call` itself."""
    seen: Counter[str] = Counter()

    def note(frame: Any, event: str, _: Any) -> None:
        if event == "call" and frame.f_code is not call.__code__:
            seen[frame.f_code.co_name] += 1

    call()  # what is made once
    before = sys.getprofile()
    sys.setprofile(note)
    try:
        call()
    finally:
        sys.setprofile(before)
    return seen


def microseconds(call: Callable[[], Any], calls: int = CALLS) -> float:
    return min(repeat(call, timer=time.process_time, number=calls, repeat=RUNS)) / calls * 1e6


def main() -> None:
    torch.set_num_threads(1)
    call = a_call()
    with mock.patch.object(_C, "verify", lambda *args: None):
        beside = microseconds(call)
    print(f"{functions(call).total()} Python functions, {beside:.1f} us beside the kernel")
    for check in (False, True):
        print(f"check={check}: {microseconds(a_call(check), 10) / 1000:.2f} ms a call")


if __name__ == "__main__":
    main()
