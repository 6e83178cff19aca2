"""Run every op on the emulator under ThreadSanitizer: with all barriers, then without each of them.

`check()` says whether there are races with all barriers, and without which barriers there are none.

ThreadSanitizer sees the threads of a kernel as threads, and orders their accesses by what a GPU
promises: barriers of a block, and counters that release and acquire. Warp operations order nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import torch

from specdiff_kernels import backends
from tests import emulator
from tests.ops import rounds

V = 600  # two parts of a row
DEVICES = (3, 0)  # that verify in two launches, and in one
ORDERS = 3  # in which threads run before a barrier is called unneeded: races show in some alone


def library() -> Path | None:
    """ThreadSanitizer's, which has to be loaded before Python."""
    found = subprocess.run(
        [str(emulator.COMPILER), "-print-file-name=libtsan.so"], capture_output=True, text=True
    ).stdout.strip()
    return Path(found) if os.path.isabs(found) else None


def check() -> dict:
    """Returns the findings of `main`, which runs in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        options = f"log_path={log} suppress_equal_stacks=0 suppress_equal_addresses=0 symbolize=0"
        environment = {
            **os.environ,
            "LD_PRELOAD": str(library()),
            "TSAN_OPTIONS": options,
            "OMP_NUM_THREADS": "1",
        }
        done = subprocess.run(
            [sys.executable, "-m", "tests.emulator.races", str(log)],
            env=environment, cwd=emulator.ROOT, capture_output=True, text=True,
        )  # fmt: skip
    if not done.stdout:
        raise RuntimeError(done.stderr[-3000:])
    return json.loads(done.stdout)


class Run:
    """Calls of every op on two devices, and what is known of the barriers that they meet."""

    def __init__(self, steering: ModuleType, log: str) -> None:
        self.steering, self.log = steering, log
        self.first_call: dict[tuple[str, int], int] = {}  # that meets a barrier

    def races(self, missing: tuple[str, int] | None = None) -> bool:
        """Whether something is reported, with all barriers or without one; stops at the first."""
        self.steering.leave_out(*(missing or ("", 0)))
        if missing is None:
            return self.reported(0, 0)
        return any(self.reported(self.first_call[missing], order) for order in range(ORDERS))

    def reported(self, begin: int, order: int) -> bool:
        """Whether something is, in the calls from one on."""
        written = Path(f"{self.log}.{os.getpid()}")
        calls = [(d, call) for d in DEVICES for call in rounds.every_op(V)]
        for index, (device, call) in enumerate(calls[begin:]):
            self.steering.seed(index + 1000 * order)
            emulator.use_device(device)
            call()
            for barrier in self.steering.barriers():
                self.first_call.setdefault(barrier, begin + index)
            if written.exists():
                return True
        return False


def fails(test: Callable[[], bool]) -> bool:
    """Whether a test says so, in a process of its own: kernels without a barrier may well crash."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(test())
        except BaseException:
            os._exit(1)
    return os.waitpid(child, 0)[1] != 0


def main(log: str) -> None:
    torch.set_num_threads(1)
    emulator.register(races=True)
    steering = emulator.emulator(races=True)
    rounds.K = 2  # the more threads, the slower
    run = Run(steering, log)
    with backends.use_backend(emulator.NAME):
        found = {"races": run.races(), "barriers": len(run.first_call)}
        steering.use_orders(False)
        found["races without order"] = fails(run.races)
        steering.use_orders(True)
        found["unneeded"] = [
            f"{Path(file).name}:{line}"
            for file, line in sorted(run.first_call)
            if not fails(partial(run.races, (file, line)))
        ]
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
