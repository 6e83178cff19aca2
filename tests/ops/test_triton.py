"""Only of Triton: compiled code, launches, workspaces, the order of programs, streams."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch

from specdiff_kernels import (
    RULES,
    Draft,
    Pages,
    Reveal,
    backends,
    commit,
    denoise_step,
    row_distribution,
    sample,
    verify,
    workspace_size,
)
from specdiff_kernels.backends import interprets_triton
from tests.operators import Operators

from .conftest import forced
from .helpers import assert_same, i64
from .interpreter import in_any_order
from .races import watching
from .rounds import B, K, a_round, cache_commits, empty_result, every_op

triton = pytest.importorskip("triton", reason="triton is not installed")
ARCHITECTURES = (80, 90, 100, 120)
V = 70
KERNEL = (
    triton.runtime.interpreter.InterpretedFunction if interprets_triton() else triton.JITFunction
)
interpreted = pytest.mark.skipif(not interprets_triton(), reason="Triton is not interpreted")

# --- compiled for GPUs that need not be there ---


def compiled(*arguments: str) -> list[dict]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.ops.compile_triton", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def all_compiled():
    """Two architectures at a time."""
    with ThreadPoolExecutor(2) as pool:
        yield {arch: pool.submit(compiled, str(arch)) for arch in ARCHITECTURES}


@pytest.mark.parametrize("arch", ARCHITECTURES)
def test_compiled_kernels_are_exact_and_spill_nothing(all_compiled: dict[int, Future], arch):
    kernels = all_compiled[arch].result()
    assert {kernel["kernel"] for kernel in kernels} == {
        "advance", "end_round", "give_back", "judge", "maxima", "move", "race_rows", "reveal_rows",
        "search", "sums", "tokens",
    }  # fmt: skip
    for kernel in kernels:
        assert kernel["fusion_fault"] is None, kernel
        if kernel["kernel"] == "maxima":  # NaN is the largest, which the interpreter cannot show
            assert set(kernel["maxima"]) == {"max.NaN.f32"}, kernel
        assert kernel["approximate"] == [], kernel
        assert kernel["flushing"] == [], kernel
        # sm_120 has no registers for some values that hardly anything reads
        assert kernel["spilled"] <= (48 if arch == 120 else 0), kernel


def test_other_fused_multiply_adds_would_be_seen():
    assert any(kernel["fusion_fault"] for kernel in compiled("90", "--fuse"))


# --- what a call does beside its kernels ---


@pytest.fixture
def small_tiles(monkeypatch):
    """Five to a row."""
    arguments = importlib.import_module("specdiff_kernels.triton.arguments")
    monkeypatch.setattr(arguments, "TILE", 16)


@pytest.fixture
def launches(monkeypatch):
    """Names of the kernels launched."""
    names = []
    original = KERNEL.run

    def run(self, *args, **kwargs):
        names.append(self.fn.__name__)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(KERNEL, "run", run)
    return names


@interpreted
@pytest.mark.parametrize("truncated", [False, True])
@pytest.mark.parametrize("rule", ["token", "block", "coupled", "lenient"])
def test_a_verification_is_three_launches_at_most(rule, truncated, launches):
    target, draft, options = a_round(rule, V)
    if truncated:
        options |= {"top_k": i64(*[9] * B), "top_p": torch.full((B,), 0.9)}
    want = verify(target, draft, **options, backend="reference")
    out = empty_result()
    with forced("triton"):
        workspace = torch.full((workspace_size(B * (K + 1), V, device="cpu"),), -1)
        verify(target, draft, **options, out=out, workspace=workspace)
    assert len(launches) == (2 if rule == "coupled" else 3)
    assert_same(out, want)


@interpreted
@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("rule", ["token", "block", "coupled", "lenient"])
def test_a_workspace_is_all_that_is_allocated(rule, given, monkeypatch):
    """Beside the launches, which are left out here, a call runs no operator of PyTorch."""
    monkeypatch.setattr(KERNEL, "run", lambda *args, **kwargs: None)
    called, functions = Operators(), backends.load("triton").FUNCTIONS

    def run(*args, original=functions["verify"], **kwargs):
        with called:
            original(*args, **kwargs)

    target, draft, options = a_round(rule, V)
    with forced("triton"):
        size = workspace_size(B * (K + 1), V, device="cpu")
        workspace = torch.zeros(size, dtype=torch.int64) if given else None
        monkeypatch.setitem(functions, "verify", run)
        backends.find.cache_clear()
        verify(target, draft, **options, out=empty_result(), workspace=workspace)
    backends.find.cache_clear()
    assert called.names == ([] if given else ["aten.empty.memory_format"])


def test_launches_of_the_other_ops(launches):
    target, draft, _ = a_round("token", V)
    zero = torch.zeros(B, dtype=torch.int64)
    with forced("triton"):
        distribution = row_distribution(target[:, 0], torch.ones(B))
        assert launches == ["maxima", "sums"]
        sample(target[:, 0], distribution, seed=zero, round=zero)
        assert launches[2:] == ["search", "tokens"]
        masked = Draft.masked(B, K, draft.logits)
        denoise_step(masked, Reveal.sedd(0.5), 0, entropies=True, seed=zero, round=zero)
        assert launches[4:] == ["maxima", "reveal_rows"]
        commit(zero, draft.tokens)
        assert launches[6:] == ["advance"]


def test_launches_of_a_commit(launches, monkeypatch):
    """One more for blocks, and for a path one for all caches of a geometry."""
    module = importlib.import_module("specdiff_kernels.triton.commit")
    monkeypatch.setattr(module, "MAX_CACHES", 6)
    emitted, path = torch.ones(B, K, dtype=torch.int64), torch.arange(K).expand(B, K)
    zero, pages = torch.zeros(B, dtype=torch.int64), Pages.empty(B, 4, 4, block_size=2)
    layers = [torch.zeros(B, 2, 8, 4) for _ in range(6)]
    more = [torch.zeros(B, 1, 8, 4), torch.zeros(B, 2, 8, 4)]
    for options, want in (
        ({"pages": pages}, ["advance", "give_back"]),
        ({"path": path, "caches": layers}, ["advance", "move"]),
        ({"path": path, "caches": layers + more}, ["advance", "move", "move", "move"]),
        ({"path": path, "caches": [torch.zeros(4, 2, 2, 4)], "pages": pages},
         ["advance", "move", "give_back"]),
        ({"path": path, "caches": [layers[0][..., :0]]}, ["advance"]),
    ):  # fmt: skip
        launches.clear()
        with forced("triton"):
            commit(zero, emitted, **options)
        assert launches == want


@interpreted
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("rule", RULES)
def test_programs_may_run_in_any_order(rule):
    """Counters and partial sums do not depend on who comes last, or on what the workspace held."""
    for seed in range(3):
        target, draft, options = a_round(rule, V, seed)
        want = verify(target, draft, **options, backend="reference")
        out = empty_result()
        with forced("triton"), in_any_order(seed):
            size = workspace_size(B * (K + 1), V, device="cpu")
            workspace = torch.randint(-(2**63), 2**63 - 1, (size,))
            for _ in range(2):  # the second time the workspace holds what the first left
                verify(target, draft, **options, out=out, workspace=workspace)
                assert_same(out, want)


@interpreted
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("reveal", [Reveal.sedd(0.5), Reveal.highest_confidence(2)])
def test_programs_of_a_step_may_run_in_any_order(reveal):
    _, draft, _ = a_round("token", V)
    for seed in range(3):
        key = {"seed": torch.arange(B) + seed, "round": torch.zeros(B, dtype=torch.int64)}
        masked = Draft.masked(B, K, draft.logits)
        want = denoise_step(masked, reveal, 0, entropies=True, backend="reference", **key)
        own = masked._replace(entropy=torch.zeros(B, K).double())
        with forced("triton"), in_any_order(seed):
            denoise_step(own, reveal, 0, entropies=True, out=own, **key)
        for name in ("tokens", "tau", "rows"):
            assert torch.equal(getattr(own, name), getattr(want, name))
        assert_same(own.distribution, want.distribution)


@interpreted
def test_programs_of_a_commit_may_run_in_any_order():
    def states(implementation):
        """Pages and caches behind each commit."""
        torch.manual_seed(0)
        with forced(implementation):
            for call in cache_commits(torch.ones(B, K, dtype=torch.int64)):
                call()
                given = call.keywords
                yield [*given.get("pages", ())[:4], *given.get("caches", ())]

    want = list(states("reference"))
    for seed in range(3):
        with in_any_order(seed):
            for state, other in zip(states("triton"), want, strict=True):
                assert all(map(torch.equal, state, other))


@interpreted
@pytest.mark.parametrize("rule", ["token", "block", "coupled", "lenient"])
def test_rows_behind_the_end_of_a_round_are_not_read_again(rule, monkeypatch):
    """In launch 2, where an earlier row has said so by then; launch 1 reads what was drafted."""
    name = "store_tile_races" if rule == "coupled" else "store_tile_sums"
    original, calls = KERNEL.__call__, []

    def call(self, *args, **kwargs):
        calls.append(self.__name__)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(KERNEL, "__call__", call)
    target, draft, options = a_round(rule, V)
    for rejected in range(K + 1):
        likely = target.clone()
        for i in range(K):  # an accepted token has all the weight, a rejected one has none
            weight = -torch.inf if i == rejected else 50.0
            likely[torch.arange(B), i, draft.tokens[:, i]] = weight
        calls.clear()
        with forced("triton"):
            result = verify(likely, draft, **options)
        assert result.accepted.tolist() == [rejected] * B
        assert calls.count(name) == B * (rejected + 1)


@interpreted
@pytest.mark.usefixtures("small_tiles")
def test_no_two_accesses_race():
    """Barriers and counters order everything that threads and programs share."""
    with forced("triton"), in_any_order(0), watching():
        for call in every_op(V):
            call()


@interpreted
@pytest.mark.usefixtures("small_tiles")
@pytest.mark.parametrize("mutant", ["barriers", "orders"])
def test_races_are_seen(mutant):
    """Without barriers, or with relaxed counters, accesses do race."""
    with forced("triton"), watching(**{mutant: False}):
        with pytest.raises(Exception, match="Race"):
            row_distribution(torch.randn(2, V))
        with pytest.raises(Exception, match="Race"):
            target, draft, options = a_round("block", V)
            verify(target, draft, **options)


@interpreted
def test_races_in_caches_are_seen():
    """Without barriers entries are overwritten that another thread has yet to read."""
    with forced("triton"), watching(barriers=False):
        for call in cache_commits(torch.ones(B, K, dtype=torch.int64)):
            with pytest.raises(Exception, match="Race"):
                call()


@interpreted
def test_a_wrong_workspace_is_named():
    target, draft, options = a_round("token", V)
    out = empty_result()
    with forced("triton"):
        size = workspace_size(B * (K + 1), V, device="cpu")
        few = torch.zeros(size - 1, dtype=torch.int64)
        with pytest.raises(ValueError, match=f"workspace: expected at least {size} int64 words"):
            verify(target, draft, **options, out=out, workspace=few)
    with pytest.raises(TypeError, match="workspace: expected dtype int64"):
        verify(target, draft, **options, out=out, workspace=few.int())
    with pytest.raises(ValueError, match="workspace: expected `out` with it"):
        verify(target, draft, **options, workspace=few)
    with pytest.raises(ValueError, match="workspace: expected contiguous memory"):
        verify(target, draft, **options, out=out, workspace=few.repeat(2)[::2])
    verify(target, draft, **options, out=out, workspace=few[:0])  # a backend that takes none


@interpreted
def test_a_workspace_grows_with_rows_and_tiles():
    sizes = [workspace_size(rows, 50257, device="cpu", backend="triton") for rows in (1, 2, 9)]
    assert sizes[1] == 2 * sizes[0] and sizes[2] == 9 * sizes[0]
    grown = [workspace_size(1, V, device="cpu", backend="triton") for V in (4096, 8192, 151936)]
    assert all(a < b for a, b in pairwise(grown))
    assert workspace_size(9, 50257, device="cpu", backend="reference") == 0


# --- without triton ---


def output_of(program: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("old", ["3.6.0", "3.8.1"])
def test_an_interpreter_that_rounds_twice_is_refused(old):
    """Before 3.9 it multiplies and adds where `tl.fma` fuses. On a GPU these versions serve."""
    program = f"""
import triton
triton.__version__ = "{old}"
import torch
from specdiff_kernels import available_backends, backends
print(available_backends("cpu")["triton"])
"""
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = output_of(program, environment)
    assert f"Triton {old}'s interpreter" in done.stdout and "3.9" in done.stdout, done.stderr
    environment["TRITON_INTERPRET"] = "0"
    program += 'print(backends.load("triton").__name__)'
    done = output_of(program, environment)
    assert "specdiff_kernels.triton" in done.stdout, done.stderr


def test_the_package_works_without_triton_and_says_so():
    program = """
import sys
sys.modules["triton"] = None
import torch
from specdiff_kernels import available_backends, backends, row_distribution
print(row_distribution(torch.zeros(1, 4)).total.item())
print(available_backends("cpu")["triton"])
print(backends.reason_against("triton", "cuda"))
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    total, *reasons = done.stdout.splitlines()
    assert total == str(4 * 2**44), done.stderr
    for reason in reasons:
        assert "it did not load" in reason and "pip install triton" in reason
