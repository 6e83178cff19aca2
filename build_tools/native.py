"""Compiles csrc/ into `specdiff_kernels._C` and, if there is an nvcc, `specdiff_kernels._C_cuda`.

Nothing of torch is needed. The files of csrc/cpu are compiled for the baseline instruction set,
except those of PER_ISA: once for each entry of ISA_FLAGS, and the best is chosen at run time.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from glob import glob
from pathlib import Path

from setuptools import Extension
from setuptools.command.build_ext import build_ext
from setuptools.errors import CCompilerError, ExecError

from .cuda import Toolkit, choose_toolkit

# One distribution on every machine: no contraction, no reassociation.
FLAGS = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-ffp-contract=off",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fvisibility=hidden",
    "-pthread",
]
ISA_FLAGS = {
    "plain": [],
    "avx2": ["-mavx2", "-mf16c", "-mfma"],
    "avx512": [
        *("-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl", "-mf16c", "-mfma"),
        "-mprefer-vector-width=512",
    ],
}
# Files that are compiled for every instruction set, with flags of their own.
PER_ISA = {
    # scheduled before registers are assigned, which keeps the vectors of lanes.h side by side
    os.path.join("csrc", "cpu", "tile.cpp"): ["-fschedule-insns"],
    # no part of the distribution, so they may contract
    os.path.join("csrc", "cpu", "product.cpp"): ["-ffp-contract=fast"],
    os.path.join("csrc", "cpu", "attention.cpp"): ["-ffp-contract=fast"],
    os.path.join("csrc", "cpu", "tokens.cpp"): ["-ffp-contract=fast"],
    os.path.join("csrc", "cpu", "divergence.cpp"): ["-ffp-contract=fast", "-fschedule-insns"],
}
OPENMP = ["-fopenmp"] if sys.platform == "linux" else []
INSTALL_COMPILER = """\
  Debian, Ubuntu: sudo apt install g++ python3-dev
  Fedora:         sudo dnf install gcc-c++ python3-devel
  macOS:          xcode-select --install
CXX=COMPILER in the environment names another one."""


def is_x86() -> bool:
    return platform.machine() in ("x86_64", "AMD64")


def cpu_units() -> list[tuple[str, str, list[str]]]:
    """(source, folder of its object file, its own flags) of each compile of `_C`."""
    isas = list(ISA_FLAGS) if is_x86() else ["plain"]
    common = OPENMP if is_x86() else [*OPENMP, "-DSPECDIFF_ONLY_PLAIN"]
    several = [(source, isa, isa_flags(source, isa)) for source in PER_ISA for isa in isas]
    others = sorted({*glob("csrc/cpu/*.cpp"), "csrc/bindings/cpu.cpp"} - {*PER_ISA})
    # The bindings take longest: first.
    return [(source, "baseline", common) for source in others] + several


def isa_flags(source: str, isa: str) -> list[str]:
    """Flags of a file of PER_ISA for one instruction set."""
    return [f"-DSPECDIFF_ISA={isa}", *ISA_FLAGS[isa], *PER_ISA[source]]


def extensions() -> list[Extension]:
    """Native modules that can be built here. The folder `csrc` is in the current directory."""
    headers = sorted(
        header
        for folder in ("include/specdiff", "cpu", "bindings")
        for header in glob(f"csrc/{folder}/*.h")
    )
    cpu = Extension(
        "specdiff_kernels._C",
        sorted({source for source, _, _ in cpu_units()}),
        depends=headers,
        language="c++",
    )
    # the largest first, as it takes longest
    cuda_sources = sorted(glob("csrc/cuda/*.cu"), key=os.path.getsize, reverse=True)
    toolkit = choose_toolkit(cuda_sources, os.environ)
    if toolkit is None:
        return [cpu]
    print(f"CUDA kernels: {toolkit.nvcc}")
    cuda = Extension(
        "specdiff_kernels._C_cuda",
        ["csrc/bindings/cuda.cpp", *cuda_sources],
        depends=[*headers, *sorted(glob("csrc/cuda/*.h"))],
        language="c++",
    )
    cuda.toolkit = toolkit
    return [cpu, cuda]


def workers() -> int:
    """Compiles at once: one for each processor, and for each GiB of memory."""
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):  # not on this system
        memory = 2**30
    return max(1, min(os.cpu_count() or 1, memory // 2**30))


class BuildNative(build_ext):
    """`build_ext` that compiles in parallel and gives each object file its own flags.

    Errors are a SystemExit, so that their message is the last that is printed, without a traceback.
    """

    def build_extensions(self) -> None:
        compiler = self.compiler.compiler_so_cxx[0]
        if not shutil.which(compiler):
            raise SystemExit(
                f"error: specdiff-kernels needs a C++17 compiler, but there is no {compiler}:\n"
                f"{INSTALL_COMPILER}"
            )
        try:
            import pybind11
        except ImportError:
            raise SystemExit(
                "error: the build needs pybind11: pip install pybind11, or leave out "
                "--no-build-isolation"
            ) from None
        for folder in ("csrc/include", pybind11.get_include()):
            self.compiler.add_include_dir(folder)
        try:
            super().build_extensions()
        except (CCompilerError, ExecError) as error:
            raise SystemExit(
                f"error: {compiler} failed, for the reason that it gives above. specdiff-kernels "
                f"needs a C++17 compiler and Python's headers:\n{INSTALL_COMPILER}"
            ) from error
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"error: {error.cmd[0]} failed, for the reason that it gives above; "
                "SPECDIFF_CUDA=0 leaves the CUDA kernels out"
            ) from error

    def build_extension(self, ext: Extension) -> None:
        toolkit: Toolkit | None = getattr(ext, "toolkit", None)
        target = Path(self.get_ext_fullpath(ext.name))
        target.parent.mkdir(parents=True, exist_ok=True)
        if toolkit is None:
            objects = self._compile([partial(self._compile_cpp, *unit) for unit in cpu_units()])
            self.compiler.link_shared_object(
                objects, str(target), extra_postargs=["-pthread", *OPENMP], target_lang="c++"
            )
            return
        bindings, *kernels = ext.sources
        flags = toolkit.flags(os.environ)
        jobs = [partial(self._compile_cuda, toolkit, flags, kernel) for kernel in kernels]
        objects = self._compile([*jobs, partial(self._compile_cpp, bindings, "cuda", [])])
        subprocess.run(
            [toolkit.nvcc, "-shared", "-cudart=static", *objects, "-o", target], check=True
        )

    def _compile(self, jobs: list[Callable[[], str]]) -> list[str]:
        with ThreadPoolExecutor(workers()) as pool:
            return list(pool.map(lambda job: job(), jobs))

    def _compile_cpp(self, source: str, folder: str, flags: list[str]) -> str:
        (output,) = self.compiler.compile(
            [source],
            output_dir=os.path.join(self.build_temp, folder),
            extra_postargs=[*FLAGS, *flags],
        )
        return output

    def _compile_cuda(self, toolkit: Toolkit, flags: list[str], source: str) -> str:
        output = Path(self.build_temp, "cuda", source).with_suffix(".o")
        output.parent.mkdir(parents=True, exist_ok=True)
        command = [toolkit.nvcc, *flags, "-Icsrc/include", "-c", source, "-o", output]
        subprocess.run(command, check=True)
        return str(output)
