"""Only of CUDA: compiled code, launches, workspaces, barriers, the order of blocks."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch

from build_tools.cuda import find_toolkit
from specdiff_kernels import (
    Draft,
    Pages,
    Reveal,
    available_backends,
    backends,
    commit,
    denoise_step,
    row_distribution,
    sample,
    verify,
    workspace_size,
)
from tests import emulator
from tests.emulator import races

from .conftest import forced
from .fusion import fusion_fault
from .helpers import assert_same, installed
from .rounds import B, K, a_round, empty_result

ROOT = Path(__file__).resolve().parents[2]
SOURCES = sorted((ROOT / "csrc" / "cuda").glob("*.cu"))
TOOLKIT = find_toolkit(os.environ)
DEVICES = range(4)
V = 1100  # three parts of a row where there is room for them
needs_nvcc = pytest.mark.skipif(TOOLKIT is None, reason="nvcc is not installed")
needs_compiler = pytest.mark.skipif(emulator.COMPILER is None, reason="needs a C++ compiler")

# --- compiled for GPUs that need not be there ---


def compiled(source: Path, folder: Path, *options: str) -> tuple[str, str]:
    """The output of ptxas for a source, and the PTX."""
    folder.mkdir(parents=True)
    command = [TOOLKIT.nvcc, *TOOLKIT.flags({}), *options, f"-I{ROOT / 'csrc' / 'include'}",
               "-Xptxas=-v", "--keep", f"--keep-dir={folder}", "-c", source, "-o",
               folder / "object.o"]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr, "".join(path.read_text() for path in folder.glob("*.ptx"))


def inexact(ptx: str) -> list[str]:
    """Approximate operations, and those that flush subnormal numbers to 0."""
    return re.findall(r"\b\S+\.approx\S*|\b\S+\.ftz\S*", ptx)


@needs_nvcc
@pytest.mark.slow
def test_compiled_kernels_are_exact_and_spill_nothing(tmp_path):
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = [pool.submit(compiled, source, tmp_path / source.stem) for source in SOURCES]
    for source, job in zip(SOURCES, jobs, strict=True):
        said, ptx = job.result()
        assert fusion_fault(ptx, weighs=source.stem != "commit") is None, source
        assert inexact(ptx) == [], source
        spilled = set(re.findall(r"(\d+) bytes spill", said))
        assert spilled == {"0"}, f"{source}: {said}"
        if source.stem not in ("commit",):  # counters that order what blocks write
            assert "atom.add.acq_rel.gpu.global.u64" in ptx
            assert re.search(r"ld\.global(\.nc)?(\.L\S+)?\.v4", ptx)  # 16 bytes at a time


@needs_nvcc
@pytest.mark.parametrize("change", ["none", "contract", "one fewer", "another factor"])
def test_other_fused_multiply_adds_would_be_seen(change, tmp_path):
    """Those of the formula are there, each once for a weight, and no other."""
    source = next(path for path in SOURCES if path.stem == "sample")
    options = ["-arch=sm_90"]
    if change == "contract":
        options.append("--fmad=true")
    elif change != "none":
        include = tmp_path / "include"
        shutil.copytree(ROOT / "csrc" / "include", include)
        header = include / "specdiff" / "weights.h"
        old = "p = fused(p, f, kCube);"
        new = {"one fewer": "p = p * f + kCube;", "another factor": "p = fused(p, p, kCube);"}
        text = header.read_text()
        assert old in text
        header.write_text(text.replace(old, new[change]))
        options.append(f"-I{include}")
    _, ptx = compiled(source, tmp_path / "compiled", *options)
    fault = fusion_fault(ptx)
    assert (fault is None) == (change == "none"), fault


def test_a_logit_costs_few_instructions():
    """The bounds are in benchmarks/count_instructions.py."""
    script = ROOT / "benchmarks" / "count_instructions.py"
    command = [sys.executable, script, "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode == 2:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(done.stdout.splitlines()) == 4  # two loops of either language


@pytest.mark.skipif(not shutil.which("nm"), reason="needs binutils")
def test_the_module_needs_neither_torch_nor_a_driver():
    module = pytest.importorskip("specdiff_kernels._C_cuda", reason="built without nvcc")
    wanted = subprocess.run(
        ["nm", "-D", "--undefined-only", module.__file__],
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert "PyObject" in wanted
    assert not re.findall(r"torch|c10|\bcuda\w+|\bcu[A-Z]\w+", wanted)
    code = "import specdiff_kernels._C_cuda as C; print(C.workspace_size(1, 10))"
    found = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert int(found.stdout) > 0, found.stderr


# --- on the emulator ---


@pytest.fixture
def steering():
    """The emulator; the ops run on it."""
    with forced(emulator.NAME):
        yield emulator.emulator()
        emulator.use_device(0)


@pytest.fixture
def launches(steering):
    """Counts launches, and those of which all blocks run at once, since it was last asked."""
    seen = [0, 0]

    def count() -> tuple[int, int]:
        now = [steering.launches(), steering.together_launches()]
        new = now[0] - seen[0], now[1] - seen[1]
        seen[:] = now
        return new

    count()
    return count


@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("rule", ["token", "block", "greedy", "coupled", "lenient"])
def test_blocks_may_run_in_any_order(rule, truncated, steering):
    """Neither the order of blocks and threads matters, nor how rows are divided, nor what the
    workspace held."""
    for seed in range(3):
        target, draft, options = a_round(rule, V, seed)
        if truncated:
            options |= {"top_k": torch.tensor([9, 400]), "top_p": torch.tensor([1.0, 0.9])}
        want = verify(target, draft, **options, backend="reference")
        for device in DEVICES:
            steering.seed(seed)
            emulator.use_device(device)
            out = empty_result()
            size = workspace_size(B * (K + 1), V, device="cpu")
            workspace = torch.randint(-(2**63), 2**63 - 1, (size,))
            for _ in range(2):  # the second time the workspace holds what the first left
                verify(target, draft, **options, out=out, workspace=workspace)
                assert_same(out, want)
        assert steering.device() == 0  # as it was before the call


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_weight_of_every_logit_of_16_bits(dtype, steering):
    """All of them in one row, at any place between aligned addresses; in parts that are held on
    chip and parts that are not."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    every = every[every.isfinite()]
    rows = torch.stack([every.roll(shift) for shift in range(9)])[:, 3:]
    for temperature in (1e3, 1.0, 0.07):
        for scaled in (rows, rows * 2.0**-20):
            want = row_distribution(scaled, temperature, backend="reference")
            for device in DEVICES:
                emulator.use_device(device)
                assert_same(row_distribution(scaled, temperature), want)


