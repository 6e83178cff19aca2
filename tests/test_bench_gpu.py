"""The GPU benchmark without a GPU: gates, models, files, and every row that runs on a CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import json
import os
import re
import subprocess
import sys
import time
import types
from functools import partial
from pathlib import Path

import pytest
import torch
import typer

from specdiff.bench import machine
from specdiff_kernels import BackendError, row_distribution, sample

ROOT = Path(__file__).resolve().parents[1]
CPU = torch.device("cpu")

with pytest.MonkeyPatch.context() as patch:  # importing peers appends to the path as well
    patch.syspath_prepend(ROOT / "benchmarks")
    import bench_gpu
    from inputs import DRAWS, Shape
    from peers import Outcome, Unusable

SMALL = Shape(1, 4, 200)
BATCH = Shape(3, 4, 200)
RUNNABLE = [name for name in bench_gpu.OTHERS if not name.startswith(("torch.compile", "flash"))]


@pytest.fixture(autouse=True)
def threads_and_generator():
    """Looking a peer up sets one thread."""
    threads = torch.get_num_threads()
    torch.manual_seed(0)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module", params=[SMALL, BATCH], ids=str)
def case(request):
    return bench_gpu.make_case(request.param, CPU)


@pytest.fixture(scope="module")
def batch_case():
    return bench_gpu.make_case(BATCH, CPU)


def wall_clock(run):
    start = time.perf_counter()
    result = run()
    return 1e6 * (time.perf_counter() - start), result


def on_stream(name, row):
    row()
    return bench_gpu.Timed(name, row, row, "stream", "there is no GPU")


# all that needs a GPU replaced; what remains runs on the CPU with its backends
NO_GPU = bench_gpu.Setup(
    CPU, {"name": "NVIDIA H200"}, wall_clock, 10.0, {"cpp": None, "reference": None}, on_stream,
    {name: bench_gpu.OTHERS[name] for name in RUNNABLE},
)  # fmt: skip


# --- the whole program -----------------------------------------------------------------------


def test_without_a_device_it_says_so_and_fails():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "bench_gpu.py")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert re.fullmatch(r"torch found no CUDA device: .*\n", done.stderr)


def test_program_on_cpu_tensors(tmp_path, capsys):
    path = tmp_path / "new" / "result.json"
    bench_gpu.run(NO_GPU, [SMALL, BATCH], 20, path)
    kept = json.loads(path.read_text())
    assert kept["gpu"] == {"name": "NVIDIA H200"}
    assert kept["machine"]["packages"]["torch"] == torch.__version__
    assert str(tmp_path) not in path.read_text()
    assert kept["command"].endswith("bench_gpu.py --shapes 1x4x200,3x4x200 --repetitions 20")
    assert (kept["copy_gb_per_s"], kept["repetitions"]) == (10.0, 20)
    one, three = kept["cases"]
    assert bench_gpu.REFERENCE in {x["name"] for x in one["not_measured"]}
    ours = ["cpp, token", "cpp, block"]
    assert [row["name"] for row in one["rows"]] == ours + RUNNABLE
    assert [row["name"] for row in three["rows"]] == ours + RUNNABLE[:-1]
    (gone,) = [x for x in three["not_measured"] if x["name"] == "transformers"]
    assert "one sequence at a time" in gone["reason"]
    assert three["shape"] == {"batch": 3, "k": 4, "vocab": 200}
    for row in one["rows"]:
        assert 0 < row["us"]["p20"] <= row["us"]["median"] <= row["us"]["p80"]
        assert 0 <= row["accepted"] <= 4 and row["timed"] == "stream"
        assert row["least"]["mb"] <= row["all_rows"]["mb"]
    printed = capsys.readouterr().out
    assert "B=3 K=4 V=200" in printed and "one sequence at a time" in printed
    assert "cpp, token: no graph: there is no GPU" in printed


@pytest.mark.parametrize("good_calls", [0, DRAWS + 20], ids=["before", "after"])
def test_wrong_results_leave_no_file(tmp_path, good_calls):
    """A backend that starts to be wrong before or after the timed runs."""
    calls = iter(range(10**6))

    def broken(name, row):
        def run():
            result = row()
            if row.rule == "block" and next(calls) >= good_calls:
                row.out.emitted[0, 0] += 1
            return result

        return bench_gpu.Timed(name, row, run if isinstance(row, bench_gpu.Ours) else row, "stream")

    setup = dataclasses.replace(NO_GPU, make_ready=broken)
    with pytest.raises(SystemExit) as stopped:
        bench_gpu.run(setup, [SMALL], 20, tmp_path / "result.json")
    assert "cpp, block: `emitted` differs from the reference" in stopped.value.code
    assert not any(tmp_path.iterdir())
    assert next(calls) > good_calls


def test_a_peer_that_fails_is_reported(capsys):
    def explode(case):
        raise OSError("no such compiler\nsecond line")

    def inexact(case):
        row = bench_gpu.PlainTorch(case)
        row.q = torch.zeros_like(row.q)  # a uniform q: many more are accepted
        return row

    setup = dataclasses.replace(NO_GPU, others={"broken": explode, "inexact": inexact})
    content = bench_gpu.benchmark(setup, [SMALL], 100, False)
    (measured,) = content["cases"]
    reasons = {one["name"]: one["reason"] for one in measured["not_measured"]}
    assert reasons["broken"] == "OSError: no such compiler"
    assert "by the exact distribution" in reasons["inexact"]
    assert [row["name"] for row in measured["rows"]] == ["cpp, token", "cpp, block"]


def test_a_backend_that_is_not_there_is_reported(batch_case):
    found = {"triton": "it did not load", "cpp": None, "reference": None}
    setup = dataclasses.replace(NO_GPU, backends=found, others={})
    timed, missing = bench_gpu.prepare(batch_case, setup, False)
    reason = bench_gpu.REFERENCE_REASON
    assert missing == {"triton": "it did not load", bench_gpu.REFERENCE: reason}
    assert [one.name for one in timed] == ["cpp, token", "cpp, block"]


@pytest.mark.parametrize("text", ["", "1x8", "1x8x", "1x8x100,", "1x8x100 2x8x100", "axbxc"])
def test_shapes_that_are_none(text):
    with pytest.raises(typer.BadParameter, match="expected comma-separated BxKxV"):
        bench_gpu.parse_shapes(text)


def test_shapes():
    assert bench_gpu.parse_shapes("1x8x100,64x16x151936") == [(1, 8, 100), (64, 16, 151936)]
    assert bench_gpu.parse_shapes(bench_gpu.SHAPES)[3] == Shape(64, 16, 151936)


@pytest.mark.parametrize(
    "name, folder",
    [("NVIDIA H200", "nvidia-h200"), ("NVIDIA A100-SXM4-80GB", "nvidia-a100-sxm4-80gb")],
)
def test_result_path(name, folder):
    path = bench_gpu.result_path(name, datetime.date(2026, 3, 9))
    assert path == ROOT / "benchmarks" / "results" / folder / "2026-03-09.json"


# --- inputs ----------------------------------------------------------------------------------


def test_case_is_a_recorded_one_step_draft(case):
    B, K, V = case.shape
    draft = case.draft
    assert case.target.shape == (B, K + 1, V) and draft.logits.shape == (B * K, V)
    assert case.target.dtype == draft.logits.dtype == torch.bfloat16
    assert case.draft_logits.data_ptr() == draft.logits.data_ptr()
    assert draft.rows.flatten().tolist() == list(range(B * K)) and not draft.tau.any()
    wanted = row_distribution(draft.logits)
    assert all(torch.equal(a, b) for a, b in zip(draft.distribution, wanted, strict=True))
    case.load(DRAWS + 3)
    drawn = sample(
        draft.logits,
        wanted,
        seed=torch.arange(B).repeat_interleave(K),
        round=torch.full((B * K,), 3),
        slot=torch.arange(K).repeat(B),
    )
    assert torch.equal(draft.tokens.flatten(), drawn)
    assert torch.equal(case.tokens32, draft.tokens.int())
    assert case.round.tolist() == [DRAWS + 3] * B


def test_chances_are_those_of_the_drafts(case):
    K = case.shape.k
    p, q = case.target[:, :K].double().softmax(-1), case.draft_logits.double().softmax(-1)
    for number in (0, DRAWS - 1):
        tokens = case.draws[number][..., None]
        wanted = (p.gather(2, tokens) / q.gather(2, tokens))[..., 0].clamp(max=1)
        torch.testing.assert_close(case.chances[number], wanted, rtol=1e-9, atol=0)


def test_load_moves_no_tensor(case):
    held = (case.draft.tokens, case.tokens32, case.round)
    places = [tensor.data_ptr() for tensor in held]
    case.load(5)
    before = case.draft.tokens.clone()
    case.load(6)
    assert not torch.equal(before, case.draft.tokens)
    assert places == [tensor.data_ptr() for tensor in held]
    assert case.draft.tokens is held[0] and case.round is held[2]


# --- rows ------------------------------------------------------------------------------------


def outcomes_of(case, row, first, count):
    one = bench_gpu.Timed("row", row, row, "stream")
    return [bench_gpu.run_once(case, one, first + i) for i in range(count)]


@pytest.mark.parametrize("given", [False, True])
def test_plain_torch_emits_by_the_targets_distribution(given):
    """Frequencies of the first token, and of the second behind an accepted one: 4.5 deviations."""
    N = 40000
    target, logits = torch.randn(1, 2, 5), torch.randn(1, 1, 5)
    q = logits.softmax(-1)
    tokens = torch.multinomial(q[0], N, replacement=True).T
    accepted, last = bench_gpu.plain_verify(
        target.expand(N, 2, 5), (q if given else logits).expand(N, 1, 5), tokens, given
    )
    p = target[0].double().softmax(-1)
    first = torch.where(accepted == 1, tokens[:, 0], last)
    for emitted, distribution in ((first, p[0]), (last[accepted == 1], p[1])):
        frequency = emitted.bincount(minlength=5) / len(emitted)
        allowed = 4.5 * (distribution * (1 - distribution) / len(emitted)).sqrt()
        assert ((frequency - distribution).abs() < allowed).all()


@pytest.mark.parametrize("name", RUNNABLE)
def test_peers_accept_by_the_exact_distribution(case, name):
    try:
        row = bench_gpu.OTHERS[name](case)
    except Unusable:
        assert name == "transformers" and case.shape.batch > 1
        return
    outcomes = outcomes_of(case, row, DRAWS, 20 * DRAWS)
    assert len({outcome.accepted[0] for outcome in outcomes}) > 1
    assert bench_gpu.fault(case, outcomes, [], 21 * DRAWS) is None


def test_given_q_is_the_drafts_distribution(batch_case):
    given = bench_gpu.PlainTorch(batch_case, given=True)
    assert given.q.dtype == torch.float32
    assert torch.equal(given.q, batch_case.draft_logits.float().softmax(-1))


def test_ours_is_every_backend_under_both_rules(case):
    for rule in bench_gpu.RULES:
        row = bench_gpu.Ours(case, "cpp", rule)
        case.load(1)
        row()
        token_outcome = row.outcome(row.out)
        assert row.rule == rule and len(token_outcome.accepted) == case.shape.batch
    with pytest.raises(BackendError):
        bench_gpu.Ours(case, "no such backend", "token")()


def test_compiled_composition_is_one_graph(batch_case, monkeypatch):
    quick = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", quick)
    torch.compiler.reset()
    row = bench_gpu.PlainTorch(batch_case, compiled=True)
    with torch.no_grad():
        outcomes = outcomes_of(batch_case, row, DRAWS, 4 * DRAWS)
    assert row.function is not bench_gpu.plain_verify
    assert bench_gpu.fault(batch_case, outcomes, [], 5 * DRAWS) is None
    torch.compiler.reset()


def chain_speculative_sampling(
    draft_probs,
    draft_token_ids,
    target_probs,
    maybe_output_accepted_token_num=None,
    maybe_output_emitted_draft_token_num=None,
    deterministic=True,
    generator=None,
    seed=None,
    offset=None,
):
    """flashinfer 0.7.2's interface; "accepted" counts all that would be, each on its own."""
    B, K = draft_token_ids.shape
    assert draft_probs.shape[:2] == (B, K) and target_probs.shape[:2] == (B, K + 1)
    assert draft_probs.dtype == target_probs.dtype == torch.float32
    assert draft_token_ids.dtype == torch.int32
    assert seed.dtype == offset.dtype == torch.int64 and seed.shape == offset.shape == (B,)
    ids = draft_token_ids.long()[..., None]
    p, q = target_probs[:, :K].gather(2, ids)[..., 0], draft_probs.gather(2, ids)[..., 0]
    accept = torch.rand_like(p) * q < p
    emitted = accept.int().cumprod(1).sum(1, dtype=torch.int32)
    tokens = torch.cat((draft_token_ids, draft_token_ids[:, :1]), 1)
    column = torch.arange(K + 1)
    tokens = tokens.where(column < emitted[:, None], -1)
    tokens = torch.where(column == emitted[:, None], 7, tokens)
    return tokens.int(), accept.sum(1).int(), emitted


