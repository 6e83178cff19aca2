"""Every fp32 f in [-1/2, 1/2]: 2^f by fused multiply-adds against 2^f by fp64, and how exact it is.

    python benchmarks/prove_weights.py

The two ways of `power` in csrc/include/specdiff/weights.h, compiled for a processor with fused
multiply-adds and for one without, must return the same bits for all 2,113,929,218 numbers. It takes
less than a minute on one core. Exit status 1: they differ.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

INCLUDE = Path(__file__).parents[1] / "csrc" / "include"
# Under this weigher a logit in [-1/2, 1/2] is f itself, and the power is 2^(44 + f).
SOURCE = """
#include "specdiff/weights.h"

extern "C" int fused() {
#ifdef SPECDIFF_FUSED
  return 1;
#else
  return 0;
#endif
}

extern "C" void powers(const float* f, long n, float* out) {
  const specdiff::Weigher by = {1, 0, 0, specdiff::kIntegers + 44, -1, 1, 0};
  for (long i = 0; i < n; ++i) out[i] = specdiff::power(f[i], by);
}
"""
CHUNK = 1 << 22
LARGEST = np.float32(0.5).view(np.uint32)


def compiled(folder: Path, name: str, *options: str) -> ctypes.CDLL:
    source, library = folder / "powers.cpp", folder / f"{name}.so"
    source.write_text(SOURCE)
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, "-std=c++17", "-O3", "-fPIC", "-shared", "-ffp-contract=off",
               "-fno-math-errno", "-fno-trapping-math", f"-I{INCLUDE}", *options, str(source), "-o",
               str(library)]  # fmt: skip
    subprocess.run(command, check=True)
    return ctypes.CDLL(str(library))


def powers_by(library: ctypes.CDLL) -> Callable[[np.ndarray], np.ndarray]:
    """2^(44 + f) of f32 f, over 2^44. -> f32"""
    floats = np.ctypeslib.ndpointer(np.float32, flags="C_CONTIGUOUS")
    library.powers.argtypes = [floats, ctypes.c_long, floats]

    def powers(f: np.ndarray) -> np.ndarray:
        out = np.empty_like(f)
        library.powers(f, len(f), out)
        return out * np.float32(2.0**-44)

    return powers


def every_fraction() -> Iterator[np.ndarray]:
    """All fp32 numbers in [-1/2, 1/2], a chunk at a time."""
    for sign in (0, 1 << 31):
        for first in range(0, int(LARGEST) + 1, CHUNK):
            bits = np.arange(first, min(first + CHUNK, int(LARGEST) + 1), dtype=np.uint32)
            yield (bits | np.uint32(sign)).view(np.float32)


def main() -> None:
    if shutil.which(os.environ.get("CXX", "c++")) is None:
        sys.exit("needs a C++ compiler: set CXX")
    with tempfile.TemporaryDirectory() as folder:
        libraries = [
            compiled(Path(folder), "fused", "-march=native"),
            compiled(Path(folder), "doubles"),
        ]
        if [library.fused() for library in libraries] != [1, 0]:
            sys.exit("needs a processor with fused multiply-adds, which is not compiled for them")
        fused, doubles = map(powers_by, libraries)
        total = differing = 0
        worst = 0.0
        for f in every_fraction():
            p = fused(f)
            total += len(f)
            differing += int((p.view(np.uint32) != doubles(f).view(np.uint32)).sum())
            exact = np.exp2(f.astype(np.float64))
            worst = max(worst, float(np.abs(p / exact - 1).max()))
            print(f"\r{total:,} numbers, {differing} differ", end="", file=sys.stderr, flush=True)
    print(file=sys.stderr)
    print(f"{total:,} numbers; {differing} differ; relative error of 2^f at most {worst:.3e}")
    sys.exit(1 if differing else 0)


if __name__ == "__main__":
    main()
