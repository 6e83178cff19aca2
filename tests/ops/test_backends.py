"""Which backend runs: the one forced, or the best, and why a better one did not."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from importlib import metadata

import pytest
import torch

import specdiff_kernels
from specdiff_kernels import (
    _C,
    BackendError,
    available_backends,
    backends,
    build_tree,
    cached_attention,
    row_distribution,
    row_divergence,
    skinny_linear,
    use_backend,
    verify_tree,
    workspace_size,
)
from specdiff_kernels.__main__ import report
from specdiff_kernels.arguments import pack
from specdiff_kernels.inputs import RowDistributionInputs, Sampling

from .helpers import installed

LOGITS = torch.zeros(1, 4)


@pytest.fixture(autouse=True)
def choose_anew():
    backends.find.cache_clear()
    yield
    backends.find.cache_clear()


@pytest.fixture
def ran(monkeypatch):
    """Names of the backends that ran `row_distribution`, in order."""
    names = []
    for name in ("cpp", "reference"):
        functions = backends.load(name).FUNCTIONS

        def run(*args, name=name, original=functions["row_distribution"], **kwargs):
            names.append(name)
            original(*args, **kwargs)

        monkeypatch.setitem(functions, "row_distribution", run)
    monkeypatch.delenv("SPECDIFF_BACKEND", raising=False)
    return names


def test_cpp_is_the_default_on_a_cpu(ran):
    row_distribution(LOGITS)
    assert ran == ["cpp"]


def test_argument_beats_block_beats_environment(ran, monkeypatch):
    monkeypatch.setenv("SPECDIFF_BACKEND", "reference")
    row_distribution(LOGITS)
    with use_backend("cpp"):
        row_distribution(LOGITS)
        row_distribution(LOGITS, backend="reference")
    row_distribution(LOGITS)
    assert ran == ["reference", "cpp", "reference", "reference"]


@pytest.mark.parametrize("force", ["argument", "block", "environment"])
def test_unknown_names(force, monkeypatch):
    with pytest.raises(BackendError, match="expected one of cpp, triton, cuda, reference"):
        if force == "argument":
            row_distribution(LOGITS, backend="cuda-12")
        elif force == "block":
            with use_backend("cuda-12"):
                pass
        else:
            monkeypatch.setenv("SPECDIFF_BACKEND", "cuda-12")
            row_distribution(LOGITS)


def test_triton_is_the_default_on_a_gpu(caplog):
    pytest.importorskip("triton", reason="triton is not installed")
    function = backends.find("verify", "cuda", None)
    assert function.__module__ == "specdiff_kernels.triton.verify"
    with installed(triton=None, cuda=None), caplog.at_level(logging.WARNING, "specdiff_kernels"):
        function = backends.find("sample", "cuda", None)
    assert function.__module__ == "specdiff_kernels.reference.sample"
    assert "install it with: pip install triton" in caplog.text
    assert "reinstall where nvcc is, with: SPECDIFF_CUDA=1 pip install" in caplog.text


def test_what_triton_cannot_do_is_said(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    with pytest.raises(BackendError, match="under Triton's interpreter alone: set TRITON_INTERPR"):
        row_distribution(LOGITS, backend="triton")
    pytest.importorskip("triton", reason="triton is not installed")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(BackendError, match="'triton' was asked for, but it has no skinny_linear"):
        skinny_linear(LOGITS, LOGITS, backend="triton")
    cache = torch.zeros(1, 1, 1, 4)
    with pytest.raises(BackendError, match="'triton' was asked for, but it has no cached_attent"):
        cached_attention(cache, cache, cache, torch.zeros(1).long(), backend="triton")
    with pytest.raises(BackendError, match="'triton' was asked for, but it has no row_divergence"):
        row_divergence(LOGITS, LOGITS, backend="triton")
    with pytest.raises(BackendError, match="'triton' was asked for, but it has no build_tree"):
        build_tree(LOGITS[None], 2, backend="triton")
    tree = build_tree(LOGITS[None], 2)
    with pytest.raises(BackendError, match="'triton' was asked for, but it has no verify_tree"):
        verify_tree(LOGITS.expand(1, 3, 4), tree, rule="greedy", backend="triton")


@pytest.fixture
def broken_cpp(monkeypatch):
    monkeypatch.delenv("SPECDIFF_BACKEND", raising=False)
    with installed(cpp=None):
        yield


@pytest.mark.usefixtures("broken_cpp")
def test_fallback_is_logged_once_with_its_reason(caplog):
    with caplog.at_level(logging.WARNING, "specdiff_kernels"):
        row_distribution(LOGITS)
        row_distribution(LOGITS)
    assert [r.getMessage() for r in caplog.records] == [
        "backend cpp is not used for row_distribution: it did not load (import of "
        "specdiff_kernels.cpp halted; None in sys.modules); "
        "reinstall with: pip install --force-reinstall ."
    ]


@pytest.mark.usefixtures("broken_cpp")
def test_a_forced_backend_never_falls_back():
    with pytest.raises(BackendError, match=r"'cpp' was asked for, but it did not load"):
        row_distribution(LOGITS, backend="cpp")
    assert "None in sys.modules" in available_backends()["cpp"]
    assert "None in sys.modules" in report()


@pytest.mark.parametrize("device", ["cuda", "cuda:1", torch.device("cuda"), torch.device("cuda:1")])
def test_a_device_may_have_a_number(device, monkeypatch):
    """A workspace for a GPU has a size where there is none."""
    pytest.importorskip("triton", reason="triton is not installed")
    assert workspace_size(9, 50257, device=device) == workspace_size(9, 50257) > 0
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert available_backends(device) == available_backends("cuda")
    assert available_backends(device)["cpp"] == "it does not run on cuda tensors"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert set(available_backends(device).values()) == {"torch finds no CUDA device"}
    cpu = torch.device("cpu", 0)
    assert available_backends(cpu)["cpp"] is None and workspace_size(9, 100, device=cpu) == 0


def test_report():
    text = subprocess.run(
        [sys.executable, "-m", "specdiff_kernels"], capture_output=True, text=True, check=True
    ).stdout
    assert f"specdiff-kernels {specdiff_kernels.__version__}, torch {torch.__version__}" in text
    assert "cpu  cpp        available" in text
    assert "cpp uses " in text


def test_the_version():
    assert specdiff_kernels.__version__ == metadata.version("specdiff-kernels")
    bare = """