@pytest.mark.parametrize("name", ["flashinfer", "flashinfer, q given"])
def test_flashinfer_is_called_by_its_interface(case, name, monkeypatch):
    module = types.SimpleNamespace(chain_speculative_sampling=chain_speculative_sampling)
    monkeypatch.setitem(sys.modules, "flashinfer", types.ModuleType("flashinfer"))
    monkeypatch.setitem(sys.modules, "flashinfer.sampling", module)
    row = bench_gpu.OTHERS[name](case)
    outcomes = outcomes_of(case, row, DRAWS, 20 * DRAWS)
    assert {last for outcome in outcomes for last in outcome.last} == {7}
    assert bench_gpu.fault(case, outcomes, [], 21 * DRAWS) is None


def test_flashinfer_that_is_not_there(case, monkeypatch):
    monkeypatch.setitem(sys.modules, "flashinfer.sampling", None)
    with pytest.raises(Unusable, match="flashinfer"):
        bench_gpu.FlashInfer(case)


# --- gates -----------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", bench_gpu.RULES)
def test_bits_of_a_right_backend_pass(case, rule):
    row = bench_gpu.Ours(case, "cpp", rule)
    bench_gpu.check_bits(case, "cpp", row, row, range(5))
    assert row.out.accepted.min() >= 0