@pytest.mark.parametrize("rule", ["token", "block", "greedy", "lenient"])
def test_a_verification_is_one_launch_where_there_is_room(rule, launches, steering):
    target, draft, options = a_round(rule, V)
    verify(target, draft, **options)
    assert launches() == (1, 1)
    emulator.use_device(3)
    verify(target, draft, **options)
    assert launches() == (2, 0)
    emulator.use_device(0)
    steering.use_cooperation(False)  # as on a part of a device
    try:
        result = verify(target, draft, **options)
    finally:
        steering.use_cooperation(True)
    assert launches() == (2, 0)
    assert_same(result, verify(target, draft, **options, backend="reference"))


def test_launches_of_the_other_ops(launches):
    target, draft, _ = a_round("token", V)
    zero = torch.zeros(B, dtype=torch.int64)
    verify(target, draft, rule="coupled", seed=zero, position=zero)
    assert launches() == (1, 0)
    distribution = row_distribution(target[:, 0])
    assert launches() == (1, 0)
    sample(target[:, 0], distribution, seed=zero, round=zero)
    assert launches() == (1, 0)
    own = Draft.masked(B, K, draft.logits)._replace(entropy=torch.zeros(B, K).double())
    denoise_step(own, Reveal.sedd(0.5), 0, entropies=True, out=own, seed=zero, round=zero)
    assert launches() == (1, 0)
    denoise_step(own, Reveal.sedd(0.5), 1, seed=zero, round=zero)
    assert launches() == (2, 0)  # one copies the distributions of rows that are not read
    commit(zero, draft.tokens)
    assert launches() == (1, 0)


