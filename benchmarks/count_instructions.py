"""Instructions that a logit costs in the compiled GPU kernels, by loop. It needs no GPU.

    python benchmarks/count_instructions.py            sm_80, 90 and 100: a table, and JSON
    python benchmarks/count_instructions.py --check    sm_90 and bf16; exit status 1 where a bound
                                                       is exceeded, 2 where a tool is missing

nvcc compiles count_instructions.cu, which has the loops of csrc/cuda and nothing else; Triton
compiles the loops of its kernels ahead of time. The cuobjdump that comes with Triton disassembles
both. CUDA's loops are unrolled, with all logits in registers. So each is compiled over 32 logits a
thread (16 of fp32) and over twice as many, and the difference is counted, outside of the loops that
remain, which are for logits that do not fit and for the ends of a row. Triton's are counted as the
body of the kernel's loop over tiles. A warp issues an instruction for 32 logits at a time.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

from build_tools.cuda import find_toolkit  # noqa: E402

ARCHITECTURES = (80, 90, 100)
DTYPES = {"float32": "kFloat32", "bfloat16": "kBFloat16", "float16": "kFloat16"}
MORE = {"float32": 16, "bfloat16": 32, "float16": 32}  # logits of a thread beyond the half
TILE, WARPS = 4096, 8  # of Triton's
BOUNDS = {  # instructions a logit on sm_90, bf16
    ("cuda", "judged"): 15.0,
    ("cuda", "residual"): 40.0,
    ("triton", "weights"): 20.0,
    ("triton", "maxima"): 6.0,
}
INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,})\*/\s+(.*?);")


class Missing(Exception):
    """A tool that counting needs is not there."""


def disassembler() -> Path:
    try:
        import triton
    except ImportError as error:
        raise Missing("cuobjdump comes with Triton, which is not installed") from error
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        raise Missing(f"this Triton has no {tool}")
    return tool


def disassembled(cubin: Path) -> dict[str, list[tuple[int, str]]]:
    """Addresses and instructions of each kernel, without padding."""
    command = [disassembler(), "-sass", cubin]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels: dict[str, list[tuple[int, str]]] = {}
    for line in text.splitlines():
        if named := re.search(r"Function : (\S+)", line):
            kernels[named[1]] = []
        elif (found := INSTRUCTION.match(line)) and "NOP" not in found[2]:
            kernels[list(kernels)[-1]].append((int(found[1], 16), found[2]))
    return kernels


def loops(kernel: list[tuple[int, str]]) -> list[tuple[int, int]]:
    """First and last address of each loop: a branch back, and what it goes back to."""
    found = []
    for address, text in kernel:
        target = re.search(r"\bBRA\b.*?(0x[0-9a-f]+)", text)
        # the last branch of a kernel is to itself
        if target and int(target[1], 16) < address:
            found.append((int(target[1], 16), address))
    return found


def straight(kernel: list[tuple[int, str]]) -> int:
    """Instructions outside of all loops."""
    inside = loops(kernel)
    return sum(not any(a <= at <= b for a, b in inside) for at, _ in kernel)


def body(kernel: list[tuple[int, str]]) -> int:
    """Instructions of the longest loop."""
    first, last = max(loops(kernel), key=lambda loop: loop[1] - loop[0])
    return sum(first <= at <= last for at, _ in kernel)


# --- CUDA ---


def cuda_counts(arch: int, dtype: str) -> dict[str, float]:
    """Instructions a logit of the counted CUDA loops."""
    toolkit = find_toolkit(os.environ)
    if toolkit is None:
        raise Missing("nvcc is not installed")
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "counted.cubin"
        source = ROOT / "benchmarks" / "count_instructions.cu"
        command = [toolkit.nvcc, "-O3", "-std=c++17", "--fmad=false", f"-arch=sm_{arch}", "-cubin",
                   f"-DSPECDIFF_COUNTED={DTYPES[dtype]}", f"-I{ROOT / 'csrc' / 'include'}", source,
                   "-o", cubin]  # fmt: skip
        subprocess.run(command, check=True)
        kernels = disassembled(cubin)
    return {
        name: (straight(kernels[name]) - straight(kernels[f"{name}_half"])) / MORE[dtype]
        for name in ("judged", "residual")
    }


# --- Triton ---


def triton_kernels() -> dict[str, Any]:
    """The loops of Triton's kernels over the tiles of a row, each in a kernel of its own."""
    import triton
    import triton.language as tl

    from specdiff_kernels.triton.numerics import own_weight, weigher_of
    from specdiff_kernels.triton.row import load_tile, read_distribution, store_tile_max
    from specdiff_kernels.types import RowDistribution

    @triton.jit
    def weights(row, max, scale, threshold, total, status, out, V, tiles, TILE: tl.constexpr):
        arrays = RowDistribution(max, scale, threshold, total, status)
        by = weigher_of(read_distribution(arrays, 0))
        for tile in range(tiles):
            _, logits = load_tile(row, V, tile, TILE)
            tl.store(out + tile, tl.sum(own_weight(logits, by)))

    @triton.jit
    def maxima(row, max, scale, threshold, total, status, out, V, tiles, TILE: tl.constexpr):
        for tile in range(tiles):
            store_tile_max(out, row, V, tile, TILE)

    scope = weights.fn.__globals__
    scope |= {
        "tl": tl, "own_weight": own_weight, "weigher_of": weigher_of, "load_tile": load_tile,
        "read_distribution": read_distribution, "store_tile_max": store_tile_max,
        "RowDistribution": RowDistribution,
    }  # fmt: skip
    return {"weights": weights, "maxima": maxima}