def faulty(row, fault):
    """A run whose outputs are right but for one thing."""

    def run():
        if fault != "nothing written":
            row()
        if fault == "one column not written":
            row.out.emitted[:, -1] = bench_gpu.OURS_POISON
        elif fault != "nothing written":
            getattr(row.out, fault)[-1] += 1

    return run


@pytest.mark.parametrize(
    "fault, named",
    [
        ("accepted", "accepted"),
        ("emitted", "emitted"),
        ("status", "status"),
        ("nothing written", "accepted"),
        ("one column not written", "emitted"),
    ],
)
def test_bits_of_a_wrong_backend_refuse(case, fault, named):
    row = bench_gpu.Ours(case, "cpp", "token")
    with pytest.raises(SystemExit) as stopped:
        bench_gpu.check_bits(case, "cpp", row, faulty(row, fault), range(1))
    assert f"`{named}` differs from the reference" in stopped.value.code


def test_bits_that_neither_wrote_refuse(case, monkeypatch):
    monkeypatch.setattr(bench_gpu, "verify", lambda *args, **kwargs: None)
    row = bench_gpu.Ours(case, "cpp", "token")
    with pytest.raises(SystemExit):
        bench_gpu.check_bits(case, "cpp", row, row, range(1))


def test_bits_are_checked_on_every_round(case):
    row, done = bench_gpu.Ours(case, "cpp", "token"), []

    def run():
        row()
        done.append(int(case.round[0]))
        row.out.emitted[0, 0] += done[-1] == 6

    with pytest.raises(SystemExit, match="round 6"):
        bench_gpu.check_bits(case, "cpp", row, run, range(4, 9))
    assert done == [4, 5, 6]