def test_a_commit_is_one_launch_and_one_for_each_geometry_that_moves(launches):
    zero, emitted = torch.zeros(B, dtype=torch.int64), torch.ones(B, K, dtype=torch.int64)
    pages = Pages.empty(B, 2, 2 * B, block_size=4)
    pages.reserve(zero + 8)
    commit(zero, emitted, pages=pages, release=True)
    assert launches() == (1, 0)
    path = torch.arange(K).expand(B, K) * 2
    commit(zero, emitted, path=path)
    assert launches() == (1, 0)
    paged = [torch.zeros(2 * B, 4, heads, 8) for heads in (1, 1, 2)]
    commit(zero, emitted, path=path, caches=paged, pages=pages)
    assert launches() == (3, 0)
    many = torch.randn(257, B, 1, 8, 1)  # more addresses than a launch takes
    before = many.clone()
    commit(zero, emitted, path=path, caches=[*many])
    assert launches() == (3, 0)
    assert torch.equal(many[:, :, :, :K], before[:, :, :, : 2 * K : 2])
    commit(zero[:0], emitted[:0], path=path[:0], caches=[many[0, :0]])
    assert launches() == (0, 0)


def test_what_tables_hold_does_not_matter(steering):
    """Shared blocks, holes, blocks that do not exist and counts that lie, in any order."""
    rows, columns, blocks = 5, 300, 40  # more columns than a warp looks at at once
    freed = 0
    for seed in range(8):
        torch.manual_seed(seed)
        steering.seed(seed)
        emulator.use_device(seed % 4)
        tables = torch.randint(-3, blocks + 3, (rows, columns), dtype=torch.int32)
        tables[torch.rand(rows, columns) < 0.5 + seed / 16] = -1
        held = torch.bincount(tables[(tables >= 0) & (tables < blocks)], minlength=blocks)
        references = held.int() + (torch.rand(blocks) < 0.2) - (torch.rand(blocks) < 0.2).int()
        count = torch.randint(0, blocks, (1,), dtype=torch.int32)
        pages = Pages(tables, references, torch.arange(blocks).int(), count.clone(), 2)
        want = Pages(*(field.clone() for field in pages[:4]), 2)
        lengths = torch.randint(0, 2, (rows,)) * torch.randint(0, 2 * columns, (rows,))
        emitted = torch.ones(rows, 1, dtype=torch.int64)
        commit(lengths, emitted, pages=pages)
        commit(lengths, emitted, pages=want, backend="reference")
        for name, x, y in zip(Pages._fields[:4], pages, want, strict=False):
            assert torch.equal(x, y), name
        freed += int(want.available - count)
    assert freed > 30


@pytest.mark.parametrize("rule", ["token", "block", "coupled", "lenient"])
def test_rows_behind_the_end_of_a_round_are_left_out(rule, steering):
    """Where blocks run one after another, so that later ones know; then their threads meet less."""
    emulator.use_device(3)
    target, draft, options = a_round(rule, V)
    worked = []
    for rejected in range(K + 1):
        likely = target.clone()
        for i in range(K):  # an accepted token has all the weight, a rejected one has none
            weight = -torch.inf if i == rejected else 50.0
            likely[torch.arange(B), i, draft.tokens[:, i]] = weight
        runs = []
        for seed in range(8):
            steering.seed(seed)
            before = steering.meetings()
            result = verify(likely, draft, **options)
            runs.append(steering.meetings() - before)
            assert result.accepted.tolist() == [rejected] * B
        worked.append(min(runs))  # of a run whose blocks began one after another
    assert worked == sorted(worked)
    assert worked[0] < 0.75 * worked[K - 1]


@needs_compiler
def test_barriers_and_counters_order_everything_and_none_is_too_many():
    """By ThreadSanitizer, which takes the threads of a kernel for threads."""
    if races.library() is None:
        pytest.skip("ThreadSanitizer is not installed")
    found = races.check()
    assert not found["races"]
    assert found["races without order"]
    assert found["barriers"] > 15
    assert found["unneeded"] == []


