"""The benchmark of the ops: it leaves none out, refuses wrong results, and counts bytes rightly."""

from __future__ import annotations

import inspect
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import specdiff_kernels

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")

with pytest.MonkeyPatch.context() as patch:
    patch.syspath_prepend(ROOT / "benchmarks")
    import machine
    import op_cases
    from inputs import Shape

SMALL = {
    "row_distribution": Shape(2, 3, 200),
    "sample": Shape(2, 3, 200),
    "denoise_step": Shape(2, 3, 200),
    "verify": Shape(2, 3, 200),
    "build_tree": op_cases.Branching(6, 200, 50),
    "verify_tree": op_cases.Branching(6, 200, 50),
    "commit": op_cases.Rollback(3, 4, pages=True, caches=2),
    "row_divergence": op_cases.Pair(4, 300, 40),
    "skinny_linear": op_cases.Product(3, 40, 50),
    "cached_attention": op_cases.Cached(2, 3, 20),
}
EXPORTED = {
    name
    for name, function in inspect.getmembers(specdiff_kernels, inspect.isfunction)
    if function.__module__.startswith("specdiff_kernels.ops.")
    and "backend" in inspect.signature(function).parameters
}


@pytest.fixture(params=op_cases.KINDS, ids=lambda kind: kind.op)
def case(request, monkeypatch):
    monkeypatch.setattr(op_cases, "COLD", 1 << 16)
    return request.param(SMALL[request.param.op], CPU)


# --- nothing is left out -------------------------------------------------------------------------


def test_every_op_meets_every_backend():
    """As collected by pytest, so that no list of ours has to be believed."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "benchmarks/bench_ops.py"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    found = re.findall(r"::test_speed\[(\w+), (.*)-(\w+)\]$", done.stdout, re.M)
    # a test beside this one may have added the emulator, so they are taken from their folders
    backends = {f.parent.name for f in ROOT.glob("python/specdiff_kernels/*/verify.py")} - {"ops"}
    assert len(backends) >= 4
    assert {(op, backend) for op, _, backend in found} == set(itertools.product(EXPORTED, backends))
    assert len(found) == len(set(found)) == len(op_cases.CASES) * len(backends)
    assert {"verify", "denoise_step", "sample", "row_distribution", "commit"} <= EXPORTED
    assert "::test_bandwidth" in done.stdout


@pytest.fixture
def reports():
    """The conftest of the benchmarks, which are no package."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "path", [str(ROOT / "benchmarks"), *sys.path])
        import conftest
    return conftest


@pytest.fixture
def report(reports):
    """Complete: each case was measured by the backends of a CPU, and the others cannot be."""
    made = reports.OpsReport()
    made.bandwidth["sum_gb_per_s"] = 10.0
    for kind, shape in op_cases.CASES:
        made.unusable |= {(name, kind.op): "no GPU" for name in ("triton", "cuda")}
        for name, seconds in (("cpp", 0.002), ("reference", 0.1)):
            record = reports.OpRecord(str(shape), kind.op, name, seconds, {"least_mb": 5.0})
            made.records.append(record)
    return made


def test_a_report_is_complete_with_all_of_it(report):
    assert report.complete()
    record = report.records.pop(3)
    assert not report.complete()
    report.records.append(record)
    reason = report.unusable.pop(("cuda", "commit"))
    assert not report.complete()
    report.unusable["cuda", "commit"] = reason
    assert report.complete()
    report.bandwidth.clear()
    assert not report.complete()


def test_verification_is_complete_with_both_its_groups(reports):
    """A run of one of them, `-k`, must not take the place of the whole."""
    made, absent = reports.VerifyReport(), reports.CONTENDERS[-1]
    for kind, shape in itertools.product(reports.CONTENDERS, reports.SHAPES):
        if kind is absent:
            made.unusable[kind.name, shape] = "not installed"
            continue
        made.records += [reports.OpRecord(shape, group, kind.name, 0.1) for group in reports.GROUPS]
    assert made.complete()
    made.records = [record for record in made.records if record.group == "verify"]
    assert not made.complete()