@pytest.mark.parametrize(
    "wrong, reason",
    [
        (Outcome([0, 5, 0], [0, 0, 0]), "more than 4"),
        (Outcome([0, -1, 0], [0, 0, 0]), "fewer than 0"),
        (Outcome([0, 0, 0], [0, 200, 0]), r"outside 0\.\.199"),
        (Outcome([0, 0, 0], [0, -1, 0]), r"outside 0\.\.199"),
    ],
)
def test_implausible_outcomes(batch_case, wrong, reason):
    good = Outcome([0, 4, 2], [0, 199, 100])
    assert bench_gpu.fault(batch_case, [], [good] * DRAWS, 0) is None
    assert re.search(reason, bench_gpu.fault(batch_case, [], [good, wrong], 0))


def test_outcomes_are_judged_by_the_drafts_of_their_rounds(batch_case):
    """Ten rounds, so that these start in the middle of the drafts; each draft is all or nothing."""
    chances = torch.zeros_like(batch_case.chances)
    chances[6:] = 1
    sure = dataclasses.replace(batch_case, chances=chances)
    numbers = range(100, 110)  # the drafts 4 to 13
    outcomes = [Outcome([4 * (number % DRAWS >= 6)] * 3, [0] * 3) for number in numbers]
    assert bench_gpu.fault(sure, outcomes, [], 110) is None
    assert bench_gpu.fault(sure, outcomes, [], 111) is not None