def triton_counts(arch: int, dtype: str) -> dict[str, float]:
    """Instructions a logit of the counted Triton loops."""
    from triton import compile
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    pointer = {"float32": "*fp32", "bfloat16": "*bf16", "float16": "*fp16"}[dtype]
    signature = {"row": pointer, "max": "*fp32", "scale": "*fp32", "threshold": "*i64",
                 "total": "*i64", "status": "*i32", "out": "*i64", "V": "i32", "tiles": "i32",
                 "TILE": "constexpr"}  # fmt: skip
    counts = {}
    for name, kernel in triton_kernels().items():
        source = ASTSource(
            fn=kernel, signature=signature, constexprs={(9,): TILE},
            attrs={(0,): [["tt.divisibility", 16]], (7,): [["tt.divisibility", 16]]},
        )  # fmt: skip
        options = {"num_warps": WARPS, "enable_fp_fusion": False}
        compiled = compile(source, target=GPUTarget("cuda", arch, 32), options=options)
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            (found,) = disassembled(Path(file.name)).values()
        counts[name] = body(found) / (TILE / (32 * WARPS))
    return counts


def compilers() -> dict[str, str]:
    import triton

    toolkit = find_toolkit(os.environ)
    assert toolkit is not None
    said = subprocess.run([toolkit.nvcc, "--version"], capture_output=True, text=True).stdout
    release = re.search(r"release ([\d.]+)", said)
    return {"nvcc": release[1] if release else "unknown", "Triton": triton.__version__}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare sm_90 with the bounds")
    arguments = parser.parse_args()
    os.environ.pop("TRITON_INTERPRET", None)
    found: list[dict[str, Any]] = []
    try:
        for arch in [90] if arguments.check else ARCHITECTURES:
            for dtype in ["bfloat16"] if arguments.check else DTYPES:
                for language, count in (("cuda", cuda_counts), ("triton", triton_counts)):
                    for loop, instructions in count(arch, dtype).items():
                        found.append({"arch": arch, "dtype": dtype, "language": language,
                                      "loop": loop, "instructions": instructions})  # fmt: skip
                        print(f"sm_{arch} {dtype:9} {language:6} {loop:9} {instructions:5.1f}")
    except Missing as error:
        print(f"count_instructions: {error}", file=sys.stderr)
        sys.exit(2)
    if not arguments.check:
        from machine import save

        content = {
            "command": "python benchmarks/count_instructions.py",
            "compilers": compilers(),
            "cases": found,
        }
        print(save("instructions", content))
    bounds = [(f, BOUNDS[f["language"], f["loop"]]) for f in found
              if f["arch"] == 90 and f["dtype"] == "bfloat16"]  # fmt: skip
    over = [f"{f['language']} {f['loop']}: {f['instructions']:.1f} a logit, at most {most}"
            for f, most in bounds if f["instructions"] > most]  # fmt: skip
    sys.exit("\n".join(over) or None)


if __name__ == "__main__":
    main()
