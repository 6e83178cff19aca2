"""Seen on a GPU alone: graphs, streams, calls that wait, the findings of a sanitizer."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest
import torch

from specdiff_kernels import Draft, Verified, available_backends, use_backend, verify

from .helpers import assert_same
from .rounds import a_round, empty_result, every_op

V = 1100
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.fixture(params=["triton", "cuda"])
def backend(request):
    if reason := available_backends("cuda")[request.param]:
        pytest.skip(f"backend {request.param}: {reason}")
    return request.param


def there(x, device="cuda"):
    """A tensor, a tuple or a dict of such, on the GPU."""
    if isinstance(x, dict):
        return {key: there(value, device) for key, value in x.items()}
    if isinstance(x, tuple):
        moved = [there(value, device) for value in x]
        return type(x)(*moved) if hasattr(x, "_fields") else tuple(moved)
    return x.to(device) if isinstance(x, torch.Tensor) else x


@pytest.mark.parametrize("rule", ["token", "block", "coupled", "lenient"])
def test_a_graph_on_a_side_stream_draws_anew_at_each_replay(rule, backend):
    """Replays with another round give what plain calls with that round give; outputs poisoned."""
    target, draft, options = a_round(rule, V)
    counter = "position" if rule == "coupled" else "round"
    target_there, draft_there, options_there = there((target, draft, options))
    out = Verified(*there(tuple(empty_result())))
    call = lambda: verify(target_there, draft_there, **options_there, out=out, backend=backend)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            call()
            options_there[counter] += 1
    seen = set()
    for replay in range(8):
        for tensor in out:
            tensor.fill_(99)
        graph.replay()
        torch.cuda.synchronize()
        now = options | {counter: options[counter] + replay}
        have = there(out, "cpu")
        assert_same(have, verify(target, draft, **now, backend="reference"))
        seen.add(str(have))
    assert len(seen) > 1


def test_nothing_waits_for_the_device(backend):
    target, draft, options = there(a_round("token", V))
    with use_backend(backend):
        verify(target, draft, **options)
        torch.cuda.set_sync_debug_mode("error")
        try:
            verify(target, draft, **options)
        finally:
            torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
def test_a_full_machine_gives_the_references_bits(rule, backend):
    """More rows than the device runs at once, of several blocks each."""
    torch.manual_seed(1)
    B, K, size = 40, 8, 50257
    target = torch.randn(B, K + 1, size, device="cuda").mul(3).bfloat16()
    tokens = target[:, :K].argmax(-1)
    minus = torch.full_like(tokens, -1)
    draft = Draft(tokens, minus.int(), minus)
    counter = "position" if rule == "coupled" else "round"
    key = {"seed": torch.arange(B).cuda(), counter: torch.zeros(B, dtype=torch.int64).cuda()}
    assert_same(
        verify(target, draft, rule=rule, **key, backend=backend),
        verify(target, draft, rule=rule, **key, backend="reference"),
    )


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_the_tensors_device_is_used_and_the_current_one_kept(backend):
    target, draft, options = there(a_round("token", V), "cuda:1")
    with torch.cuda.device(0):
        result = verify(target, draft, **options, backend=backend)
        assert torch.cuda.current_device() == 0
    target, draft, options = there((target, draft, options), "cpu")
    assert_same(there(result, "cpu"), verify(target, draft, **options, backend="reference"))


@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_a_sanitizer_finds_nothing(tool):
    """The CUDA kernels, on a reduced list of calls."""
    if reason := available_backends("cuda")["cuda"]:
        pytest.skip(f"backend cuda: {reason}")
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    if not os.access(sanitizer, os.X_OK):
        pytest.skip("compute-sanitizer is not installed")
    program = (
        "import torch; from specdiff_kernels import use_backend\n"
        "from tests.ops.on_gpu import on_gpu; from tests.ops.rounds import every_op\n"
        "with use_backend('cuda'), on_gpu('cuda'):\n"
        f"    for call in every_op({V}): call()\n"
        "torch.cuda.synchronize()"
    )
    done = subprocess.run(
        [sanitizer, "--tool", tool, "--error-exitcode", "9", sys.executable, "-c", program],
        env={**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:]


def test_every_call_runs(backend):
    from .on_gpu import on_gpu

    with use_backend(backend), on_gpu(backend):
        for call in every_op(V):
            call()