def test_floor_share(report):
    """5 MB at 10 GB/s are read in half a millisecond."""
    content = report.as_json()
    shares = {case["backend"]: case["floor_share"] for case in content["cases"]}
    assert shares == pytest.approx({"cpp": 0.25, "reference": 0.005})
    assert len(content["cases"]) == 2 * len(op_cases.CASES)
    assert {"op": "verify", "backend": "cuda", "reason": "no GPU"} in content["not_measured"]
    assert len(report.not_measured()) == 2
    assert report.table().row_count == len(op_cases.CASES)


def test_results_are_kept_by_machine(report, monkeypatch, tmp_path):
    """A CPU's under its name; a GPU's under the GPU's, which is described in them."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    assert report.save(tmp_path) == tmp_path / machine.slug() / "ops.json"
    report.device = torch.device("cuda", 0)
    path = report.save(tmp_path)
    assert path == tmp_path / "nvidia-h200" / "ops.json"
    kept = json.loads(path.read_text())
    assert kept["machine"]["cores"]
    assert kept["cases"] == report.as_json()["cases"]


# --- the gate ------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["cpp", "reference"])
def test_right_results_pass(case, backend):
    assert case.fault(backend) is None
    assert case.fault(backend) is None  # what a call has changed is as before


def test_wrong_results_are_refused(case, monkeypatch):
    """Each result in turn is wrong in one entry: by one, or by a ten thousandth of the largest."""
    own = case.result
    assert case.fault("cpp") is None
    for wrong, result in enumerate(own(0, "cpp")):

        def broken(number, backend, wrong=wrong):
            have = own(number, backend)
            entry = have[wrong].view(-1)[:1]
            if isinstance(case, op_cases.Rounded):
                entry += 1e-4 * have[wrong].abs().max()
            else:
                entry += 1 if entry.dtype != torch.bool else True
            return have

        if result.numel():
            monkeypatch.setattr(case, "result", broken)
            said = case.fault("cpp")
            assert re.match(rf"{case.op}: (draw|result) \d+ of cpp (differs|has)", said)


def test_calls_take_turns_over_copies_and_draws(case):
    """The bits of a call depend on its draw alone, not on the copy that it reads."""
    calls = case.draws * 3
    for number in range(calls):
        have = case.result(number, "cpp")
        wanted = case.result(number % case.draws, "cpp")
        assert all(torch.equal(x, y) for x, y in zip(have, wanted, strict=True))


def test_copies_fill_what_they_should():
    made = op_cases.copies(torch.zeros(20), torch.zeros(5), room=1000)
    assert len(made) == 10 and len({pair[0].data_ptr() for pair in made}) == 10
    assert len(op_cases.copies(torch.zeros(2000), room=1000)) == 1


def test_a_backend_that_cannot_says_so(case):
    with pytest.raises(specdiff_kernels.BackendError, match="it does not run on cpu tensors"):
        case.fault("cuda")


# --- the least bytes, counted by hand -------------------------------------------------------------


def test_rows_of_logits():
    logits = torch.zeros(2, 10)  # a row is 40 bytes
    assert op_cases.row_distribution_bytes(logits) == 80
    assert op_cases.row_distribution_bytes(logits.bfloat16()) == 40
    assert op_cases.sample_bytes(logits, torch.tensor([0, 9])) == 4 + 40
    assert op_cases.denoise_step_bytes(torch.zeros(6, 10), revealed=3) == 120


def test_rows_that_a_verification_reads():
    """K = 3. Rejected at once: the target's row and the draft's. All accepted: four rows."""
    target = torch.zeros(3, 4, 10)
    assert op_cases.verify_bytes(target, torch.tensor([0, 3, 2])) == 40 * (2 + 4 + 4)


def test_rows_that_a_tree_needs():
    """Behind the root nodes 0 and 1, behind node 0 nodes 2 and 3, of which none is accepted."""
    assert op_cases.build_tree_bytes(torch.zeros(3, 10), read=2) == 80
    target, pool = torch.zeros(1, 5, 10), torch.zeros(3, 4)  # 40 and 16 bytes a row
    parents = torch.tensor([[-1, -1, 0, 0]])

    def read(*path: int) -> int:
        return op_cases.verify_tree_bytes(target, pool, parents, torch.tensor([path]))

    assert read(0, -1, -1, -1, -1) == 40 + 16  # both children rejected, one row of the draft
    assert read(0, 1, -1, -1, -1) == 2 * 40 + 16  # the first accepted at once
    assert read(0, 2, -1, -1, -1) == 2 * 40 + 16  # the second, which is a leaf
    assert read(0, 1, 3, -1, -1) == 3 * 40


def test_what_a_commit_moves():
    """Two rows that keep 3 and 1 tokens: 42 bytes each, 8 a kept token; one stop token."""
    kept = torch.tensor([3, 1])
    assert op_cases.commit_bytes(kept, stops=1) == 84 + 32 + 8
    assert op_cases.commit_bytes(kept, stops=1, dropped=0) == 124 + 8
    assert op_cases.commit_bytes(kept, stops=1, dropped=5) == 124 + 8 + 5 * 20
    tree = op_cases.commit_bytes(kept, stops=1, dropped=5, moved=2, entry=100)
    assert tree == 232 + 32 + 2 * 2 * 100


def test_both_rows_of_a_divergence_a_product_and_attention():
    target, draft, ids = torch.zeros(2, 10), torch.zeros(2, 4), torch.arange(4)
    assert op_cases.row_divergence_bytes(target, draft, ids) == 80 + 32 + 32
    assert op_cases.row_divergence_bytes(target, target, None) == 160
    x, weight = torch.zeros(2, 3), torch.zeros(5, 3)
    assert op_cases.skinny_linear_bytes(x, weight) == 4 * (6 + 15 + 10)
    assert op_cases.skinny_linear_bytes(x, weight.bfloat16()) == 4 * (6 + 10) + 2 * 15
    query, cache = torch.zeros(1, 2, 4, 8), torch.zeros(1, 2, 7, 8)
    assert op_cases.cached_attention_bytes(query, cache, cache) == 4 * 8 * (2 * 8 + 2 * 14)


def test_least_bytes_of_a_case(case):
    """Counted from what the reference answers, in words instead of tensors."""
    row = 4 * 200
    if case.op == "row_distribution" or case.op == "denoise_step":
        wanted = 6 * row
    elif case.op == "sample":
        drawn = [token for (tokens,) in case.expected for token in tokens.tolist()]
        wanted = sum(4 * (token + 1) for token in drawn) / 4
    elif case.op == "verify":
        counts = [n for accepted, *_ in case.expected for n in accepted.tolist()]
        wanted = sum(row * (4 if n == 3 else n + 2) for n in counts) / 4
    elif case.op == "build_tree":
        wanted = 2 * 4 * 50  # six nodes at two depths
    elif case.op == "verify_tree":
        wanted = sum(bytes_of_a_path(path.tolist()[0]) for _, _, path, _ in case.expected) / 8
    elif case.op == "commit":
        wanted = bytes_of_a_commit(case)
    elif case.op == "row_divergence":
        wanted = 4 * 4 * (300 + 40) + 8 * 40
    elif case.op == "skinny_linear":
        wanted = 4 * (3 * 40 + 50 * 40 + 3 * 50)
    else:
        wanted = 4 * 64 * 2 * (2 * 3 * 9 + 2 * 3 * 23)
    assert case.least_bytes() == wanted


def bytes_of_a_path(path: list[int]) -> int:
    """Nodes 2 n + 2 and 2 n + 3 of 6 are behind node n, which is number n + 1 of a path."""
    total = 0
    for number, following in zip(path, [*path[1:], -1], strict=True):
        first = 2 * number + 1 if number < 3 else None  # child
        if number >= 0:
            total += 4 * 200 + (0 if first is None or following == first else 4 * 50)
    return total


def bytes_of_a_commit(case) -> int:
    """Row by row: nodes 0, 2, 4, 6 of 8 were cached, so that of n kept tokens n - 1 move."""
    total = 8 + 8  # the stop token; the number of free blocks
    for length, kept in zip(case.lengths.tolist(), case.counts.tolist(), strict=True):
        blocks, left = -(-(length + 8) // 16), -(-(length + kept) // 16)
        entries = 2 * 3 * 64 * 4  # in two caches
        total += 42 + 8 * kept + 20 * (blocks - left) + 8 * kept + 2 * entries * (kept - 1)
    return total
