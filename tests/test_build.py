"""The build: which CUDA toolkit is taken, what the native objects may contain, what is packaged."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from build_tools import cuda
from build_tools.native import (
    FLAGS,
    INSTALL_COMPILER,
    ISA_FLAGS,
    PER_ISA,
    is_x86,
    isa_flags,
    workers,
)
from specdiff.drafters import SHIPPED

TILE = "csrc/cpu/tile.cpp"  # the distribution
ROOT = Path(__file__).resolve().parents[1]
SOURCES = ["csrc/cuda/verify.cu"]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))

needs_x86_compiler = pytest.mark.skipif(
    COMPILER is None or not is_x86() or not shutil.which("nm") or not shutil.which("objdump"),
    reason="needs a C++ compiler and binutils on x86",
)


def script(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text)
    path.chmod(0o755)
    return path


def fake_toolkit(root: Path) -> Path:
    """A folder whose bin/nvcc answers as nvcc does."""
    script(
        root / "bin" / "nvcc",
        'case "$1" in\n'
        f"  --dryrun) echo '#$ TOP={root}/bin/..' >&2 ;;\n"
        "  --list-gpu-arch) printf 'compute_%s\\n' 75 80 86 90 ;;\n"
        "esac\n",
    )
    return root


def test_toolkit_root_is_found_behind_a_wrapper_script(tmp_path: Path) -> None:
    root = fake_toolkit(tmp_path / "cuda-13.0")
    wrapper = script(tmp_path / "bin" / "nvcc", f'exec {root}/bin/nvcc "$@"\n')
    assert cuda.root_of(str(wrapper)) == root
    assert cuda.find_toolkit({"PATH": str(wrapper.parent)}) == cuda.Toolkit(root)


def test_cuda_home_comes_before_path(tmp_path: Path) -> None:
    home, other = fake_toolkit(tmp_path / "home"), fake_toolkit(tmp_path / "other")
    environ = {"CUDA_HOME": str(home), "PATH": str(other / "bin")}
    assert cuda.find_toolkit(environ) == cuda.Toolkit(home)


def test_conventional_roots_come_last(tmp_path: Path) -> None:
    usual, on_path = fake_toolkit(tmp_path / "usual"), fake_toolkit(tmp_path / "on-path")
    assert cuda.find_toolkit({"PATH": ""}, [str(usual)]) == cuda.Toolkit(usual)
    found = cuda.find_toolkit({"PATH": str(on_path / "bin")}, [str(usual)])
    assert found == cuda.Toolkit(on_path)


def test_an_nvcc_that_reports_no_root_is_not_taken(tmp_path: Path) -> None:
    script(tmp_path / "nvcc", "exit 1\n")
    assert cuda.find_toolkit({"PATH": str(tmp_path)}, usual=()) is None


@pytest.mark.parametrize("mode", [{}, {"SPECDIFF_CUDA": ""}, {"SPECDIFF_CUDA": "0"}])
def test_without_nvcc_the_cuda_kernels_are_left_out(mode: dict[str, str]) -> None:
    assert cuda.choose_toolkit(SOURCES, {"PATH": "", **mode}, usual=()) is None


def test_without_nvcc_required_cuda_is_an_error_that_says_what_to_do() -> None:
    with pytest.raises(cuda.CudaError, match=r"requires nvcc.*CUDA_HOME.*SPECDIFF_CUDA=0"):
        cuda.choose_toolkit(SOURCES, {"PATH": "", "SPECDIFF_CUDA": "1"}, usual=["/nowhere"])


def test_with_nvcc_the_variable_decides(tmp_path: Path) -> None:
    root = fake_toolkit(tmp_path / "cuda")
    environ = {"CUDA_HOME": str(root), "PATH": ""}
    assert cuda.choose_toolkit(SOURCES, environ) == cuda.Toolkit(root)
    assert cuda.choose_toolkit(SOURCES, {**environ, "SPECDIFF_CUDA": "1"}) == cuda.Toolkit(root)
    assert cuda.choose_toolkit(SOURCES, {**environ, "SPECDIFF_CUDA": "0"}) is None


def test_without_cuda_sources_there_is_nothing_to_build(tmp_path: Path) -> None:
    environ = {"CUDA_HOME": str(fake_toolkit(tmp_path / "cuda")), "PATH": ""}
    assert cuda.choose_toolkit([], environ) is None
    with pytest.raises(cuda.CudaError, match="this version has no CUDA sources"):
        cuda.choose_toolkit([], {**environ, "SPECDIFF_CUDA": "1"})


def test_an_unknown_value_of_the_variable_is_an_error() -> None:
    with pytest.raises(cuda.CudaError, match="'yes', expected 0"):
        cuda.choose_toolkit(SOURCES, {"PATH": "", "SPECDIFF_CUDA": "yes"})


def targets(root: Path, environ: dict[str, str]) -> list[str]:
    flags = cuda.Toolkit(fake_toolkit(root)).flags(environ)
    assert "--fmad=false" in flags
    return [flag.removeprefix("-gencode=") for flag in flags if "gencode" in flag]


def test_device_code_is_made_for_the_architectures_that_nvcc_knows(tmp_path: Path) -> None:
    assert targets(tmp_path, {}) == [
        "arch=compute_80,code=[compute_80,sm_80,sm_90]",
        "arch=compute_86,code=[compute_86,sm_86]",
    ]


def test_device_code_is_made_for_the_architectures_asked_for(tmp_path: Path) -> None:
    only = ["arch=compute_90,code=[compute_90,sm_90]"]
    assert targets(tmp_path, {"SPECDIFF_CUDA_ARCHS": "90"}) == only
    for wrong in ("70", "90;hopper", "80,90"):
        with pytest.raises(cuda.CudaError, match=f"ARCHS is '{wrong}'; expected .* 80;86;90$"):
            targets(tmp_path, {"SPECDIFF_CUDA_ARCHS": wrong})


@pytest.mark.parametrize(("gibibytes", "expected"), [(3.5, 3), (64, 8), (0.5, 1)])
def test_compiles_at_once_are_bounded_by_memory(monkeypatch, gibibytes: float, expected: int):
    sizes = {"SC_PHYS_PAGES": int(gibibytes * 2**18), "SC_PAGE_SIZE": 2**12}
    monkeypatch.setattr(os, "sysconf", sizes.__getitem__)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    assert workers() == expected


def disassembled(output: Path) -> str:
    command = ["objdump", "-d", output]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def fused(code: str) -> list[str]:
    """The operands of each fused multiply-add: packed or single, floats or doubles."""
    return re.findall(r"\bvfn?m(?:add|sub)\d+([ps][sd])\b", code)


@needs_x86_compiler
def test_a_compiler_that_fuses_would_be_seen(tmp_path: Path) -> None:
    output = tmp_path / "object.o"
    flags = [*FLAGS, *isa_flags(TILE, "avx2"), "-ffp-contract=fast", "-fPIC", "-Icsrc/include"]
    subprocess.run([COMPILER, *flags, "-c", TILE, "-o", output], cwd=ROOT, check=True)
    assert "pd" in fused(disassembled(output))


@needs_x86_compiler
@pytest.mark.parametrize("source", list(PER_ISA))
@pytest.mark.parametrize("isa", list(ISA_FLAGS))
def test_what_is_compiled_for_one_instruction_set(source: str, isa: str, tmp_path: Path) -> None:
    """Of the distribution's own loops only weights have fused multiply-adds, which are fp32: one in
    fp64 would change the distribution. A weak symbol could replace the baseline's copy of the same
    function at link time, and fault on a processor without the instruction set."""
    output = tmp_path / "object.o"
    flags = [*FLAGS, *isa_flags(source, isa), "-fPIC", "-Icsrc/include"]
    subprocess.run([COMPILER, *flags, "-c", source, "-o", output], cwd=ROOT, check=True)

    code = disassembled(output)
    assert bool(fused(code)) == (isa != "plain")
    if source == TILE:
        assert set(fused(code)) <= {"ps", "ss"}
    if isa != "plain":
        register = {"avx2": "%ymm", "avx512": "%zmm"}[isa]
        assert register in code, "not vectorised for its instruction set"

    symbols = subprocess.run(["nm", output], capture_output=True, text=True, check=True)
    assert not [line for line in symbols.stdout.splitlines() if line.split()[-2] in "VWu"]


def build(tree: Path, command: str, *options: str, **environ: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", command, *options],
        cwd=tree,
        env={**os.environ, **environ},
        capture_output=True,
        text=True,
    )


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the build with next to nothing to compile."""
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "README.md").touch()
    shutil.copytree(ROOT / "build_tools", tmp_path / "build_tools")
    for package in ("python/specdiff_kernels", "python/specdiff"):
        (tmp_path / package).mkdir(parents=True)
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "csrc" / "cpu").mkdir(parents=True)
    (tmp_path / "csrc" / "bindings").mkdir()
    (tmp_path / "csrc" / "bindings" / "cpu.cpp").touch()
    for source in PER_ISA:
        (tmp_path / source).touch()
    return tmp_path


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
def test_a_failed_compile_is_an_error(tree: Path) -> None:
    (tree / TILE).write_text("#error this file does not compile\n")
    result = build(tree, "build_ext", "--build-lib", "out", SPECDIFF_CUDA="0")
    assert result.returncode != 0
    assert "this file does not compile" in result.stderr
    assert not list((tree / "out").rglob("_C*"))


