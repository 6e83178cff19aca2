"""A model's forward on vectors that this processor need not have.

The sources of csrc/cpu are compiled as for AVX-512, whose vectors the compiler puts together from
narrower ones, and take the place of the native module.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from build_tools.native import ISA_FLAGS, OPENMP
from specdiff_kernels import _C, use_backend
from specdiff_kernels.cpp import cached_attention, decoder_layer, skinny_linear
from tests.compiled import COMPILER, Unit, compiled

HERE = Path(__file__).parent
CSRC = HERE.parents[2] / "csrc"
PER_WIDTH = ("product", "attention", "tokens")
SOURCES = (
    *(CSRC / "cpu" / f"{name}.cpp" for name in PER_WIDTH),
    *(CSRC / "cpu" / f"{name}.cpp" for name in ("decoder_layer", "cached_attention")),
    CSRC / "cpu" / "skinny_linear.cpp",
    HERE / "wide.cpp",
)
FLAGS = [
    *("-O1", "-std=c++17", "-fPIC", "-pthread", "-Wall", "-Wextra", "-Werror", "-Wno-psabi"),
    *("-ffp-contract=fast", "-DSPECDIFF_ISA=wide", "-DSPECDIFF_BYTES=64"),
]
MODULES = (cached_attention, decoder_layer, skinny_linear)


class Library:
    """What the module `_C` has for a model's forward."""

    def __init__(self, path: Path) -> None:
        self.library = ctypes.CDLL(str(path))
        self.library.panels_size.restype = ctypes.c_int64

    def panels_size(self, m: int, k: int) -> int:
        return int(self.library.panels_size(*words(m, k)))

    def skinny_linear(self, *numbers: int) -> None:
        self.library.skinny_linear(*array(numbers)[:1])

    def cached_attention(
        self, numbers: Sequence[int], scale: float, softcap: float, threads: int
    ) -> None:
        self.library.cached_attention(*array(numbers), *floats(scale, softcap), threads)

    def row_norm(
        self, x: int, m: int, k: int, norm: Sequence[int], epsilon: float, offset: float, out: int,
        threads: int,
    ) -> None:  # fmt: skip
        places = (*words(x, m, k), *array(norm), *floats(epsilon, offset), *words(out), threads)
        self.library.row_norm(*places)

    def DecoderLayer(self, numbers: Sequence[int], floats: Sequence[float]) -> tuple[Any, ...]:
        return (*array(numbers), (ctypes.c_float * 6)(*floats))

    def decoder_layer(self, layer: tuple[Any, ...], numbers: Sequence[int], threads: int) -> None:
        self.library.decoder_layer(*layer, *array(numbers), threads)


def words(*numbers: int) -> list[Any]:
    return [ctypes.c_int64(number) for number in numbers]


def floats(*numbers: float) -> list[Any]:
    return [ctypes.c_float(number) for number in numbers]


def array(numbers: Sequence[int]) -> tuple[Any, Any]:
    return (ctypes.c_int64 * len(numbers))(*numbers), ctypes.c_int64(len(numbers))


@cache
def library(*flags: str) -> Library:
    """flags: further ones."""
    if COMPILER is None:
        pytest.skip("no C++ compiler")
    own = ISA_FLAGS["avx2"] if "avx2" in _C.supported_isas() else []
    folders = [HERE, CSRC, CSRC / "include"]
    options = [*FLAGS, *own, *OPENMP, *flags, *(f"-I{folder}" for folder in folders)]
    headers = [*sorted(CSRC.rglob("*.h")), *sorted(HERE.rglob("*.h"))]
    units: list[Unit] = [(source, []) for source in SOURCES]
    return Library(compiled("wide.so", units, options, [*OPENMP, *flags], headers))


@contextmanager
def standing_in(library: Library) -> Iterator[None]:
    """The library in the place of `_C`."""
    with pytest.MonkeyPatch.context() as patch, use_backend("cpp"):
        for module in MODULES:
            patch.setattr(module, "_C", library)
        yield