def test_warps_shuffle_vote_and_reduce(steering):
    """The emulator itself, on two warps at once."""
    x = torch.randperm(64).tolist()
    got = steering.warp_operations(x)
    for thread in range(64):
        first, lane = thread // 32 * 32, thread % 32
        warp = x[first : first + 32]
        assert got[thread] == [
            warp[5],
            warp[lane - 3 if lane >= 3 else lane],
            warp[lane ^ 9],
            sum(warp),
            max(warp),
            sum(value % 2 << at for at, value in enumerate(warp)),
            int(x[40] in warp),
            int(thread < 32),
        ]


def test_a_missing_barrier_is_a_wrong_answer(steering):
    """Of a sum over a block, without any tool that looks for races."""
    source = ROOT / "csrc" / "cuda" / "block.h"
    before, body = source.read_text().split("block_sum(int64_t x, Shared& shared) {")
    lines = body.split("\n}")[0].splitlines()
    last = max(n for n, text in enumerate(lines) if "__syncthreads();" in text)
    logits = torch.randn(4, V)
    want = row_distribution(logits, backend="reference")
    assert_same(row_distribution(logits), want)
    steering.leave_out(str(source), len(before.splitlines()) + last)
    wrong = 0
    for seed in range(10):
        steering.seed(seed)
        wrong += not torch.equal(row_distribution(logits).total, want.total)
    steering.leave_out("", 0)
    assert wrong > 0


def test_few_rows_are_divided_among_many_blocks(steering):
    """Down to one group of eight columns a thread; many rows only as far as they fit on chip."""

    def blocks(rows: int, columns: int, dtype: torch.dtype) -> int:
        logits = torch.zeros(rows, 1, columns, dtype=dtype)
        nothing = torch.zeros(rows, 0, dtype=torch.int64)
        before = steering.blocks()
        verify(logits, Draft(nothing, nothing.int(), nothing), words=torch.zeros(rows, 1).long())
        return steering.blocks() - before

    emulator.use_device(2)
    assert blocks(1, 10 * 512 - 7, torch.float32) == 10
    assert blocks(1, 10 * 512 - 6, torch.float32) == 11
    rows = 50  # two blocks of threads that hold 512 columns of 32 bits, 1024 of 16
    assert blocks(rows, 1024 - 7, torch.float32) == 2 * rows
    assert blocks(rows, 1024 - 7, torch.bfloat16) == 2 * rows
    rows = 100
    assert blocks(rows, 1024 - 7, torch.bfloat16) == rows


def test_no_rows_are_no_launch(launches):
    nothing = torch.zeros(0, dtype=torch.int64)
    distribution = row_distribution(torch.zeros(0, V))
    sample(torch.zeros(0, V), distribution, seed=nothing, round=nothing)
    draft = Draft(nothing.view(0, 2), nothing.view(0, 2).int(), nothing.view(0, 2))
    assert verify(torch.zeros(0, 3, V), draft, seed=nothing, round=nothing).emitted.shape == (0, 3)
    assert launches() == (0, 0)


def test_a_device_without_a_driver_is_no_reason_to_fail(monkeypatch):
    """Another backend is taken, and why is said."""
    cuda = ModuleType("cuda")
    cuda.FUNCTIONS = {"verify": lambda *args, **kwargs: pytest.fail("it was called")}
    cuda.fault = lambda: "CUDA driver version is insufficient"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with installed(triton=None, cuda=cuda):
        assert "driver version is insufficient" in available_backends("cuda")["cuda"]
        function = backends.find("verify", "cuda", None)
    assert function.__module__ == "specdiff_kernels.reference.verify"


def test_a_wrong_workspace_is_named(steering):
    target, draft, options = a_round("token", V)
    size = workspace_size(B * (K + 1), V, device="cpu")
    few = torch.zeros(size - 1, dtype=torch.int64)
    with pytest.raises(ValueError, match=f"workspace: expected at least {size} int64 words"):
        verify(target, draft, **options, out=empty_result(), workspace=few)