@pytest.mark.parametrize("count", [0, 4])
def test_outcomes_against_the_distribution(batch_case, count):
    same = [Outcome([count] * 3, [0] * 3)] * 100
    reason = bench_gpu.fault(batch_case, same, same[:DRAWS], DRAWS + 100)
    assert reason.startswith(f"it accepted {count}.000 tokens a round; by the exact distribution")


# --- figures ---------------------------------------------------------------------------------


def test_bytes_by_hand():
    """B=2, K=3, V=10: rows of 20 bytes; accepted 1, and all 3.

    Small: a drafted token 8, its tau 4, row 8, logit 2 and distribution 28; a sequence's
    temperature 4, seed 8, round 8, accepted 8, emitted 4 x 8, status 4.
    """
    shape = Shape(2, 3, 10)
    token = 20 * (2 + 4) + 20 * 1 + 50 * (2 + 3) + 64 * 2
    everything = 20 * 8 + 20 * 1 + 50 * (2 + 3) + 64 * 2
    assert bench_gpu.bytes_model(shape, [1, 3], "token") == (token, everything) == (518, 558)
    block = 20 * (3 + 4) + 20 * 1 + 50 * 6 + 64 * 2
    assert bench_gpu.bytes_model(shape, [1, 3], "block") == (block, block + 20) == (588, 608)


def test_spread():
    assert bench_gpu.spread(list(range(1, 10))) == {"median": 5, "p20": 2.0, "p80": 8.0}
    assert bench_gpu.spread([5.0, 1.0, 3.0])["median"] == 3.0


