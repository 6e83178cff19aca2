"""`skinny_linear` on vectors that this processor need not have."""

from __future__ import annotations

import ctypes
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from specdiff_kernels import pack_weight
from specdiff_kernels.fields import DTYPES

from .products import NAN, SHAPES, inputs, rms

CSRC = Path(__file__).parents[2] / "csrc"


class Params(ctypes.Structure):
    """SkinnyLinearParams of csrc/include/specdiff/params.h."""

    _fields_ = [
        (name, {"p": ctypes.c_void_p, "i": ctypes.c_int32, "l": ctypes.c_int64}[kind])
        for name, kind in (
            ("x", "p"), ("m", "l"), ("k", "l"), ("x_stride", "l"),
            ("weight", "p"), ("weight_dtype", "i"), ("packed", "i"), ("n", "l"),
            ("weight_stride", "l"), ("bias", "p"), ("out", "p"), ("x_columns", "p"),
            ("threads", "i"),
        )
    ]  # fmt: skip


@pytest.fixture(scope="module")
def wide_product(tmp_path_factory):
    """The code of AVX-512's width, its vectors put together by the compiler from narrower ones."""
    if shutil.which("g++") is None:
        pytest.skip("no g++")
    folder = tmp_path_factory.mktemp("wide")
    (folder / "wide.cpp").write_text(
        '#include "cpu/product.cpp"\n'
        'extern "C" void run(const specdiff::SkinnyLinearParams* p) {\n'
        "  specdiff::cpu::product_of(*p, 0, p->n);\n}\n"
    )
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-Wno-psabi", "-DSPECDIFF_ISA=wide"]
    folders = [f"-I{CSRC}", f"-I{CSRC / 'cpu'}", f"-I{CSRC / 'include'}"]
    command = ["g++", *flags, "-DSPECDIFF_BYTES=64", *folders, "wide.cpp", "-o", "wide.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "wide.so")).run


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("N", "K"), SHAPES)
def test_512_bit_vectors_without_such_a_processor(wide_product, N, K, dtype):
    """As exact as torch, and rows as alone, for every number of rows in registers and tail."""
    x, weight, bias = inputs(32, N, K, dtype)

    def product(x, weight=weight):
        out, columns = torch.full((len(x), N), NAN), x.t().contiguous()
        wide_product(ctypes.byref(Params(
            x.data_ptr(), len(x), K, K, weight.data_ptr(), DTYPES[dtype], weight.ndim == 3, N, K,
            bias.data_ptr(), out.data_ptr(), columns.data_ptr(), 1,
        )))  # fmt: skip
        return out

    exact = F.linear(x.double(), weight.double(), bias.double())
    allowed = 2 * rms(F.linear(x, weight.float(), bias) - exact) + 2.0**-23 * rms(exact)
    assert rms(product(x) - exact) <= allowed
    alone = torch.cat([product(row[None]) for row in x])
    for M in (2, 3, 4, 5, 6, 7, 13, 32):
        assert torch.equal(product(x[:M]), alone[:M]), M
        assert torch.equal(product(x[:M], pack_weight(weight).packs), alone[:M]), M
