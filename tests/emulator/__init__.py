"""Backend "cuda-emulated": the CUDA kernels on a CPU, for tests.

The sources of csrc/cuda are compiled by the C++ compiler against `emulator.h`, and registered
beside the backends of the package.
"""

from __future__ import annotations

import importlib.util
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.machinery import ExtensionFileLoader
from pathlib import Path
from types import ModuleType

import pybind11
import pytest

import specdiff_kernels
from build_tools.native import FLAGS
from specdiff_kernels import backends
from tests.compiled import COMPILER, compiled

NAME = "cuda-emulated"
ROOT = Path(__file__).resolve().parents[2]
HERE = Path(__file__).parent
CSRC = ROOT / "csrc"
EMULATED = [
    *FLAGS,
    "-O2",
    "-fPIC",
    "-fno-strict-aliasing",  # workspaces are words and structs of words
    "-U_FORTIFY_SOURCE",  # which takes a jump to another fiber's stack for an attack
    "-DSPECDIFF_EMULATED",
    "-Wno-unknown-pragmas",
]
RACES = ["-DSPECDIFF_RACES"]


def build(*, races: bool) -> Path:
    """The module of kernels and emulator, compiled once for each state of the sources.

    races: whether ThreadSanitizer watches the kernels.
    """
    watched, tell = (["-fsanitize=thread"], RACES) if races else ([], [])
    units = [(kernel, [*tell, *watched]) for kernel in sorted((CSRC / "cuda").glob("*.cu"))]
    units += [(other, tell) for other in (CSRC / "bindings" / "cuda.cpp", HERE / "emulator.cpp")]
    folders = [CSRC / "include", HERE, pybind11.get_include(), sysconfig.get_path("include")]
    options = [*EMULATED, *(f"-I{folder}" for folder in folders)]
    headers = [*sorted(CSRC.rglob("*.h")), HERE / "emulator.h"]
    name = f"emulator{sysconfig.get_config_var('EXT_SUFFIX')}"
    return compiled(name, units, options, watched, headers)


def load_extension(name: str, path: Path) -> ModuleType:
    loader = ExtensionFileLoader(name, str(path))
    spec = importlib.util.spec_from_file_location(name, path, loader=loader)
    module = importlib.util.module_from_spec(spec)
    loader.exec_module(module)
    return module


@cache
def emulator(*, races: bool = False) -> ModuleType:
    """The module that steers the emulator: seeds, barriers to leave out, counts of launches."""
    return load_extension("emulator", build(races=races))


@cache
def register(*, races: bool = False) -> None:
    """Let `backend="cuda-emulated"` run the package's CUDA backend on the emulator."""
    native = load_extension("_C_cuda", build(races=races))
    package = f"specdiff_kernels.{NAME}"
    folder = Path(specdiff_kernels.__file__).parent / "cuda"
    spec = importlib.util.spec_from_file_location(
        package, folder / "__init__.py", submodule_search_locations=[str(folder)]
    )
    module = importlib.util.module_from_spec(spec)
    sys.modules[f"{package}.native"] = native
    sys.modules[package] = module
    spec.loader.exec_module(module)
    backends.NAMES = (*backends.NAMES, NAME)
    backends.ORDER = backends.ORDER | {"cpu": (*backends.ORDER["cpu"], NAME)}
    backends.REMEDIES[NAME] = "it is part of the tests"


def require() -> None:
    """Register, or skip the test."""
    if COMPILER is None:
        pytest.skip("the emulator needs a C++ compiler")
    register()


def use_device(index: int) -> None:
    """Run on one of the emulated devices: of 96, 32, 200 and 4 multiprocessors."""
    launch = sys.modules[f"specdiff_kernels.{NAME}.launch"]
    launch.stream_of = lambda device: (index, 0)


@contextmanager
def on_device(index: int) -> Iterator[None]:
    """The same, for a while."""
    require()
    use_device(index)
    try:
        yield
    finally:
        use_device(0)


@contextmanager
def forced() -> Iterator[None]:
    """The ops run on the emulator."""
    require()
    with backends.use_backend(NAME):
        yield