def timed(name, row, us, accepted):
    one = bench_gpu.Timed(name, row, row, "graph", us=us)
    one.outcomes = [Outcome(counts, [0] * len(counts)) for counts in accepted]
    return one


def test_summaries_by_hand(batch_case):
    """At 1 GB/s a microsecond is 1000 bytes. The third run reads more than the others."""
    shape = Shape(1, 2, 1000)
    token, block = (bench_gpu.Ours(batch_case, "cpp", rule) for rule in bench_gpu.RULES)
    other = bench_gpu.PlainTorch(batch_case)
    rows = [
        timed("fast", token, [20.0, 25.0, 30.0], [[0], [0], [2]]),
        timed("slow", token, [40.0, 50.0, 60.0], [[0], [0], [2]]),
        timed("block", block, [70.0, 80.0, 90.0], [[0], [0], [0]]),
        timed("other", other, [100.0, 150.0, 200.0], [[1], [1], [1]]),
    ]
    entries = {entry["name"]: entry for entry in bench_gpu.summaries(rows, shape, 1.0)}
    assert [entry["times_ours"] for entry in entries.values()] == [1.0, 2.0, 1.0, 6.0]
    least = [bench_gpu.bytes_model(shape, counts, "token")[0] for counts in ([0], [2])]
    fast = entries["fast"]["least"]
    assert fast["mb"] == pytest.approx((2 * least[0] + least[1]) / 3e6)
    assert fast["floor_us"] == pytest.approx((2 * least[0] + least[1]) / 3e3)
    ratios = sorted([20e3 / least[0], 25e3 / least[0], 30e3 / least[1]])
    assert fast["times_floor"] == pytest.approx(ratios[1])
    assert entries["slow"]["accepted"] == pytest.approx(2 / 3)
    alone = bench_gpu.summaries(rows[3:], shape, 1.0)
    assert alone[0]["times_ours"] is None


# --- files -----------------------------------------------------------------------------------


def test_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "nvidia-h200" / "2026-03-09.json"
    assert machine.write(path, {"figure": 1}) == path
    whole = path.read_text()
    today = datetime.date.today().isoformat()
    assert json.loads(whole) == {"machine": machine.description(), "date": today, "figure": 1}
    assert list(path.parent.iterdir()) == [path]
    with pytest.raises(TypeError):
        machine.write(path, {"figure": object()})
    assert path.read_text() == whole

    def interrupted(source, target):
        assert Path(source).parent == path.parent and Path(source) != path
        assert json.loads(Path(source).read_text())["figure"] == 2
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        machine.write(path, {"figure": 2})
    assert path.read_text() == whole


@pytest.mark.parametrize(
    "script, version",
    [("echo 580.159.03; echo 580.159.03", "580.159.03"), ("exit 9", None), (None, None)],
)
def test_driver(tmp_path, monkeypatch, script, version):
    if script is not None:
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.driver() == version


# --- the order of CUDA calls, on a device that only takes notes ------------------------------


class NotingCuda:
    """The part of torch.cuda that the benchmark calls."""

    def __init__(self, monkeypatch, cache=0):
        self.notes = []
        note = self.notes.append
        notes = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                note("event")
                self.place = len(notes.notes)

            def synchronize(self):
                note("event done")

            def elapsed_time(self, other):
                assert notes.notes[-1] == "event done" and other.place > self.place
                return 0.25  # ms

        class Graph:
            def replay(self):
                note("replay")

        class Stream:
            def wait_stream(self, other):
                note("wait")

        @contextlib.contextmanager
        def scope(*what, **kwargs):
            name = "capture" if isinstance(what[0], Graph) else "side"
            note(name)
            yield
            note(f"{name} over")

        properties = types.SimpleNamespace(L2_cache_size=cache)
        fakes = {
            "Event": Event,
            "CUDAGraph": Graph,
            "Stream": Stream,
            "current_stream": Stream,
            "stream": scope,
            "graph": scope,
            "synchronize": lambda: note("synchronize"),
            "set_sync_debug_mode": lambda mode: note(f"sync {mode}"),
            "get_device_properties": lambda device: properties,
        }
        for name, fake in fakes.items():
            monkeypatch.setattr(torch.cuda, name, fake)