from importlib import metadata
known = metadata.version
def version(name):
    if name == "specdiff-kernels":
        raise metadata.PackageNotFoundError(name)
    return known(name)
metadata.version = version
import specdiff_kernels
print(specdiff_kernels.__version__)
"""
    run = subprocess.run([sys.executable, "-c", bare], capture_output=True, text=True, check=True)
    assert run.stdout == "0+unknown\n"


def test_unknown_instruction_set_is_an_error():
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "import torch, specdiff_kernels as s; s.row_distribution(torch.zeros(1, 4))",
        ],
        env={**os.environ, "SPECDIFF_CPU_ISA": "avx3", "SPECDIFF_BACKEND": "cpp"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "SPECDIFF_CPU_ISA" in result.stderr
    assert "avx2" in result.stderr


def runs_beside(function) -> bool:
    """Whether this thread gets to run while `function` works in another."""
    thread = threading.Thread(target=function)
    before = sys.getswitchinterval()
    sys.setswitchinterval(60)  # nobody is interrupted: only a lock that is let go lets us in
    try:
        thread.start()
        return thread.is_alive()
    finally:
        sys.setswitchinterval(before)
        thread.join()


def test_native_code_releases_the_gil():
    logits = torch.randn(4, 400_000)
    distribution, temperature, top_k = row_distribution(logits), torch.ones(4), torch.full((4,), 9)
    scratch = torch.empty(1, 400_000, dtype=torch.int64)
    inputs = RowDistributionInputs(logits, Sampling(temperature, top_k, None, None))
    arguments = pack(inputs, distribution)

    def often() -> None:  # long enough for a busy machine to wake this thread meanwhile
        for _ in range(100):
            _C.row_distribution(arguments, scratch.data_ptr(), 1)

    assert runs_beside(often)
    assert not runs_beside(lambda: sum(range(10**6)))


def test_what_watches_sees_the_call():
    """Transforms, views of a sign, subclasses and autograd get what the dispatcher gives."""
    logits = torch.randn(2, 3, 8)
    negated = torch._neg_view(logits[0])
    assert torch.equal(row_distribution(negated).max, row_distribution(-logits[0]).max)
    assert torch.equal(
        torch.vmap(row_distribution)(logits).total[1], row_distribution(logits[1]).total
    )
    with torch.profiler.profile() as profile:
        row_distribution(logits[0])
    assert "specdiff::row_distribution" in {event.key for event in profile.key_averages()}


def test_report_with_a_wrong_setting():
    result = subprocess.run(
        [sys.executable, "-m", "specdiff_kernels"],
        env={**os.environ, "SPECDIFF_CPU_ISA": "avx3"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "SPECDIFF_CPU_ISA is 'avx3'" in result.stdout