@pytest.mark.parametrize(
    ("environ", "first", "last"),
    [
        ({"CXX": "no-g++"}, "needs a C++17 compiler, but there is no no-g++:", INSTALL_COMPILER),
        ({"CXX": "false"}, "false failed, for the reason that it gives", INSTALL_COMPILER),
        ({"PYTHONPATH": "without"}, "the build needs pybind11", "leave out --no-build-isolation"),
        ({"SPECDIFF_CUDA": "1"}, "SPECDIFF_CUDA=1 requires the CUDA kernels", "set it to 0"),
        ({"CUDA_HOME": "cuda", "SPECDIFF_CUDA": "1"}, "cuda/bin/nvcc failed", "kernels out"),
    ],
    ids=["no compiler", "another program", "no pybind11", "no CUDA", "nvcc"],
)
def test_what_a_build_lacks_is_the_last_that_is_said(tree: Path, environ, first, last) -> None:
    (tree / "without" / "pybind11").mkdir(parents=True)
    (tree / "without" / "pybind11" / "__init__.py").write_text("raise ImportError\n")
    if "CUDA_HOME" in environ:
        with (fake_toolkit(tree / "cuda") / "bin" / "nvcc").open("a") as nvcc:
            nvcc.write('case "$1" in -*arch) ;; *) exit 1 ;; esac\n')
        (tree / "csrc" / "cuda").mkdir()
        (tree / "csrc" / "cuda" / "verify.cu").touch()
        (tree / "csrc" / "bindings" / "cuda.cpp").touch()
    result = build(tree, "build_ext", "--build-lib", "out", **{"SPECDIFF_CUDA": "0", **environ})
    assert result.returncode == 1 and "Traceback" not in result.stderr
    _, message = result.stderr.split("error: ")
    assert first in message and message.endswith(f"{last}\n")