@pytest.mark.parametrize("cache, size", [(5000, 10000), (100, 8192)])
def test_clock_starts_behind_a_whole_flush(monkeypatch, cache, size):
    cuda = NotingCuda(monkeypatch, cache)
    clock = bench_gpu.Clock(CPU, least=8192)
    assert clock.buffer.nbytes == size

    def run():
        assert (clock.buffer == 1).all()
        cuda.notes.append("run")
        return "result"

    for _ in range(2):
        cuda.notes.clear()
        clock.buffer.fill_(-5.0)
        assert clock(run) == (250.0, "result")
        assert cuda.notes == ["synchronize", "event", "run", "event", "event done"]


def test_copy_bandwidth_counts_both_ways():
    slow_start = iter([100.0] * bench_gpu.WARM_UP + [2.0] * bench_gpu.COPIES)
    clock = lambda run: (next(slow_start), run())
    found = bench_gpu.copy_bandwidth(clock, CPU, size=1000)
    assert found == 1.0  # 2000 bytes in 2 us are 1 GB/s
    assert next(slow_start, None) is None


class Noting(bench_gpu.Row):
    def __init__(self, cuda, waits=False, uncapturable=False):
        self.cuda = cuda
        self.waits = waits
        self.uncapturable = uncapturable

    def __call__(self):
        if self.waits and self.cuda.notes[-1] == "sync error":
            raise RuntimeError("called a synchronizing CUDA operation\nand more")
        if self.uncapturable and self.cuda.notes[-1] == "capture":
            raise RuntimeError("operation not permitted")
        self.cuda.notes.append("call")
        return len(self.cuda.notes)

    def outcome(self, result):
        raise NotImplementedError


WARMED = ["wait", "side", *["call"] * bench_gpu.WARM_UP, "side over", "wait"]


def test_a_row_is_captured_after_warming_up(monkeypatch):
    cuda = NotingCuda(monkeypatch)
    one = bench_gpu.make_ready("row", Noting(cuda))
    checked = ["sync error", "call", "sync default", "synchronize"]
    assert cuda.notes == [*WARMED, *checked, "capture", "call", "capture over"]
    captured = len(cuda.notes) - 1
    assert (one.how, one.why_stream) == ("graph", "")
    assert one.run() == one.run() == captured
    assert cuda.notes[captured + 1 :] == ["replay", "replay"]


def test_a_row_that_waits_for_the_device_is_timed_on_the_stream(monkeypatch):
    cuda = NotingCuda(monkeypatch)
    row = Noting(cuda, waits=True)
    one = bench_gpu.make_ready("row", row)
    assert cuda.notes == [*WARMED, "sync error", "sync default", "synchronize"]
    assert one.run is row
    assert (one.how, one.why_stream) == ("stream", "called a synchronizing CUDA operation")


def test_a_failed_capture_ends_the_program(monkeypatch):
    cuda = NotingCuda(monkeypatch)
    with pytest.raises(SystemExit, match="row: could not be captured"):
        bench_gpu.make_ready("row", Noting(cuda, uncapturable=True))


def test_the_reference_can_be_compiled(batch_case, monkeypatch):
    """As one graph, with the same bits; not by inductor, which takes minutes."""
    compile = partial(torch.compile, backend="eager")
    monkeypatch.setattr(torch, "compile", compile)
    setup = dataclasses.replace(NO_GPU, backends={}, others={})
    ([only], missing) = bench_gpu.prepare(batch_case, setup, True)
    assert only.name == bench_gpu.REFERENCE and not missing
    row = only.row
    bench_gpu.check_bits(batch_case, bench_gpu.REFERENCE, row, row, range(3))
