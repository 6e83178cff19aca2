"""Finds the CUDA toolkit and decides whether the CUDA kernels are built."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

ARCHITECTURES = (80, 86, 90, 100, 120)
CONVENTIONAL_ROOTS = ("/usr/local/cuda", "/opt/cuda")


class CudaError(Exception):
    """The CUDA build that SPECDIFF_CUDA asks for is not possible."""


@dataclass(frozen=True)
class Toolkit:
    """A CUDA toolkit: `root/bin/nvcc` exists."""

    root: Path

    @property
    def nvcc(self) -> Path:
        return self.root / "bin" / "nvcc"

    def architectures(self) -> list[int]:
        """Those of ARCHITECTURES that this nvcc knows, lowest first."""
        listed = subprocess.run(
            [self.nvcc, "--list-gpu-arch"], capture_output=True, text=True, check=True
        ).stdout.split()
        return [number for number in ARCHITECTURES if f"compute_{number}" in listed]

    def flags(self, environ: Mapping[str, str]) -> list[str]:
        """Options of a device compile: the exact distribution forbids contraction (`--fmad=false`).

        Kernels differ only by whether fp64 is fast (SPECDIFF_FAST_DOUBLES in platform.h): those of
        data centers have one compilation, for the oldest of them, and the others another. PTX of
        both is for what has no code of its own.
        """
        numbers = self.chosen_architectures(environ)
        fast = [n for n in numbers if n % 10 == 0 and n < 120]
        code = []
        for of in (fast, [n for n in numbers if n not in fast]):
            made = ",".join(f"sm_{n}" for n in of)
            if of:
                code.append(f"-gencode=arch=compute_{of[0]},code=[compute_{of[0]},{made}]")
        host = "-fPIC,-fvisibility=hidden,-ffp-contract=off,-fno-math-errno"
        return ["-O3", "-std=c++17", "--fmad=false", f"-Xcompiler={host}", *code]

    def chosen_architectures(self, environ: Mapping[str, str]) -> list[int]:
        """Those that SPECDIFF_CUDA_ARCHS lists, as in "80;90"; unset: all of `architectures`.

        Raises:
            CudaError: a number that this nvcc does not know, or none is left.
        """
        known = self.architectures()
        if not (listed := environ.get("SPECDIFF_CUDA_ARCHS", "")):
            if not known:
                raise CudaError(
                    f"{self.nvcc} knows none of the architectures {ARCHITECTURES}: "
                    "install a newer CUDA toolkit, or set SPECDIFF_CUDA=0"
                )
            return known
        chosen = sorted({int(n) if n.isdigit() else 0 for n in listed.split(";")})
        if not set(chosen) <= set(known):
            raise CudaError(
                f"SPECDIFF_CUDA_ARCHS is {listed!r}; expected numbers separated by semicolons, of "
                f"those that {self.nvcc} knows: {';'.join(map(str, known))}"
            )
        return chosen


def root_of(nvcc: str) -> Path | None:
    """The toolkit root that `nvcc` itself reports, as it may be a wrapper script or a link."""
    try:
        report = subprocess.run(
            [nvcc, "--dryrun", "-x", "cu", os.devnull], capture_output=True, text=True, timeout=60
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    for line in report.stderr.splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=").strip()).resolve()
    return None


def _candidate_roots(environ: Mapping[str, str], usual: Sequence[str]) -> Iterator[Path]:
    if home := environ.get("CUDA_HOME"):
        yield Path(home)
    if (nvcc := shutil.which("nvcc", path=environ.get("PATH", ""))) and (root := root_of(nvcc)):
        yield root
    yield from map(Path, usual)


def find_toolkit(
    environ: Mapping[str, str], usual: Sequence[str] = CONVENTIONAL_ROOTS
) -> Toolkit | None:
    """The first toolkit of: CUDA_HOME, the one behind the `nvcc` on PATH, the usual folders."""
    toolkits = map(Toolkit, _candidate_roots(environ, usual))
    return next((found for found in toolkits if os.access(found.nvcc, os.X_OK)), None)


def choose_toolkit(
    sources: Sequence[str],
    environ: Mapping[str, str],
    usual: Sequence[str] = CONVENTIONAL_ROOTS,
) -> Toolkit | None:
    """The toolkit to build the CUDA `sources` with, or None to leave them out.

    The variable SPECDIFF_CUDA decides: "0" leaves them out, "1" requires them, unset builds them
    if there is an nvcc. Only nvcc's absence is soft; a failed compile never is.

    Raises:
        CudaError: SPECDIFF_CUDA is "1" and the build is not possible, or it has another value.
    """
    mode = environ.get("SPECDIFF_CUDA", "")
    if mode not in ("", "0", "1"):
        raise CudaError(
            f"SPECDIFF_CUDA is {mode!r}, expected 0 (skip), 1 (required) or unset (if nvcc exists)"
        )
    if mode == "0":
        return None
    if not sources:
        if mode == "1":
            raise CudaError(
                "SPECDIFF_CUDA=1 requires the CUDA kernels, but this version has no CUDA sources "
                "(csrc/cuda/*.cu): unset SPECDIFF_CUDA, or set it to 0"
            )
        return None
    toolkit = find_toolkit(environ, usual)
    if toolkit is None and mode == "1":
        raise CudaError(
            "SPECDIFF_CUDA=1 requires nvcc, and it was found neither through CUDA_HOME "
            f"({environ.get('CUDA_HOME', 'unset')}), nor on PATH, nor in "
            f"{' or '.join(usual)}: install the CUDA toolkit, or set CUDA_HOME to the "
            "folder that holds bin/nvcc, or set SPECDIFF_CUDA=0"
        )
    return toolkit