@pytest.mark.slow
@pytest.mark.skipif(
    COMPILER is None or not shutil.which("nvcc"), reason="needs a C++ compiler and nvcc"
)
def test_cuda_sources_become_a_module_that_loads_without_a_driver(tree: Path) -> None:
    (tree / "csrc" / "cuda").mkdir()
    (tree / "csrc" / "cuda" / "answer.cu").write_text(
        "__global__ void kernel(int* x) { *x = 42; }\n"
        "int answer(int* x) { kernel<<<1, 1>>>(x); return cudaGetLastError() >= 0 ? 42 : 0; }\n"
    )
    (tree / "csrc" / "bindings" / "cuda.cpp").write_text(
        "#include <pybind11/pybind11.h>\n"
        "int answer(int* x);\n"
        'PYBIND11_MODULE(_C_cuda, m) { m.def("answer", [] { return answer(nullptr); }); }\n'
    )
    result = build(tree, "build_ext", "--inplace", SPECDIFF_CUDA="1")
    assert result.returncode == 0, result.stderr
    code = "from specdiff_kernels import _C_cuda; print(_C_cuda.answer())"
    loaded = subprocess.run(
        [sys.executable, "-c", code], cwd=tree / "python", capture_output=True, text=True
    )
    assert loaded.stdout.strip() == "42", loaded.stderr


@pytest.mark.skipif(not shutil.which("make"), reason="needs make")
def test_what_clean_removes_is_built_again() -> None:
    """`make test` builds where there is no stamp."""
    command = ["make", "-n", "clean", "VENV=some"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "python/specdiff_kernels/*.so" in done.stdout
    assert {"some/run.stamp", "some/dev.stamp"} <= set(done.stdout.split())


def test_both_packages_and_the_shipped_drafters_are_packaged(tmp_path: Path) -> None:
    result = build(ROOT, "build_py", "--build-lib", str(tmp_path), SPECDIFF_CUDA="0")
    assert result.returncode == 0, result.stderr
    packaged = {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()}
    drafters = [f"specdiff/weights/{name}" for name in SHIPPED.values()]
    files = ("config.json", "model.safetensors")
    assert packaged >= {f"{drafter}/{file}" for drafter in drafters for file in files}
    assert packaged >= {
        "specdiff/cli/main.py",
        "specdiff/py.typed",
        "specdiff/training/prompts.txt",
        "specdiff/training/held_out_prompts.jsonl",
        "specdiff/drafters/__init__.py",
        "specdiff_kernels/py.typed",
        "specdiff_kernels/reference/verify.py",
    }
    assert {path.split("/")[0] for path in packaged} == {"specdiff", "specdiff_kernels"}
